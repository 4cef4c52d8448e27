"""What `sweep.json` says, in words, tables and charts: the best setting of each study against the suite's own."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich.console import Console
from rich.table import Table
from rich.text import Text

from harness.ledger import Ledger, total
from harness.report import formats, pages, plots, reading, screen
from harness.report.plots import Series, Spot, Style
from harness.report.reading import Comparison, Row

GREEK = {"alpha": "α", "beta": "β", "gamma": "γ", "lmbda": "λ", "tau": "τ"}
ENDED = ("complete", "pruned", "failed", "infeasible")
OWN = "the suite's own"  # setting
SETTING = ("parameter", OWN, "best", "importance", "searched")
CONFIRMED = ("benchmark", OWN, "95 %", "tuned", "95 %", "difference", "95 %", "tuned is", "p")
RANKS = ("method", "tuned", "95 %", OWN, "95 %", "on", "complete", "FLOPs", "time")
COST = ("", *reading.COSTS.values())
HOW_TO_READ = (
    "Trials see dev problems only, at a share of the budget. The dev accuracy of the best trial is biased upward, as it was chosen for being "
    "high: the confirmation is the number to quote, which trains both settings on fresh seeds at the full budget and judges them on the "
    "test benchmarks. Intervals are 95 %. The expected best of n is that of n of these trials drawn at random: where it is flat, further "
    "trials of this kind would gain little. Importances are shares of the variance of the accuracy that a model of these trials "
    "ascribes to each parameter; with few trials they are rough. A cost is charged (what a trial would cost alone) or spent (after "
    "sharing); trials that were pruned, failed or taken up again are in the totals."
)
SURFACE = "Linear between trials, their noise included; nothing is drawn outside them."

BEST, DEFAULT = Style("var(--c1)", 3, ""), Style("var(--c4)", 1, "")
TRIAL, PRUNED = Style("var(--c0)", 0, ""), Style("var(--base)", 0, "4 3")


@dataclass(frozen=True)
class Study:
    """One study of sweep.json."""

    row: Row

    @property
    def label(self) -> str:
        return str(self.row["label"])

    @property
    def trials(self) -> Sequence[Row]:
        return self.row["trials"]

    @property
    def complete(self) -> list[Row]:
        return [t for t in self.trials if t["state"] == "complete" and t["value"] is not None]

    @property
    def default(self) -> Row | None:
        """The trial of the suite's own setting, once it has an accuracy."""
        return next((t for t in self.complete if t.get("default")), None)

    @property
    def best(self) -> Row | None:
        found = self.row["best"]
        return found and next(t for t in self.trials if t["number"] == found["number"])

    @property
    def states(self) -> dict[str, int]:
        return dict(Counter(str(t["state"]) for t in self.trials))

    @property
    def confirmed(self) -> Comparison | None:
        """Default and tuned setting on the test benchmarks."""
        found = self.row["confirm"]
        return found and Comparison({"name": self.label, "protocol": {}, **found})

    def spent(self, *states: str) -> Ledger:
        """What the trials in these states cost."""
        mine = (t["ledger"] for t in self.trials if t["state"] in states and t["ledger"])
        return total(Ledger.from_dict(ledger) for ledger in mine)

    @property
    def lost(self) -> dict[str, float]:
        """What was done again because a worker was killed."""
        found: Counter[str] = Counter()
        for trial in self.trials:
            found.update(trial.get("lost") or {})
        return {name: amount for name, amount in found.items() if amount}


def studies(data: Row) -> list[Study]:
    return [Study(row) for row in data["studies"]]


def write(folder: Path) -> list[Path]:
    """Read a folder's `sweep.json`; write sweep.html and sweep.md there."""
    data = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
    texts = {"sweep.html": page(data), "sweep.md": markdown(data)}
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in texts]


# --- words -------------------------------------------------------------------------------------


