"""What a results folder says: rows, sentences and numbers in words, before any format."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from harness.evaluation import decoding
from harness.ledger import Ledger, total
from harness.report import samples
from harness.report.samples import Samples, Solved

Row = Mapping[str, Any]

BASE = "base"
TOKENS = ("teacher_generated", "teacher_scored", "student_generated", "trained")
COSTS = {
    "teacher_generated": "teacher generated",
    "teacher_scored": "teacher scored",
    "student_generated": "student generated",
    "trained": "trained",
    "flops": "FLOPs",
    "seconds": "time",
}
TEACHER = {"teacher_generated": "generated", "teacher_scored": "scored"}
PLAIN = {"samples", "training"}  # purposes that the totals tell already
AT_COST = {  # said of a, and of b
    "better at no more cost": "worse at no less cost",
    "better but costlier": "worse but cheaper",
}
AT_COST |= {b: a for a, b in AT_COST.items()}
MINUS = "\N{MINUS SIGN}"
DISPUTES = 20  # of a benchmark that are shown
TELLING = 20


@dataclass(frozen=True)
class Comparison:
    """A finished comparison as its files tell it."""

    summary: Row
    runs: Sequence[Row] = ()  # run.json of each trained cell
    levels: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]] = field(default_factory=dict)
    mechanisms: Mapping[str, Sequence[Row]] = field(default_factory=dict)  # label -> scorecard
    snr: Row | None = None  # snr.json
    disputes: Mapping[str, Sequence[Row]] = field(default_factory=dict)  # benchmark -> samples
    subjects: Mapping[str, Mapping[str, Sequence[tuple[str, float]]]] = field(default_factory=dict)
    samples: Samples = field(default_factory=Samples)

    @property
    def name(self) -> str:
        return str(self.summary["name"])

    @cached_property
    def benchmarks(self) -> list[str]:
        return list(dict.fromkeys(str(cell["benchmark"]) for cell in self.summary["cells"]))

    @cached_property
    def labels(self) -> list[str]:
        """Arms in the order of the summary, the untrained student first."""
        found = dict.fromkeys(str(cell["method"]) for cell in self.summary["cells"])
        return sorted(found, key=lambda label: label != BASE)

    @cached_property
    def reference(self) -> str | None:
        """The arm that verdicts are about."""
        config = self.summary.get("config") or {}
        families = [p["b"] for p in self.summary["pairs"] if p.get("family") == "reference"]
        named = self.summary.get("reference") or next(iter(families), config.get("reference"))
        return named if named in self.labels else None

    @property
    def data_seeds(self) -> list[int]:
        config = self.summary.get("config") or {}
        used = {int(cell["data_seed"]) for cell in self.summary["cells"] if "data_seed" in cell}
        return list(config.get("data_seeds") or sorted(used) or [0])

    def index(self, label: str) -> int | None:
        """A method's place in the palette; None for the untrained student."""
        return None if label == BASE else [x for x in self.labels if x != BASE].index(label)

    @cached_property
    def _cells(self) -> dict[tuple[str, str], list[Row]]:
        found: dict[tuple[str, str], list[Row]] = {}
        for cell in self.summary["cells"]:
            found.setdefault((cell["benchmark"], cell["method"]), []).append(cell)
        return found

    @cached_property
    def _pairs(self) -> dict[str, dict[tuple[str, str], Row]]:
        found: dict[str, dict[tuple[str, str], Row]] = {}
        for pair in self.summary["pairs"]:
            found.setdefault(pair["benchmark"], {})[pair["a"], pair["b"]] = pair
        return found

    def cells(self, benchmark: str, label: str) -> list[Row]:
        return self._cells.get((benchmark, label), [])

    def pairs(self, benchmark: str) -> list[Row]:
        return list(self._pairs.get(benchmark, {}).values())

    def leaderboard(self, benchmark: str) -> list[dict[str, Any]]:
        """One row an arm, best first: accuracy over its seeds, what was cut, and what one student cost."""
        arms = {
            row["method"]: row
            for row in self.summary.get("arms", ())
            if row["benchmark"] == benchmark
        }
        rows = []
        for label in self.labels:
            cells = self.cells(benchmark, label)
            if not cells:
                continue
            samples = sum(cell["n_problems"] * cell["n_samples"] for cell in cells)
            arm = arms.get(label) or _arm(cells)
            rows.append(
                {
                    "method": label,
                    "accuracy": arm["accuracy"],
                    "ci95": arm["ci95"],
                    "pass_at_k": arm.get("pass_at_k", {}),
                    "maj_at_k": arm.get("maj_at_k", {}),
                    "disputed": arm.get("disputed"),
                    "seeds": len(cells),
                    "truncated": sum(cell.get("truncated", 0) for cell in cells) / samples,
                    "unparsed": sum(cell.get("unparsed", 0) for cell in cells) / samples,
                    "costs": _mean_costs(cells),
                    "pair": self.against(benchmark, label),
                    "rank": arm.get("rank"),
                    "rank_ci95": arm.get("rank_ci95"),
                    "p_best": arm.get("p_best"),
                    "pareto": (arm.get("cost") or {}).get("pareto"),
                }
            )
        return sorted(rows, key=lambda row: -row["accuracy"])

    def sampled(self, benchmark: str) -> str:
        """How a benchmark's answers were drawn: `avg@4, temperature 0.6, top_p 0.95, at most 8192 tokens`."""
        protocol = self.summary["protocol"]
        known = protocol.get("benchmarks", {}) if isinstance(protocol, Mapping) else {}
        name = benchmark if benchmark in known else benchmark.rpartition("/")[0]  # a band of it
        return sampled(decoding(known[name])) if name in known else ""

    def disputed(self, benchmark: str) -> str:
        """How often the two extractors disagree, arm by arm; empty where there is only one."""
        counts = {r["method"]: r["disputed"] for r in self.leaderboard(benchmark)}
        said = [f"{label} {count}" for label, count in counts.items() if count is not None]
        if not said:
            return ""
        return (
            "Samples on which the second extractor (the last box, as a string) disagrees with math-verify, which decides: "
            f"{', '.join(said)}."
        )

    def against(self, benchmark: str, label: str) -> Row | None:
        """The pair of an arm and the reference, or where there is none, base."""
        return self.pair(benchmark, label, self.reference or BASE)

    def pair(self, benchmark: str, a: str, b: str) -> Row | None:
        """The comparison of two arms, said of a."""
        pairs = self._pairs.get(benchmark, {})
        if (a, b) in pairs:
            return pairs[a, b]
        return turned(pairs[b, a]) if (b, a) in pairs else None

    def runs_of(self, label: str) -> list[Row]:
        return [run for run in self.runs if run["label"] == label]

    def notes(self, label: str) -> dict[str, list[Any]]:
        """What a method noted, by dotted name, one value a run; histograms stay whole."""
        found: dict[str, list[Any]] = {}
        for run in self.runs_of(label):
            for name, value in _flat(run.get("notes") or {}):
                found.setdefault(name, []).append(value)
        return found

    def purposes(self, label: str) -> str:
        """What a run's teacher tokens were for, in the mean; empty where the totals tell that already."""
        runs = self.runs_of(label)
        summed = total(Ledger.from_dict(run["ledger"]) for run in runs).purposes
        found = {name: amounts for name in TEACHER if (amounts := summed.get(name))}
        names = {purpose for amounts in found.values() for purpose in amounts}
        if len(names) < 2 and names <= PLAIN:
            return ""
        said = [
            f"{TEACHER[name]}: "
            + ", ".join(f"{p} {amount(name, tokens / len(runs))}" for p, tokens in amounts.items())
            for name, amounts in found.items()
        ]
        return f"teacher tokens by purpose: {'; '.join(said)}"


