"""The samples of a comparison: who solved which problem, and of the most telling problems what was written."""

from __future__ import annotations

import base64
import gzip
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

# What is read of every sample; files of an older version lack some, which are then null.
KINDS = {
    "benchmark": pa.string(),
    "method": pa.string(),
    "seed": pa.int64(),
    "data_seed": pa.int64(),
    "problem": pa.string(),
    "sample": pa.int64(),
    "correct": pa.bool_(),
    "second": pa.string(),
    "level": pa.int64(),
    "subject": pa.string(),
}
SCHEMA = pa.schema([*KINDS.items(), ("file", pa.int64()), ("row", pa.int64())])
TEXTS = ("status", "extracted", "truncated", "tokens", "gold", "prompt", "text")
POOLED = ("text", "prompt", "extracted")  # what equal samples share
MOST_PROBLEMS = 200  # of a benchmark whose texts the page holds
MOST_SAMPLES = 4  # of a training seed
CHARACTERS = 8_000_000  # of all texts on the page
EXCERPT = 120  # characters of a prompt in the table of problems


@dataclass(frozen=True)
class Solved:
    """One benchmark's problems and how often each arm solved them."""

    benchmark: str
    problems: list[str]
    about: Mapping[str, list[Any]]  # level, subject, gold and prompt of each, or None
    arms: list[str]
    right: NDArray[np.int64]  # [K, P] right samples, of all seeds
    drawn: NDArray[np.int64]  # [K, P] samples

    @property
    def shares(self) -> NDArray[np.float64]:
        """[K, P]; nan where an arm has no sample of a problem."""
        with np.errstate(invalid="ignore"):
            return self.right / self.drawn

    def telling(self) -> list[int]:
        """Places of the problems, those first on which the arms differ most; equal ones in their order."""
        shares = self.shares
        known = np.where(np.isnan(shares), np.nanmean(shares, 0), shares)
        return np.argsort(-known.var(0).round(12), kind="stable").tolist()