def sentence(study: Study) -> str:
    """The result: the best setting, its dev accuracy beside that of the suite's own, and what the confirmation says."""
    ended = sum(study.states.get(state, 0) for state in ENDED)
    asked = study.row["trials_asked"]
    of = f"{ended} of {asked} trials" if ended < asked else _count(ended, "trial")
    start = f"Tuning {study.label} over {of}: "
    if study.best is None:
        return f"{start}none is complete ({states(study)}), so there is no best setting"
    value, default = reading.percent(study.best["value"]), study.default
    if study.best.get("default"):
        start += f"no setting did better on dev than {OWN}, {value}"
    else:
        params = study.best["params"]
        varied = {k: v for k, v in params.items() if _varies(study, k)} or params
        setting = ", ".join(f"{symbol(k)} {short(v)}" for k, v in varied.items())
        own = f"setting {reading.percent(default['value'])}" if default else "was not measured"
        start += f"{setting} gives {value} on dev, {OWN} {own}"
    return f"{start}; {_confirmed(study)}"


def _confirmed(study: Study) -> str:
    rows = [row for row in confirmation(study) if row["pair"]]
    if not rows and study.confirmed and study.best and study.best.get("default"):
        return "nothing to confirm"
    if not rows:
        return "not confirmed on fresh seeds"
    said = []
    for row in rows:
        pair = row["pair"]
        verdict = f"no verdict ({pair['note']})" if "note" in pair else pair["verdict"]
        said.append(
            f"{reading.points(pair['delta'])} ({reading.span(pair['ci95'])}) on {row['benchmark']}: {verdict}"
        )
    return "on fresh seeds and the test benchmarks the difference is " + "; ".join(said)


def confirmation(study: Study) -> list[dict[str, Any]]:
    """For each benchmark the arms of both settings, and their pair, said of the tuned one."""
    found = study.confirmed
    if found is None:
        return []
    labels = study.row["confirm"]["labels"]
    rows = []
    for name in found.benchmarks:
        arms = {row["method"]: row for row in found.leaderboard(name)}
        row = {side: arms.get(labels[side]) for side in ("default", "tuned")}
        pair = found.pair(name, labels["tuned"], labels["default"])
        rows.append({"benchmark": name, "pair": pair, **row})
    return rows


def states(study: Study) -> str:
    """9 complete, 2 pruned, 1 failed; 1 taken up again"""
    counts = study.states
    known = [*ENDED, *(state for state in counts if state not in ENDED)]
    found = [f"{counts[state]} {state}" for state in known if counts.get(state)]
    text = ", ".join(found) or "no trial yet"
    retried = sum(trial["tries"] > 1 for trial in study.trials)
    return text + (f"; {retried} taken up again after a worker's end" if retried else "")


def conditions(study: Study) -> str:
    """How the trials were made."""
    row = study.row
    dev = {name: n for name, n in row["dev"].items() if name != "dropped"}
    sets = ", ".join(f"{n} of {name}" for name, n in dev.items())
    if row["dev"].get("dropped"):
        sets += f"; {row['dev']['dropped']} dropped for overlap"
    budget = ", ".join(f"{k} {v}" for k, v in reading.facts(row["budget"]) if v != "none")
    return (
        f"{states(study)}. Sampler {row['sampler']}, pruner {row['pruner']}. Each trial: {budget} "
        f"({100 * row['share']:.3g} % of the budget), training {_count(len(row['seeds']), 'seed')} "
        f"({', '.join(map(str, row['seeds']))}), judged on dev ({sets})."
    )


def lost(study: Study) -> str:
    """What killed workers cost; empty if nothing."""
    if not study.lost:
        return ""
    said = [
        f"{reading.COSTS.get(name, name.replace('_', ' '))} {reading.amount(name, amount)}"
        for name, amount in study.lost.items()
    ]
    return f"Lost with killed workers and done again: {', '.join(said)}."


def symbol(name: str) -> str:
    """A field as charts and sentences call it: the last part of a dotted name, its letter if it has one."""
    last = name.rpartition(".")[2]
    return GREEK.get(last, last.replace("_", " "))


def short(value: Any) -> str:
    return f"{value:.3g}".replace("-", reading.MINUS) if isinstance(value, float) else str(value)


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" + ("s" if n != 1 else "")


