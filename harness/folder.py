"""What a results folder tells of its students: each run, finished or in progress, and all answers added up by problem."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from harness import points

ROWS = 2000  # problems of a table, those first on which the methods differ most
SHOWN = 100  # samples of a student's table; all of them are in its Parquet file
TEXT = 2000  # characters of a sample
SILENT = 600  # seconds; a run without a sign of life for so long has been ended, see points.BEAT
LOG = "points.jsonl"  # beside run.json, see harness.points

Row = Mapping[str, Any]
Cell = tuple[str, int, int]  # label, seed, data seed


@dataclass(frozen=True)
class Student:
    """A run folder: what run.json says, or a run in progress of itself, and what it logged on the way."""

    about: Row
    written: int  # milliseconds
    logged: points.Logged = field(default_factory=points.Logged)
    file: Path | None = None  # run.json, once it is trained

    @classmethod
    def of(cls, folder: Path) -> Student:
        file, log = folder / "run.json", folder / LOG
        logged = points.read(log)
        about = dict(logged.about)
        if file.is_file():
            about |= read(file)
        else:  # its first line may be half written
            seed = re.match(r"\d+", folder.name)
            about = {
                "method": folder.parent.name,
                "label": folder.parent.name,
                "seed": int(seed[0]) if seed else 0,
                **about,
            }
        written = max(written_at(path) for path in (file, log) if path.is_file())
        return cls(about, written, logged, file if file.is_file() else None)

    @classmethod
    def told(cls, cell: Row, config: Row, written: int) -> Student:
        """One of which only a summary's cell tells."""
        label = cell["method"]
        fields = dict(config.get("methods", {}).get(label, {}))
        about = {"method": fields.pop("method", label), "label": label, "seed": cell["seed"]}
        about |= {"data_seed": cell.get("data_seed", 0), "config": fields}
        return cls({**about, "ledger": None if label == "base" else cell.get("ledger")}, written)

    @property
    def cell(self) -> Cell:
        return self.about["label"], self.about["seed"], self.about.get("data_seed", 0)

    @property
    def curve(self) -> list[Row]:
        if self.file:
            return self.about.get("curve", [])
        return [{k: v for k, v in row.items() if k != "time"} for row in self.logged.steps]

    @property
    def times(self) -> dict[int, int]:
        return {row["step"]: row["time"] for row in self.logged.steps}

    @property
    def silent(self) -> bool:
        return time.time() - self.written / 1000 > SILENT

    @property
    def seconds(self) -> float:
        return float((self.about.get("ledger") or {}).get("spent", {}).get("seconds", 0.0))

    @property
    def start(self) -> int:
        return (
            self.logged.times[0] if self.logged.times else self.written - int(1000 * self.seconds)
        )

    @property
    def ended(self) -> int:
        return self.logged.times[1] if self.logged.times else self.written

    @property
    def stages(self) -> str:
        done = [stage["name"] for stage in self.about.get("stages", ())]
        return ", ".join(dict.fromkeys(done or [row["stage"] for row in self.curve[-1:]]))

    @property
    def phase(self) -> str:
        last = self.logged.samples[-1]["phase"] if self.logged.samples else ""
        return str("trained" if self.file and last == "end" else last)

    def used(self) -> dict[str, float]:
        """Of all samples: CPU time, and the most memory that one saw."""
        used = [row["used"] for row in self.logged.samples]
        if not used:
            return {}
        found = {"cpu_seconds": sum(each["cpu_seconds"] for each in used)}
        for name in ("memory_mb", "gpu_memory_mb"):
            if any(name in each for each in used):
                found[f"peak_{name}"] = max(each.get(name, 0.0) for each in used)
        return found