@dataclass(frozen=True)
class Samples:
    """All samples of a folder without their texts, which are read when asked for."""

    files: Sequence[Path] = ()
    table: pa.Table = field(default_factory=lambda: _encoded(SCHEMA.empty_table()))

    @property
    def benchmarks(self) -> list[str]:
        return sorted(pc.unique(self.table["benchmark"]).to_pylist())

    def of(self, benchmark: str) -> pa.Table:
        return self.table.filter(pc.equal(self.table["benchmark"].cast(pa.string()), benchmark))

    def by(self, column: str) -> dict[str, dict[str, list[tuple[Any, float]]]]:
        """{benchmark: {method: [(level or subject, accuracy)]}} over all seeds."""
        known = self.table.filter(pc.is_valid(self.table[column]))
        groups = known.group_by(["benchmark", "method", column]).aggregate([("correct", "mean")])
        found: dict[str, dict[str, list[tuple[Any, float]]]] = {}
        for row in sorted(
            groups.to_pylist(), key=lambda r: (r["benchmark"], r["method"], r[column])
        ):
            points = found.setdefault(row["benchmark"], {}).setdefault(row["method"], [])
            points.append((row[column], row["correct_mean"]))
        return found

    def disputes(self, most: int) -> dict[str, list[dict[str, Any]]]:
        """The first samples of each benchmark on which the two extractors disagree."""
        second = self.table["second"].cast(pa.string())
        differs = pc.not_equal(pc.equal(second, "ok"), self.table["correct"])
        table = self.table.filter(differs)  # null, where the second did not look, is no difference
        found: dict[str, list[dict[str, Any]]] = {}
        for benchmark in pc.unique(table["benchmark"]).to_pylist():
            mine = table.filter(pc.equal(table["benchmark"].cast(pa.string()), benchmark))
            found[benchmark] = [
                {**row, **text} for row, text in self.texts(mine.slice(0, most), TEXTS[:-1])
            ]
        return found

    def texts(
        self, table: pa.Table, columns: Sequence[str]
    ) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """Each row with these columns of its file; of a file only what is asked for stays in memory."""
        files = table["file"].to_numpy()
        for file in dict.fromkeys(files.tolist()):
            rows = table.filter(pa.array(files == file)).to_pylist()
            wanted = {row["row"]: row for row in rows}
            parquet = pq.ParquetFile(self.files[file])
            there = [name for name in columns if name in parquet.schema_arrow.names]
            first = 0
            for batch in parquet.iter_batches(1024, columns=there):
                mine = [at for at in range(batch.num_rows) if first + at in wanted]
                for at, found in zip(
                    mine, batch.take(pa.array(mine, pa.int64())).to_pylist(), strict=True
                ):
                    yield wanted[first + at], {name: found.get(name) for name in columns}
                first += batch.num_rows

    def solved(self, benchmark: str, labels: Sequence[str]) -> Solved:
        """What the arms, in this order, made of a benchmark."""
        table = self.of(benchmark)
        keys = ["problem", "method"]
        groups = table.group_by(keys).aggregate([("correct", "sum"), ("correct", "count")])
        problems = pc.unique(table["problem"]).to_pylist()
        found = set(pc.unique(table["method"]).to_pylist())
        arms = [label for label in labels if label in found]
        row = {name: i for i, name in enumerate(arms)}
        place = {name: i for i, name in enumerate(problems)}
        i = [row[name] for name in groups["method"].to_pylist()]
        j = [place[name] for name in groups["problem"].to_pylist()]
        right = np.zeros((len(arms), len(problems)), np.int64)
        drawn = np.zeros_like(right)
        right[i, j], drawn[i, j] = (
            groups["correct_sum"].to_numpy(),
            groups["correct_count"].to_numpy(),
        )
        codes = table["problem"].combine_chunks().indices.to_numpy()
        first = table.take(np.sort(np.unique(codes, return_index=True)[1]))
        rows = {row["problem"]: row | text for row, text in self.texts(first, ("gold", "prompt"))}
        about = [rows[name] for name in problems]
        columns = {
            name: [row[name] for row in about] for name in ("level", "subject", "gold", "prompt")
        }
        return Solved(benchmark, problems, columns, arms, right, drawn)

    def written(self, solved: Solved, characters: int) -> list[dict[str, Any]]:
        """Samples with their texts, of the most telling problems: one of every arm, then more, until there is no room."""
        rank = {solved.problems[at]: i for i, at in enumerate(solved.telling()[:MOST_PROBLEMS])}
        table = self.of(solved.benchmark)
        telling = pc.is_in(table["problem"].cast(pa.string()), pa.array(list(rank)))
        table = table.filter(pc.and_(telling, pc.less(table["sample"], MOST_SAMPLES)))
        arms, place = ({n: i for i, n in enumerate(x)} for x in (solved.arms, solved.problems))
        kept: list[dict[str, Any]] = []
        seen: set[str] = set()
        turns = _turns(table)
        for turn in range(int(turns.max(initial=-1)) + 1):
            units: dict[tuple[int, int], list[dict[str, Any]]] = {}  # (sample, rank): all arms'
            for row, text in self.texts(table.filter(pa.array(turns == turn)), TEXTS):
                about = {name: row[name] for name in ("seed", "data_seed", "sample")}
                about |= {"problem": place[row["problem"]], "arm": arms[row["method"]]}
                units.setdefault((row["sample"], rank[row["problem"]]), []).append(about | text)
            for _, rows in sorted(units.items()):
                new = {row[name] or "" for row in rows for name in POOLED} - seen
                characters -= sum(map(len, new))
                if characters < 0:
                    return kept
                seen |= new
                kept += rows
        return kept