def _range(space: Row) -> str:
    if "choices" in space:
        text = ", ".join(map(short, space["choices"]))
    else:
        text = f"{short(space['low'])} to {short(space['high'])}" + (", log" * space["log"])
    for name, values in (space.get("when") or {}).items():
        text += f"; where {name} is {' or '.join(map(short, values))}"
    return text


# --- tables ------------------------------------------------------------------------------------


def settings(study: Study) -> list[list[str]]:
    """One line a parameter: the suite's own value, the best one, its importance, what was searched."""
    best = study.row["best"] or {"params": {}}
    importance = study.row["importance"] or {}
    return [
        [
            name,
            *(
                short(at[name]) if name in at else "–"
                for at in (study.row["default"], best["params"])
            ),
            f"{100 * importance[name]:.0f} %" if name in importance else "–",
            _range(space),
        ]
        for name, space in study.row["space"].items()
    ]


def confirmed(study: Study) -> list[list[str]]:
    """One line a benchmark."""
    lines = []
    for row in confirmation(study):
        arms = [text for side in ("default", "tuned") for text in _accuracy(row[side])]
        pair = row["pair"]
        judged = ["–"] * 4
        if pair:
            p = pair["p"] if pair["p_holm"] is None else pair["p_holm"]
            judged = [reading.signed(pair["delta"]), reading.span(pair["ci95"])]
            judged += [pair["verdict"], reading.p_value(p)]
        lines.append([row["benchmark"], *arms, *judged])
    return lines


def notes(study: Study) -> list[str]:
    """What limits the verdicts of the confirmation."""
    pairs = [row["pair"] for row in confirmation(study) if row["pair"]]
    return list(dict.fromkeys(pair["note"] for pair in pairs if "note" in pair))


def _accuracy(row: Row | None) -> list[str]:
    if row is None:
        return ["–", "–"]
    return [reading.percent(row["accuracy"]), reading.span(row["ci95"]) if row["ci95"] else "–"]


def costs(study: Study) -> list[list[str]]:
    """What the trials cost, what of it went into those that did not end, and the confirmation."""
    row = study.row
    lines = [(f"all trials, {column}", row["ledger"][column]) for column in ("charged", "spent")]
    if unfinished := [s for s in study.states if s in ENDED and s != "complete"]:
        lines.append((f"of it {reading.listed(unfinished)}, spent", study.spent(*unfinished).spent))
    if study.lost:
        lines.append(("lost with killed workers", study.lost))
    if row["confirm"]:
        lines.append(("confirmation, spent", row["confirm"]["ledger"]["spent"]))
    return [
        [said, *(reading.amount(name, at.get(name, 0)) for name in reading.COSTS)]
        for said, at in lines
    ]


def trial_header(study: Study) -> list[str]:
    return ["trial", "state", *study.row["space"], "dev", "95 %", "time", "FLOPs", "reason"]


def trial_lines(study: Study) -> list[list[str]]:
    """One line a trial, the best first."""
    order = sorted(
        study.trials, key=lambda t: (t["state"] != "complete", -(t["value"] or 0), t["number"])
    )
    return [
        [
            str(trial["number"]) + _marks(study, trial),
            trial["state"] + (f", {trial['tries']} tries" if trial["tries"] > 1 else ""),
            *(short(trial["params"].get(name, "–")) for name in study.row["space"]),
            "–" if trial["value"] is None else reading.percent(trial["value"]),
            "–" if trial["ci95"] is None else reading.span(trial["ci95"]),
            "–" if trial["seconds"] is None else reading.amount("seconds", trial["seconds"]),
            "–"
            if not trial["ledger"]
            else reading.amount("flops", trial["ledger"]["charged"]["flops"]),
            trial["reason"] or _copied(trial),
        ]
        for trial in order
    ]


def _copied(trial: Row) -> str:
    """Why a trial cost nothing."""
    number = trial.get("same_as")
    return "" if number is None else f"the same setting as trial {number}"


def _marks(study: Study, trial: Row) -> str:
    marks = [OWN] * bool(trial.get("default")) + ["best"] * (trial is study.best)
    return f" ({', '.join(marks)})" if marks else ""


