"""A run again, from its capsule, and where it first differs.

Tiers of what may be expected (none is a promise about two machines' last bits):
    T0  the environment is recorded: equal stages and steps, and no benchmark on which a sign test tells the two apart
    T1  the environment is the same, batch order and seeds are fixed by construction: equal bit for bit
    T2  kernels whose results do not depend on the batch: not offered
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from scipy.stats import binomtest

from harness import capsule, cell, evaluation
from harness.cell import Job, write_json
from harness.compare import Silent, check, check_writable, prepare, use_data
from harness.config import Experiment, nearest, parse
from harness.progress import Display, throttled

TIERS = ("T0", "T1")
LEVEL = 0.05  # of the sign test at T0
SHOWN = 6  # packages that are named
MARK = "reproduced.json"  # in the folder of a repetition; with its outcome once it is finished
Say = Callable[[str], None]
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Answers:
    """How two sets of samples of one benchmark differ."""

    samples: int  # that both have
    missing: int  # that one has
    texts: int  # that differ
    verdicts: int  # that differ
    delta: float  # accuracy of the second, less the first's; a fraction
    up: int  # problems on which the second is right more often
    down: int

    @property
    def same(self) -> bool:
        return not (self.missing or self.texts or self.verdicts)

    @property
    def p(self) -> float:
        """Two-sided sign test over the problems on which the two differ."""
        flips = self.up + self.down
        return float(binomtest(self.up, flips, 0.5).pvalue) if flips else 1.0


@dataclass
class Outcome:
    """What a repetition showed."""

    tier: str
    environment: list[str]  # what differs, in words
    curve: str | None = None  # the first step that differs
    steps: bool = True  # the same stages with as many steps
    weights: bool = True  # equal bit for bit
    models: list[str] = field(default_factory=list)  # that are not what they were
    answers: dict[str, Answers] = field(default_factory=dict)
    charged: dict[str, tuple[float, float]] = field(default_factory=dict)  # that differ; first, now
    trained: bool = True  # otherwise there are but samples to compare

    @property
    def identical(self) -> bool:
        samples = all(found.same for found in self.answers.values())
        return self.curve is None and self.steps and self.weights and samples and not self.charged

    @property
    def equal(self) -> bool:
        """Whether it is what the tier promises."""
        alike = all(found.p >= LEVEL and not found.missing for found in self.answers.values())
        return self.identical or (self.tier == "T0" and self.steps and alike)

    def lines(self) -> list[str]:
        """The verdict first, then all that differs."""
        if self.identical:
            same = f"{sum(found.samples for found in self.answers.values())} samples and their verdicts"
            if self.trained:
                same = f"weights, loss curve, {same}, charged costs"
            return [f"identical bit for bit: {same}"]
        found = [f"{name} is another model than then" for name in self.models]
        if self.curve is not None:
            found.append(f"the loss curve differs first in {self.curve}")
        elif not self.steps:
            found.append("the stages have other steps")
        if not self.weights:
            found.append("the student's weights differ")
        for name, one in self.answers.items():
            if not one.same:
                found.append(
                    f"{name}: {one.texts} of {one.samples} texts and {one.verdicts} verdicts differ"
                    + (f", {one.missing} samples only one has" if one.missing else "")
                    + f", accuracy {100 * one.delta:+.2f} points (sign test p = {one.p:.2g})"
                )
        for quantity, (first, now) in self.charged.items():
            found.append(f"charged {quantity}: {first:g} then, {now:g} now")
        verdict = f"equal within {self.tier}" if self.equal else f"different at {self.tier}"
        return [f"{verdict}: {found[0]}", *found[1:]]


def reproduce(
    run: str,
    *,
    results: Path = Path("results"),
    into: Path | None = None,
    store: Path | None = None,
    tier: str | None = None,
    say: Say = print,
    quiet: bool = False,
) -> Outcome:
    """Run a cell again in a fresh folder, with a fresh store unless one is given, and compare.

    Without a tier it is T1 where nothing of the environment differs, T0 otherwise.
    """
    if tier not in (None, *TIERS):
        more = " (T2, batch-invariant kernels, is not offered)" if tier == "T2" else ""
        raise ValueError(f"--tier {tier!r}: one of {', '.join(TIERS)}{more}")
    home = find(run, Path(results))
    kept = contents(home)
    setting = _setting(kept, home)
    check(setting, [] if kept["label"] == "base" else [kept["label"]])
    into = into or home.parents[2] / "reproduced" / home.parent.name / home.name
    _enter(into, home)
    store = store or into / "store"
    check_writable(into, store)
    data = setting.model_dump(mode="json")
    job = Job(data, kept["label"], kept["seed"], kept["data_seed"], into, store)
    _problems(home.parents[2] / "problems.jsonl", kept, setting, into)
    differs = [*_parts(kept), *differences(kept["conditions"][-1], capsule.conditions())]
    differs += _data(kept, cell.contents(job, setting))
    tier = tier or ("T0" if differs else "T1")
    say(f"{home} again, in {into}")
    for line in differs:
        say(f"  {line}")
    say(
        f"{tier}: "
        + ("equal bit for bit is expected" if tier == "T1" else "equal bit for bit is not promised")
        + (", the environment is the recorded one" if not differs else "")
    )
    with Display(1) if not quiet else Silent() as display:
        cell.run(job, throttled(lambda event: display(*event), job.name))
        display.finish(job.name)
    outcome = compared(home, job, Outcome(tier, differs))
    write_json(into / MARK, {"of": str(home.resolve()), "outcome": asdict(outcome)})
    return outcome


def find(run: str, results: Path) -> Path:
    """The folder of a run: its path, a file in it, or NAME/LABEL/SEED."""
    path = Path(run)
    if path.name in ("run.json", capsule.FILE):
        path = path.parent
    if path.absolute().parent.parent.name != "runs" and len(path.parts) == 3:
        path = results / path.parts[0] / "runs" / path.parts[1] / path.parts[2]
    if not any((path / name).is_file() for name in ("run.json", capsule.FILE)):
        there = [*results.glob("*/runs/*/*/run.json"), *results.glob(f"*/runs/*/*/{capsule.FILE}")]
        known = {f"{p.parts[-5]}/{p.parts[-3]}/{p.parts[-2]}" for p in there}
        mine = {name for name in known if name.startswith(f"{run.partition('/')[0]}/")}
        raise ValueError(
            f"no run {run!r} (NAME/LABEL/SEED, or its folder): {nearest(run, mine or known)}"
        )
    return path.absolute()


def contents(home: Path) -> dict[str, Any]:
    """A run's capsule; for a run from before there were any, what its comparison's summary says of it."""
    kept = capsule.read(home / capsule.FILE)
    if kept is not None:
        return kept
    summary = home.parents[2] / "summary.json"
    if not summary.is_file():
        raise ValueError(f"{home} keeps no {capsule.FILE}, and there is no {summary} to go by")
    said, run = _read(summary), _read(home / "run.json")
    config = {key: value for key, value in said["config"].items() if key != "sweep"}
    arm = {run["label"]: {"method": run["method"], **run["config"]}}
    own = {"methods": arm, "training": run["training"], "budget": run["budget"]}
    known = {k: said["environment"][k] for k in capsule.conditions() if k in said["environment"]}
    return {
        **{key: run[key] for key in ("label", "seed", "data_seed")},
        "experiment": {**config, **own, "reference": "base"},
        "conditions": [known],
    }


def differences(then: Row, now: Row) -> list[str]:
    """What of two conditions differs, in words; what one does not know is left out."""
    lines = [
        f"{name}: {then[name]} then, {now[name]} now"
        for name in then
        if name != "packages" and name in now and then[name] != now[name]
    ]
    before, after = then.get("packages", {}), now.get("packages", {})
    names = [name for name in before if before[name] != after.get(name)]
    if "threads" in then:  # then all were written down
        names += [name for name in after if name not in before]
    names.sort(key=lambda name: (name not in capsule.PACKAGES, name))
    if names:
        said = [f"{n} {before.get(n, 'none')} then, {after.get(n, 'none')} now" for n in names]
        more = f"; and {len(said) - SHOWN} more" if len(said) > SHOWN else ""
        lines.append(f"packages: {'; '.join(said[:SHOWN])}{more}")
    if str(now.get("commit") or "").endswith("-dirty"):
        lines.append(f"commit {now['commit']} has changes that no commit holds")
    return lines


def compared(home: Path, job: Job, outcome: Outcome) -> Outcome:
    """Fill in how a run and its repetition differ."""
    setting = Experiment.model_validate(job.experiment)
    for name in setting.benchmarks:
        outcome.answers[name] = answers(
            evaluation.read_records(_samples(home, name)),
            evaluation.read_records(job.samples_file(name)),
        )
    outcome.trained = job.label != "base"
    if not outcome.trained:
        return outcome
    first, second = _read(home / "run.json"), _read(job.run_file)
    outcome.curve = first_step(first["curve"], second["curve"])
    outcome.steps = _steps(first) == _steps(second)
    held = first.get("weights") or capsule.weights(_models(home))
    outcome.weights = held == second["weights"] if held else first["student"] == second["student"]
    was = {"the start": first["start"], **first.get("models", {})}
    now = {"the start": second["start"], **second["models"]}
    outcome.models = [name for name, identity in was.items() if now.get(name) != identity]
    paid, pays = (side["ledger"]["charged"] for side in (first, second))
    outcome.charged = {
        quantity: (paid.get(quantity, 0), pays.get(quantity, 0))
        for quantity in sorted({*paid, *pays} - {"seconds"})
        if paid.get(quantity, 0) != pays.get(quantity, 0)
    }
    return outcome


def first_step(first: Sequence[Row], second: Sequence[Row]) -> str | None:
    """Where two training curves part, in words."""
    for row, other in itertools.zip_longest(first, second):
        if row is None or other is None:
            longer = "then" if other is None else "now"
            at = row or other
            return f"stage {at['stage']}, step {at['step']}, which only the run of {longer} has"
        if json.dumps(row) != json.dumps(other):  # as text, where nan equals nan
            keys = ["loss", *(key for key in row if key != "loss")]
            key = next((k for k in keys if json.dumps(row[k]) != json.dumps(other.get(k))), "loss")
            return f"stage {row['stage']}, step {row['step']}: {key} {row[key]} then, {other.get(key)} now"
    return None


def answers(first: Iterable[Row], second: Iterable[Row]) -> Answers:
    """How two sets of records of one benchmark differ, paired by problem and sample."""
    one, two = ({(r["problem"], r["sample"]): r for r in rows} for rows in (first, second))
    both = [(one[at], two[at]) for at in one if at in two]
    gained: dict[str, int] = {}  # right answers more, by problem
    for a, b in both:
        gained[a["problem"]] = gained.get(a["problem"], 0) + b["correct"] - a["correct"]
    return Answers(
        samples=len(both),
        missing=len(one) + len(two) - 2 * len(both),
        texts=sum(a["text"] != b["text"] for a, b in both),
        verdicts=sum((a["correct"], a["status"]) != (b["correct"], b["status"]) for a, b in both),
        delta=sum(gained.values()) / max(1, len(both)),
        up=sum(more > 0 for more in gained.values()),
        down=sum(more < 0 for more in gained.values()),
    )


def _setting(kept: Row, home: Path) -> Experiment:
    """The experiment of a finished run, on as many threads as it had."""
    setting = parse(kept["experiment"], str(home / capsule.FILE))
    unfinished = [] if kept["label"] == "base" else [home / "run.json"]
    unfinished += [_samples(home, name) for name in setting.benchmarks]
    for path in unfinished:
        if not path.is_file():
            raise ValueError(
                f"{home} is not finished: there is no {path}; run the comparison first"
            )
    if threads := kept["conditions"][-1].get("threads"):
        setting = setting.model_copy(update={"threads": threads})
        torch.set_num_threads(threads)
    use_data(setting)
    return setting


def _enter(into: Path, home: Path) -> None:
    """Take a folder that is empty, or holds a repetition of this run that was cut; refuse any other."""
    of = str(home.resolve())
    if into.is_dir() and any(into.iterdir()):
        held = _read(into / MARK) if (into / MARK).is_file() else {}
        if held != {"of": of}:
            what = "a finished repetition" if "outcome" in held else "other files"
            raise ValueError(f"{into} holds {what}: remove it, or give another folder with --into")
    write_json(into / MARK, {"of": of})


def _problems(source: Path, kept: Row, setting: Experiment, into: Path) -> None:
    """The training problems of then where they are still there, else out of their sources again."""
    digest = kept.get("problems")
    if source.is_file() and digest in (None, capsule.file_digest(source)):
        shutil.copyfile(source, into / "problems.jsonl")
    else:
        prepare(setting, into)


def _parts(kept: Row) -> list[str]:
    """What changed while a run was made, and what was not written down."""
    lines = []
    for before, after in itertools.pairwise(kept["conditions"]):
        lines += [f"changed while it ran: {line}" for line in differences(before, after)]
    if not all("threads" in part for part in kept["conditions"]):
        lines.append(
            f"from before {capsule.FILE}: threads, processor and most packages are not known"
        )
    return lines


def _data(kept: Row, fresh: Row) -> list[str]:
    lines = []
    if kept.get("problems", fresh["problems"]) != fresh["problems"]:
        lines.append("training problems: others than then")
    for name, was in kept.get("benchmarks", {}).items():
        now = fresh["benchmarks"][name]
        lines += [f"{name}: another {what} than then" for what in was if was[what] != now[what]]
    return lines


def _samples(home: Path, benchmark: str) -> Path:
    name = f"{benchmark}--{home.parent.name}--{home.name}.parquet"
    return home.parents[2] / "samples" / name


def _models(home: Path) -> Path:
    return home.parents[2] / "models" / home.parent.name / home.name


def _steps(run: Row) -> list[tuple[str, int]]:
    return [(stage["name"], stage["steps"]) for stage in run["stages"]]


def _read(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return data