def _turns(table: pa.Table) -> NDArray[np.int64]:
    """Of each row the place of its training seed among those of its arm."""
    arm = table["method"].combine_chunks().indices.to_numpy()
    seeds = [table[name].fill_null(0).to_numpy() for name in ("seed", "data_seed")]
    runs, run = np.unique(np.stack([arm, *seeds]), axis=1, return_inverse=True)
    _, first = np.unique(runs[0], return_index=True)
    place = np.arange(runs.shape[1])
    turn = place - first[np.searchsorted(first, place, side="right") - 1]
    return np.asarray(turn[run.reshape(-1)], np.int64)


def read(folder: Path, cells: set[tuple[str, int, int]], several: bool = False) -> Samples:
    """The samples of these (method, seed, data seed) in a results folder; names tell data seeds apart where there are several."""
    files = [
        path
        for path in sorted((folder / "samples").glob("*.parquet"))
        if "--base--" in path.name or of_several(path.stem) == several
    ]
    tables = [SCHEMA.empty_table()]
    for place, path in enumerate(files):
        parquet = pq.ParquetFile(path)
        there = set(parquet.schema_arrow.names)
        found = parquet.read([name for name in KINDS if name in there])
        for name in KINDS:
            if name not in there:  # of an older version
                found = found.append_column(name, pa.nulls(found.num_rows))
        rows = np.arange(found.num_rows)
        found = found.append_column("file", pa.array(np.full_like(rows, place)))
        found = found.append_column("row", pa.array(rows)).select(SCHEMA.names)
        found = found.cast(SCHEMA)  # a column of nulls has a type of its own
        keys = {name: found[name] for name in ("method", "seed")}
        keys["data_seed"] = found["data_seed"].fill_null(0)
        of = pa.table(keys).group_by(list(keys)).aggregate([]).to_pylist()
        wanted = [cell for cell in of if tuple(cell.values()) in cells]
        if len(wanted) < len(of):
            mine = np.zeros(found.num_rows, bool)
            for cell in wanted:
                same = [np.asarray(pc.equal(keys[name], cell[name])) for name in keys]
                mine |= np.logical_and.reduce(same)
            found = found.filter(pa.array(mine))
        tables.append(found)
    table = pa.concat_tables(_encoded(each) for each in tables)
    return Samples(files, table.unify_dictionaries().combine_chunks())


def of_several(name: str) -> bool:
    """Whether a cell was one of several data seeds: a comparison that got a second one leaves those of before beside its own."""
    return re.search(r"-data\d+$", name) is not None


def _encoded(table: pa.Table) -> pa.Table:
    """Strings that repeat, as places in a list."""
    for place, each in enumerate(table.schema):
        if each.type == pa.string():
            table = table.set_column(place, each.name, table[each.name].dictionary_encode())
    return table


# --- what the page carries -------------------------------------------------------------------------


def packed(data: Any) -> str:
    """Plain data as base64 of gzipped JSON, the same bytes every time."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()


def problem_data(solved: Solved) -> dict[str, Any]:
    """The table of problems: how each begins, and right and drawn samples by arm."""
    return {
        "arms": solved.arms,
        "problems": solved.problems,
        "levels": solved.about["level"],
        "subjects": solved.about["subject"],
        "starts": [" ".join((prompt or "")[:EXCERPT].split()) for prompt in solved.about["prompt"]],
        "right": solved.right.tolist(),
        "drawn": solved.drawn.tolist(),
    }


def trace_data(solved: Solved, written: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Texts once each, and of every sample in columns where they stand; problems and arms are places in the table's."""
    columns = {name: [row[name] for row in written] for name in ("text", "extracted")}
    pool = dict.fromkeys(text for column in columns.values() for text in column if text is not None)
    texts = {text: i for i, text in enumerate(pool)}
    names = ("problem", "arm", "seed", "data_seed", "sample", "status", "truncated", "tokens")
    shown = {row["problem"] for row in written}
    of = {name: solved.about[name] for name in ("prompt", "gold")}
    return {
        **{name: [row[name] for row in written] for name in names},
        **{name: [texts.get(text) for text in column] for name, column in columns.items()},
        "texts": list(texts),
        **{f"{k}s": [v if i in shown else None for i, v in enumerate(of[k])] for k in of},
    }