def leaderboard(data: Row) -> list[dict[str, Any]]:
    """Methods by the confirmed accuracy of their tuned setting, a mean over benchmarks; then, by dev, those without one."""
    rows = []
    for study in studies(data):
        found = [row for row in confirmation(study) if row["tuned"] and row["default"]]
        names = [row["benchmark"] for row in found]
        found = [r for r in found if r["benchmark"].rpartition("/")[0] not in names]  # no bands
        spent = study.row["ledger"]["spent"]
        row: dict[str, Any] = {"label": study.label, "spent": spent}
        row |= {"complete": len(study.complete), "trials": len(study.trials)}
        for side, trial in (("default", study.default), ("tuned", study.best)):
            if found:
                row[side] = {
                    "accuracy": sum(r[side]["accuracy"] for r in found) / len(found),
                    "ci95": found[0][side]["ci95"] if len(found) == 1 else None,
                }
            else:
                row[side] = trial and {"accuracy": trial["value"], "ci95": trial["ci95"]}
        row["on"] = [r["benchmark"] for r in found]
        row["benchmarks"] = found
        rows.append(row)
    return sorted(
        rows,
        key=lambda r: (not r["on"], -(r["tuned"]["accuracy"] if r["tuned"] else 0), r["label"]),
    )


def ranks(data: Row) -> list[list[str]]:
    """The leaderboard as text; a method with several benchmarks gets a line for their mean and one for each."""
    lines = []
    for row in leaderboard(data):
        on = (
            "dev, not confirmed"
            if not row["on"]
            else "mean"
            if len(row["on"]) > 1
            else row["on"][0]
        )
        cost = [reading.amount(name, row["spent"].get(name, 0)) for name in ("flops", "seconds")]
        arms = [*_accuracy(row["tuned"]), *_accuracy(row["default"])]
        done = f"{row['complete']} of {row['trials']}"
        lines.append([row["label"], *arms, on, done, *cost])
        if len(row["on"]) > 1:
            for each in row["benchmarks"]:
                arms = [*_accuracy(each["tuned"]), *_accuracy(each["default"])]
                lines.append(["", *arms, each["benchmark"], "", "", ""])
    return lines


# --- charts ------------------------------------------------------------------------------------


def best_of_n(study: Study) -> Markup | None:
    """Best so far as steps, the expected best of n random ones, and the default as a level."""
    rows = study.row["best_of_n"]
    if len(rows) < 2:
        return None
    steps: list[tuple[float, float]] = []
    for row in rows:
        steps += [(row["n"], steps[-1][1])] if steps else []
        steps.append((row["n"], row["best"]))
    expected = [(float(row["n"]), row["expected"]) for row in rows]
    series = [
        Series(
            "expected best of n of these", Style("var(--c2)", 0, "6 3"), expected, markers=False
        ),
        Series("best so far", TRIAL, steps, markers=False),
    ]
    level = (OWN, study.default["value"]) if study.default else None
    chart = plots.xy(
        "Best of n trials: dev accuracy",
        series,
        "trials",
        "",
        shares=True,
        whole_x=True,
        level=level,
    )
    return chart + plots.line_legend({s.name: s.style for s in series})


def surface(study: Study) -> Markup | None:
    """Accuracy over alpha and beta, else over the two numeric parameters that matter most."""
    names = surface_of(study)
    if names is None:
        return None
    first, second = names
    spots = [
        Spot(
            trial["params"][first],
            trial["params"][second],
            trial["value"] if trial["state"] == "complete" else None,
            f"trial {trial['number']}: {', '.join(f'{symbol(k)} {short(v)}' for k, v in trial['params'].items())}; "
            + _outcome(trial),
            best=trial is study.best,
            default=bool(trial.get("default")),
        )
        for trial in study.trials
        if trial["state"] in ("complete", "pruned") and {first, second} <= set(trial["params"])
    ]
    if not spots:
        return None
    others = [
        symbol(name) for name in study.row["space"] if name not in names and _varies(study, name)
    ]
    note = f"{SURFACE} Also varied: {reading.listed(others)}." if others else SURFACE
    x, y = (study.row["space"][name] for name in names)
    return plots.contour(
        f"Dev accuracy over {symbol(first)} and {symbol(second)}",
        spots,
        symbol(first),
        symbol(second),
        x_range=(x["low"], x["high"]),
        y_range=(y["low"], y["high"]),
        log_x=x["log"],
        log_y=y["log"],
        note=note,
    )