def load(folder: Path) -> Comparison:
    """Read what a comparison wrote; all but the summary may be missing."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    cells = {(cell["method"], cell["seed"], cell.get("data_seed", 0)) for cell in summary["cells"]}
    several = len(Comparison(summary).data_seeds) > 1
    runs = [
        json.loads(path.read_text(encoding="utf-8"))
        for path in sorted((folder / "runs").rglob("run.json"))
        if samples.of_several(path.parent.name) == several
    ]
    at = [(run["label"], run["seed"], run.get("data_seed", 0)) for run in runs]
    runs = [runs[i] for i in sorted(range(len(runs)), key=lambda i: str(at[i])) if at[i] in cells]
    drawn = samples.read(folder, cells, several)
    mechanisms = _mechanisms(folder, {label for label, *_ in cells})
    path = folder / "snr.json"
    snr = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    return Comparison(
        summary,
        runs,
        drawn.by("level"),
        mechanisms,
        snr,
        drawn.disputes(DISPUTES),
        drawn.by("subject"),
        drawn,
    )


def _mechanisms(folder: Path, labels: set[str]) -> dict[str, list[Row]]:
    """The scorecards of these arms, in the order of their file."""
    path = folder / "mechanisms.json"
    if not path.is_file():
        return {}
    arms = json.loads(path.read_text(encoding="utf-8"))["arms"]
    return {label: rows for label, rows in arms.items() if rows and label in labels}


def by_group(
    comparison: Comparison, benchmark: str, prefix: str = ""
) -> tuple[list[str], list[list[str]]]:
    """Accuracy by level (with its prefix), or by subject (without), as header and lines."""
    found = (comparison.levels if prefix else comparison.subjects).get(benchmark, {})
    values = sorted({value for points in found.values() for value, _ in points})
    lines = []
    for label in comparison.labels:
        if at := dict(found.get(label, ())):
            lines.append([label, *(percent(at[v]) if v in at else "" for v in values)])
    return [benchmark, *(f"{prefix}{value}" for value in values)], lines


def _arm(cells: Sequence[Row]) -> Row:
    """An arm of a summary that lists cells only: the mean, and the widest of their intervals."""
    return {
        "accuracy": sum(cell["accuracy"] for cell in cells) / len(cells),
        "ci95": [min(cell["ci95"][0] for cell in cells), max(cell["ci95"][1] for cell in cells)],
    }


def _mean_costs(cells: Sequence[Row]) -> dict[str, float]:
    """What one student of the arm would have cost alone."""
    ledgers: list[Row] = [cell.get("ledger") or {} for cell in cells]
    charged: list[Row] = [ledger.get("charged", ledger) for ledger in ledgers]
    return {name: sum(float(one.get(name, 0)) for one in charged) / len(cells) for name in COSTS}


def _flat(data: Row, prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in data.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, Mapping) and not is_histogram(value):
            yield from _flat(value, name)
        else:
            yield name, value


def turned(pair: Row) -> Row:
    """The same comparison said of the other arm."""
    opposite = {"better": "worse", "worse": "better"}
    mirrored: dict[str, Any] = {}
    if at := pair.get("at_cost"):
        mirrored["at_cost"] = AT_COST.get(at, at)
    if ratio := pair.get("cost_ratio"):
        mirrored["cost_ratio"] = {k: 1 / v if v else None for k, v in ratio.items()}
    if test := pair.get("mcnemar"):
        mirrored["mcnemar"] = {**test, "b": test["c"], "c": test["b"]}
    if test := pair.get("sign"):
        mirrored["sign"] = {**test, "wins": test["losses"], "losses": test["wins"]}
    return {
        **pair,
        **mirrored,
        "a": pair["b"],
        "b": pair["a"],
        "delta": -pair["delta"],
        "ci95": [-pair["ci95"][1], -pair["ci95"][0]],
        "verdict": opposite.get(pair["verdict"], pair["verdict"]),
    }


def against_base(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """What each arm gained and lost on every benchmark, as header and lines; without lines where one table says it all."""
    names = comparison.benchmarks
    if len(names) < 2 or BASE not in comparison.labels:
        return [], []
    lines = []
    for label in comparison.labels:
        if label == BASE:
            continue
        cells = [label]
        for name in names:
            pair = comparison.pair(name, label, BASE)
            cells.append(
                f"{signed(pair['delta'])} ({span(pair['ci95'])}), {pair['verdict']}" if pair else ""
            )
        lines.append(cells)
    return ["points against the untrained student", *names], lines


def telling(
    solved: Solved, best: Sequence[str], other: str, most_arms: int = 6
) -> tuple[list[str], list[int], list[list[str]]]:
    """The problems on which the arms differ most: header without its first cell, which columns are words, and lines.

    Of many arms those that come first and the one they are held against.
    """
    arms = [arm for arm in solved.arms if arm in {other, *best[: most_arms - 1]}]
    about = [
        name for name in ("level", "subject") if any(x is not None for x in solved.about[name])
    ]
    left = [1 + place for place, name in enumerate(about) if name == "subject"]
    lines = []
    for at in solved.telling()[:TELLING]:
        said = ["–" if (x := solved.about[name][at]) is None else str(x) for name in about]
        rows = [solved.arms.index(arm) for arm in arms]
        shares = [percent(x) if (x := solved.shares[row, at]) >= 0 else "–" for row in rows]
        lines.append([solved.problems[at], *said, *shares])
    return [*about, *arms], left, lines


# --- sentences ---------------------------------------------------------------------------------


def headline(comparison: Comparison) -> str:
    """The result in one sentence; bands of levels have their tables."""
    names = comparison.benchmarks
    whole = [name for name in names if name.rpartition("/")[0] not in names]
    parts = [_reading(comparison, benchmark) for benchmark in whole]
    sentence = "; ".join(part for part in parts if part)
    return f"{sentence[:1].upper()}{sentence[1:]}." if sentence else "No arms to compare."


def _reading(comparison: Comparison, benchmark: str) -> str:
    other = comparison.reference or BASE
    rivals = [label for label in comparison.labels if label not in (other, BASE)]
    if not rivals:  # only the reference was run: say what training did
        rivals, other = [label for label in comparison.labels if label != BASE], BASE
    pairs = [pair for label in rivals if (pair := comparison.pair(benchmark, label, other))]
    if not pairs:
        top = comparison.leaderboard(benchmark)[0]
        return f"on {benchmark}, {top['method']} answers {percent(top['accuracy'])} right"
    if all("note" in pair for pair in pairs):
        best = max(pairs, key=lambda pair: pair["delta"])
        return (
            f"on {benchmark}, {best['a']} scores {points(best['delta'])} against {other}, "
            f"but no verdict is given ({best['note']})"
        )
    said = []
    for verdict in ("better", "worse"):
        found = sorted(
            (p for p in pairs if p["verdict"] == verdict), key=lambda p: -abs(p["delta"])
        )
        if found:
            arms = listed(f"{p['a']} ({points(p['delta'])}, {span(p['ci95'])})" for p in found)
            said.append(f"{arms} {'is' if len(found) == 1 else 'are'} {verdict} than {other}")
    unknown = [p for p in pairs if p["verdict"] == "cannot tell"]
    if unknown:
        arms = listed(p["a"] for p in unknown)
        said.append(f"{arms} cannot be told from {other}{_detectable(unknown)}")
    return f"on {benchmark}, " + ", and ".join(said)


def held(solved: Solved, written: Sequence[Row]) -> str:
    """Which texts the page has."""
    drawn = int(solved.drawn.sum())
    if len(written) == drawn:
        return f"The texts of all {drawn:,} samples are in this page."
    problems = len({row["problem"] for row in written})
    return (
        f"This page has the texts of {len(written):,} of {drawn:,} samples, of {problems:,} of {len(solved.problems):,} problems: "
        "those on which the arms differ most. All are in samples/*.parquet."
    )


def _detectable(pairs: Sequence[Row]) -> str:
    sizes = [pair["mde"] for pair in pairs if pair.get("mde") is not None]
    if not sizes:
        return ""
    return f" (a difference of {100 * max(sizes):.1f} points would have shown)"


def conditions(comparison: Comparison) -> str:
    """What the verdicts rest on."""
    seeds = ", ".join(map(str, comparison.data_seeds))
    said = (
        f"Verdicts are conditional on the teacher's samples (data_seeds: {seeds}), which methods and training seeds share; "
        "another draw of them could move every number, and a suite with data_seeds: [0, 1] draws them again."
    )
    return " ".join([said, *_tuning(comparison), *_served(comparison)])


def _served(comparison: Comparison) -> Iterator[str]:
    """What a teacher behind a server read and cost, all students of an arm together; nothing where there was none."""
    arms = {row["method"]: row.get("ledger") or {} for row in comparison.summary.get("arms", ())}
    said = []
    for label, ledger in arms.items():
        amounts = []
        for column in ("charged", "spent"):
            mine = ledger.get(column, {})
            money = f" for {amount('cost', mine['cost'])}" if mine.get("cost") else ""
            amounts.append(f"{column} {amount('', mine.get('teacher_read', 0))}{money}")
        if any(ledger.get(column, {}).get("teacher_read") for column in ("charged", "spent")):
            said.append(f"{label} {', '.join(amounts)}")
    if said:
        yield (
            "The teacher is behind a server. Its prompt tokens, and what prompts and answers cost at the suite's prices, alone (charged) and "
            f"after sharing (spent): {'; '.join(said)}."
        )


def _tuning(comparison: Comparison) -> Iterator[str]:
    """How the arms came by their settings, where they were tuned."""
    tuned = comparison.summary.get("tuned")
    if not tuned:
        return
    arms = "; ".join(
        f"{label}: {', '.join(f'{name} {_brief(value)}' for name, value in each['params'].items())}"
        for label, each in tuned.items()
    )
    trials = ", ".join(sorted({str(each["trials"]) for each in tuned.values()}))
    flops = sum(each["ledger"]["charged"]["flops"] for each in tuned.values())
    yield (
        f"Arms are at the best setting of their sweep, {trials} trials each on dev problems ({amount('flops', flops)} FLOPs in all): "
        f"{arms}. Arms that are not named had nothing to tune."
    )


def _brief(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


HOW_TO_READ = (
    "Intervals are 95 %, from problems and training seeds; differences are paired by problem. p is adjusted by Holm's method within a "
    "benchmark, over the comparisons with the reference and with base; all others are exploratory and their p is not adjusted. "
    "“cannot tell” comes with the smallest true difference that this design would have found four times in five (at 5 %, before "
    "adjustment). A rank comes with those that no pair of arms rules out, at 5 % for all pairs together; “best” is how often the arm "
    "comes first among draws of what the accuracies may truly be. Costs are charged: what one student of the method would have cost alone."
)


def at_cost(comparison: Comparison, benchmark: str) -> str:
    """What the verdicts against the reference are worth at their cost, and which arms are on the Pareto set; or nothing."""
    other = comparison.reference or BASE
    found: dict[str, list[str]] = {}
    for label in comparison.labels:
        pair = comparison.pair(benchmark, label, other) if label != BASE else None
        if pair and pair.get("at_cost") not in (None, "cannot tell"):
            ratio = pair["cost_ratio"]
            said = [f"{ratio[k]:.2g} × the {n}" for k, n in COST_RATIO.items() if ratio[k]]
            found.setdefault(pair["at_cost"], []).append(
                f"{label} ({', '.join(said)})" if said else label
            )
    parts = [f"{what}: {listed(arms)}" for what, arms in found.items()]
    arms = [row for row in comparison.summary.get("arms", ()) if row["benchmark"] == benchmark]
    if not any("cost" in row for row in arms):
        return ""
    kept = [row["method"] for row in arms if row["cost"]["pareto"]]
    parts.append(f"beaten by none of at most its cost: {listed(kept)}")
    return f"Against {other} at its charged cost: {'; '.join(parts)}."


COST_RATIO = {"tokens": "tokens", "flops": "FLOPs"}


def single_sample(comparison: Comparison, benchmark: str) -> list[str]:
    """Exact tests of single checkpoints, where a pair has them."""
    said = []
    for pair in comparison.pairs(benchmark):
        if pair.get("exploratory"):
            continue
        if test := pair.get("mcnemar"):
            counts = f"{test['b']} problems only by {pair['a']}, {test['c']} only by {pair['b']}"
            said.append(f"{counts}: McNemar's exact p {p_value(test['p'])}")
        if test := pair.get("sign"):
            counts = (
                f"{test['wins']} problems better by {pair['a']}, {test['losses']} by {pair['b']}"
            )
            said.append(f"{counts}: sign test p {p_value(test['p'])}")
    return said


def verdict_class(pair: Row) -> str:
    """How a cell of the matrix looks."""
    name = pair["verdict"] if pair["verdict"] in ("better", "worse") else "unsure"
    return f"{name} exploratory" if pair.get("exploratory") else name


def marked(pair: Row) -> str:
    """▲ +3.2: the difference, with the verdict as a sign that needs no colour"""
    sign = {"better": "▲ ", "worse": "▼ "}.get(pair["verdict"], "")
    return sign + signed(pair["delta"])


# --- numbers in words --------------------------------------------------------------------------


def rank(row: Row) -> str:
    """2 (1–3), or 2 alone where no other is possible"""
    if row["rank"] is None:
        return "–"
    low, high = row["rank_ci95"]
    return f"{row['rank']}" if low == high else f"{row['rank']} ({low}\N{EN DASH}{high})"


def chance(p: float | None) -> str:
    """A probability without false digits."""
    if p is None:
        return "–"
    return "<1 %" if p < 0.01 else ">99 %" if p > 0.99 else f"{100 * p:.0f} %"


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def share(value: float) -> str:
    """A share of samples; a trace of them is not nothing."""
    return "0" if value == 0 else "<0.1 %" if value < 0.001 else percent(value)


def points(delta: float) -> str:
    """+3.2 points"""
    return f"{signed(delta)} points"


def signed(delta: float) -> str:
    text = f"{abs(100 * delta):.1f}"
    return text if text == "0.0" else ("+" if delta > 0 else MINUS) + text


def span(interval: Sequence[float]) -> str:
    """of a difference, in points: 1.1 to 5.3"""
    low, high = (f"{100 * v:.1f}".replace("-", MINUS) for v in interval)
    return f"{low} to {high}"


def p_value(p: float | None) -> str:
    if p is None:
        return "–"
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def scorecard(rows: Sequence[Row]) -> list[list[str]]:
    """Lines of text of a mechanism table: name, value, 95 % interval, cases, problems."""
    return [
        [
            row["name"],
            _score(row["kind"], row["value"]),
            _score_span(row["kind"], row["ci95"]),
            *("–" if row[count] is None else str(row[count]) for count in ("n", "problems")),
        ]
        for row in rows
    ]


def _score(kind: str, value: float | None) -> str:
    text = _plain(kind, value)
    return f"ECE {text}" if kind == "calibration" and value is not None else text


def _score_span(kind: str, interval: Sequence[float] | None) -> str:
    if interval is None:
        return "–"
    return span(interval) if kind == "mean" else " to ".join(_plain(kind, v) for v in interval)


def _plain(kind: str, value: float | None) -> str:
    if value is None:  # too few cases to say
        return "–"
    if kind == "correlation":
        return f"{value:.2f}".replace("-", MINUS)
    if kind == "mean":
        return percent(value)
    return format(value, ".3f" if kind in ("auc", "calibration") else ".4g")


def by_number(rows: Sequence[Row]) -> dict[tuple[str, str], dict[str, dict[int, Row]]]:
    """Rows called "PREFIX, level 3" or "PREFIX, K = 8", as {(kind, "level" or "K"): {prefix: {number: row}}}.

    Rows without a value are left out, and so is a prefix with fewer than two numbers.
    """
    groups: dict[tuple[str, str], dict[str, dict[int, Row]]] = {}
    for row in rows:
        named = re.fullmatch(r"(.+), (?:(level) |(K) = )(\d+)", row["name"])
        if named and row["value"] is not None:
            prefix, level, k, number = named.groups()
            lines = groups.setdefault((row["kind"], level or k), {})
            lines.setdefault(prefix, {})[int(number)] = row
    kept = {
        group: {prefix: dict(sorted(at.items())) for prefix, at in lines.items() if len(at) > 1}
        for group, lines in groups.items()
    }
    return {group: lines for group, lines in kept.items() if lines}


def sampled(how: Row) -> str:
    """n and decoding in words."""
    n, heat = how["n"], how["temperature"]
    parts = [f"avg@{n}" if n > 1 else "one sample a problem"]
    parts.append(f"temperature {heat:g}" if heat else "greedy")
    if heat:
        parts.append(f"top_p {how['top_p']:g}")
        parts += [f"top_k {how['top_k']}"] if how["top_k"] else []
    if how["max_tokens"]:
        parts.append(f"at most {how['max_tokens']} tokens")
    return ", ".join(parts)


def at_k(row: Row) -> str:
    """pass@k and maj@k of an arm: `pass@1 40.0 %, pass@4 70.0 %, maj@4 50.0 %`; maj@1 is the accuracy."""
    parts = [f"pass@{k} {percent(value)}" for k, value in row["pass_at_k"].items()]
    parts += [f"maj@{k} {percent(value)}" for k, value in row["maj_at_k"].items() if k != "1"]
    return ", ".join(parts)


def disputes(rows: Sequence[Row]) -> list[list[str]]:
    """Lines of the table of samples on which the extractors disagree."""
    return [
        [
            row["problem"],
            f"{row['method']}/{row['seed']}, sample {row['sample']}",
            "–" if row["extracted"] is None else row["extracted"],
            row["gold"] or "–",
            row["status"],
            row["second"],
        ]
        for row in rows
    ]


DISPUTED = ["problem", "by", "extracted", "gold answer", "math-verify", "second extractor"]


def amount(quantity: str, value: float) -> str:
    """12.3k tokens, 2.1e15 FLOPs, 84 s: without the unit where a column names it."""
    if not value:
        return "0"
    if quantity == "cost":
        return f"{value:.4g}"
    if quantity == "flops":
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    if quantity == "seconds":
        return (
            f"{value:.0f} s"
            if value < 600
            else f"{value / 60:.0f} min"
            if value < 36000
            else f"{value / 3600:.0f} h"
        )
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.0f}"


def listed(items: Iterable[str]) -> str:
    """a, b and c"""
    *head, last = items
    return f"{', '.join(head)} and {last}" if head else last


def facts(data: Any, name: str = "") -> list[tuple[str, str]]:
    """Nested plain data as (dotted key, text) lines; long lists by their length."""
    if isinstance(data, Mapping):
        return [line for key, value in _flat(data, name) for line in facts(value, key)]
    if isinstance(data, list):
        long = len(data) > 12 or any(isinstance(x, (list, Mapping)) for x in data)
        return [(name, f"{len(data)} entries" if long else ", ".join(map(str, data)) or "none")]
    if isinstance(data, float):
        return [(name, f"{data:.6g}")]
    return [(name, "none" if data is None else str(data))]


def is_histogram(value: Any) -> bool:
    return isinstance(value, Mapping) and {"edges", "counts"} <= set(value)


def over_runs(values: Sequence[Any]) -> str:
    """One note of several runs: the value they share, or mean and range, or the first of them."""
    numbers = [v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)]
    if numbers and len(numbers) == len(values) and len(set(numbers)) > 1:
        mean = sum(numbers) / len(numbers)
        return f"{mean:.4g} ({min(numbers):.4g} to {max(numbers):.4g} over {len(numbers)} runs)"
    ((_, text),) = facts(values[0])
    return text if all(v == values[0] for v in values) else f"{text} (first of {len(values)} runs)"