class Answers:
    """The samples of a comparison, added up by problem."""

    def __init__(self, folder: Path) -> None:
        self.paths = {
            path: path.stat().st_mtime_ns for path in sorted((folder / "samples").glob("*.parquet"))
        }
        self.found: dict[str, dict[Cell, dict[str, Answer]]] = {}
        self.of: dict[Cell, list[Path]] = {}
        for path, when in self.paths.items():
            for (benchmark, cell), rows in _counted(path, when).items():
                self.found.setdefault(benchmark, {})[cell] = rows
                self.of.setdefault(cell, []).append(path)

    def benchmarks(self) -> list[str]:
        return list(self.found)

    def benchmark(self, name: str) -> dict[Cell, dict[str, Answer]]:
        return self.found.get(name, {})

    def files(self, cell: Cell) -> list[Path]:
        return list(dict.fromkeys(self.of.get(cell, ())))

    def mark(self, cell: Cell | None = None) -> list[Any]:
        """What changes when the samples do."""
        chosen = self.paths if cell is None else self.files(cell)
        return [[path.name, self.paths[path]] for path in chosen]

    def accuracy(self, name: str, cell: Cell) -> float:
        shares = [answer.share for answer in self.found[name][cell].values()]
        return sum(shares) / len(shares)

    def by_problem(self, name: str, labels: Sequence[str]) -> list[Row]:
        """Each method's share of correct samples, over its seeds; what tells methods apart comes first."""
        mine = self.benchmark(name)
        rows: list[Row] = []
        for problem in dict.fromkeys(problem for each in mine.values() for problem in each):
            shares = {}
            for label in labels:
                seen = [
                    each[problem]
                    for cell, each in mine.items()
                    if cell[0] == label and problem in each
                ]
                if seen:
                    shares[label] = round(sum(answer.share for answer in seen) / len(seen), 4)
                    level = seen[0].level
            if shares:
                rows.append({"problem": problem, "level": level, **shares})

        def spread(row: Row) -> float:
            values = [row[label] for label in labels if label in row]
            return min(values) - max(values)

        return sorted(rows, key=spread)[:ROWS]

    def shown(self, name: str, cell: Cell) -> list[Row]:
        """The first sample of some problems, to read."""
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        columns = ("problem", "level", "correct", "status", "extracted", "gold", "text")
        for path in self.files(cell):
            table = pq.ParquetFile(path).read()
            wanted = {
                "benchmark": name,
                "method": cell[0],
                "seed": cell[1],
                "data_seed": cell[2],
                "sample": 0,
            }
            for column, value in wanted.items():
                if column in table.column_names:
                    table = table.filter(pc.equal(table[column], value))
            if len(table):
                there = [column for column in columns if column in table.column_names]
                rows = table.select(there).slice(0, SHOWN).to_pylist()
                return [{**row, "text": _middle_cut(row["text"])} for row in rows]
        return []


@dataclass(frozen=True)
class Answer:
    share: float  # of the samples that are correct
    level: int | None


@lru_cache(maxsize=8192)
def _counted(path: Path, when: int) -> dict[tuple[str, Cell], dict[str, Answer]]:
    """By benchmark and cell, and in them by problem; a file that has not changed is read once."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path)
    keys = ["benchmark", "method", "seed", "data_seed", "problem", "level"]
    keys = [key for key in keys if key in file.schema_arrow.names]
    table = file.read(columns=[*keys, "correct"])
    table = table.set_column(len(keys), "correct", table["correct"].cast(pa.int8()))
    rows = table.group_by(keys, use_threads=False).aggregate([("correct", "mean")]).to_pylist()
    found: dict[tuple[str, Cell], dict[str, Answer]] = {}
    for row in rows:
        mine = found.setdefault((row["benchmark"], cell_of(row)), {})
        mine[row["problem"]] = Answer(row["correct_mean"], row.get("level"))
    return found


def cell_of(row: Row) -> Cell:
    return row["method"], row["seed"], row.get("data_seed", 0)


def _middle_cut(text: str) -> str:
    """A long sample without its middle: the answer is at its end."""
    return text if len(text) <= TEXT else f"{text[: TEXT // 4]} [...] {text[-TEXT * 3 // 4 :]}"


def read(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return data


def written_at(path: Path) -> int:
    """When, in milliseconds."""
    return int(path.stat().st_mtime * 1000)