def surface_of(study: Study) -> tuple[str, str] | None:
    """The two parameters of the surface."""
    numeric = [name for name, space in study.row["space"].items() if "choices" not in space]
    if {"alpha", "beta"} <= set(numeric):
        return "alpha", "beta"
    importance = study.row["importance"] or {}
    varied = sorted(
        (name for name in numeric if _varies(study, name)), key=lambda n: -importance.get(n, 0)
    )
    return (varied[0], varied[1]) if len(varied) > 1 else None


def _varies(study: Study, name: str) -> bool:
    return len({json.dumps(t["params"][name]) for t in study.trials if name in t["params"]}) > 1


def _outcome(trial: Row) -> str:
    if trial["state"] == "complete":
        return reading.percent(trial["value"])
    last = trial["points"][-1] if trial["points"] else None
    said = f" at {100 * last['share']:.0f} % with {reading.percent(last['value'])}" if last else ""
    return trial["state"] + said


def each_parameter(study: Study) -> list[Markup]:
    """Accuracy over each parameter that varied."""
    return [
        chart
        for name, space in study.row["space"].items()
        if _varies(study, name) and (chart := _scatter(study, name, space))
    ]


def _scatter(study: Study, name: str, space: Row) -> Markup | None:
    found = [trial for trial in study.complete if name in trial["params"]]
    if not found:
        return None
    choices = list(space.get("choices", ()))

    def series(said: str, style: Style, trials: Iterable[Row]) -> Series:
        places = [
            (choices.index(t["params"][name]) if choices else t["params"][name], t["value"])
            for t in trials
        ]
        return Series(said, style, places, line=False)

    special = (study.best, study.default)
    rest = [t for t in found if all(t is not s for s in special)]
    drawn = [series("trial", TRIAL, rest)]
    if study.default in found:
        drawn.append(series(OWN, DEFAULT, [study.default]))
    if study.best in found:
        drawn.append(series("best", BEST, [study.best]))
    return plots.xy(
        symbol(name),
        drawn,
        "",
        "",
        shares=True,
        log_x=bool(space.get("log")),
        x_names=[short(choice) for choice in choices],
    )


def importances(study: Study) -> Markup | None:
    found = study.row["importance"]
    if not found:
        return None
    rows = sorted(found.items(), key=lambda item: -item[1])
    return plots.bars("Importance", [(symbol(name), value) for name, value in rows], TRIAL)


def on_the_way(study: Study) -> Markup | None:
    """Accuracy at evaluation points; a pruned trial ends early."""
    drawn: list[Series] = []
    order = sorted(study.trials, key=lambda t: (t is study.best, t["state"] == "complete"))
    for trial in order:
        points = [(100 * point["share"], point["value"]) for point in trial["points"]]
        if not points:
            continue
        if trial["state"] == "complete" and points[-1][0] < 100:
            points.append((100.0, trial["value"]))
        style = BEST if trial is study.best else TRIAL if trial["state"] == "complete" else PRUNED
        name = f"trial {trial['number']}"
        drawn.append(Series(name, style, points, markers=trial is study.best))
        if trial["state"] != "complete":
            drawn.append(Series(f"{name}, {trial['state']}", style, points[-1:], line=False))
    if not drawn:
        return None
    chart = plots.xy("Dev accuracy on the way", drawn, "% of a trial's budget", "", shares=True)
    used = {"complete": TRIAL, "best": BEST, "pruned, where it ended": PRUNED}
    return chart + plots.legend({n: s for n, s in used.items() if any(d.style == s for d in drawn)})


# --- formats -----------------------------------------------------------------------------------


def page(data: Row) -> str:
    """sweep.html: every study by itself, in one file."""
    return pages.render("sweep.html.j2", view(data))


def view(data: Row) -> dict[str, Any]:
    """What the templates show."""
    found = studies(data)
    return {
        "sweep": {
            "name": data["name"],
            "how_to_read": HOW_TO_READ,
            "ranks": [RANKS, ranks(data)] if len(found) > 1 else None,
            "environment": reading.facts(data["environment"]),
            "studies": [_view(study) for study in found],
        }
    }


def _view(study: Study) -> dict[str, Any]:
    scatter = {"trial": TRIAL, OWN: DEFAULT, "best": BEST}
    return {
        "label": study.label,
        "method": study.row["method"],
        "sentence": sentence(study),
        "conditions": conditions(study),
        "confirmed": [CONFIRMED, confirmed(study)],
        "seeds": _confirm_seeds(study),
        "notes": notes(study),
        "settings": [SETTING, settings(study)],
        "charts": [c for c in (best_of_n(study), surface(study)) if c],
        "each": each_parameter(study),
        "legend": plots.legend(scatter),
        "more": [c for c in (importances(study), on_the_way(study)) if c],
        "costs": [COST, costs(study)],
        "lost": lost(study),
        "trials": [trial_header(study), trial_lines(study)],
        "storage": f"Study {study.row['study']} in {study.row['storage']}.",
    }


def _confirm_seeds(study: Study) -> str:
    if not study.row["confirm"]:
        return ""
    return f"Training seeds {', '.join(map(str, study.row['confirm']['seeds']))}, the full budget, paired by problem."


def markdown(data: Row) -> str:
    """sweep.md: the studies, each up to its trials; tracking shows what stands before those."""
    found = studies(data)
    parts = [f"# {formats.md(data['name'])}: sweep"]
    if len(found) > 1:
        parts += ["## Methods", formats.table(RANKS, ranks(data))]
    for study in found:
        parts += [f"## Study: {formats.md(study.label)}", f"{formats.md(sentence(study))}."]
        if lines := confirmed(study):
            parts += [formats.table(CONFIRMED, lines), _confirm_seeds(study)]
            parts += [f"Note: {formats.md(note)}." for note in notes(study)]
        parts += [formats.table(SETTING, settings(study)), formats.md(conditions(study))]
        parts += [formats.table(COST, costs(study)), formats.md(lost(study))]
        parts += ["### Trials", formats.table(trial_header(study), trial_lines(study))]
        parts.append(formats.md(f"Study {study.row['study']} in {study.row['storage']}."))
    parts += ["## How to read it", HOW_TO_READ, "## Environment"]
    parts.append(formats.bullets(data["environment"]))
    return "\n\n".join(part for part in parts if part) + "\n"


def terminal(study: Row, console: Console | None = None) -> None:
    """Print a study's outcome in at most 100 columns."""
    found = Study(study)
    console, width = screen.fitted(console)
    console.print(Text(sentence(found) + ".", style="bold"), width=width)
    console.print(_table("", SETTING, settings(found)), width=width)
    if lines := confirmed(found):
        console.print(_table("\nConfirmation", CONFIRMED[:-1], lines, judged=7), width=width)
        for note in notes(found):
            console.print(Text(f"note: {note}"), width=width)
    console.print(_table("\nCosts", COST, costs(found)), width=width)
    console.print(Text(f"\n{conditions(found)}", style="dim"), width=width)


def board(data: Row, console: Console | None = None) -> None:
    """Print the leaderboard of several studies in at most 100 columns."""
    console, width = screen.fitted(console)
    console.print(_table(f"{data['name']}: methods, tuned", RANKS, ranks(data)), width=width)


def _table(
    title: str, header: Sequence[str], lines: Sequence[Sequence[str]], judged: int | None = None
) -> Table:
    heads = [head.replace(OWN, "suite's\nown") for head in header]
    table = screen.grid(title, heads[:1], heads[1:])
    table.columns[-1].no_wrap = False
    for line in lines:
        cells = [Text(text) for text in line[: len(heads)]]
        if judged is not None:
            cells[judged].stylize(screen.COLOURS.get(line[judged], ""))
        table.add_row(*cells)
    return table
