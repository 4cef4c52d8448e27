"""The report of a comparison: one HTML file that opens anywhere, Markdown, a LaTeX table, CSV, and the terminal's short form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich.console import Console
from rich.table import Table
from rich.text import Text

from harness.report import formats, pages, plots, reading, samples, screen, snr
from harness.report.plots import Series, Style
from harness.report.reading import BASE, Comparison

CHARGED = (  # its cost columns: what one student of a method would pay alone
    ("teacher\nwrote", "teacher_generated"),
    ("teacher\nscored", "teacher_scored"),
    ("student\nwrote", "student_generated"),
    ("\ntrained", "trained"),
    ("\nFLOPs", "flops"),
)
BINS = 150  # points of a training curve
GAP = 5  # pixels between lines of a scorecard, so that no interval hides another; together at most
SPREAD = 40
MOST_ARMS = 8  # of a matrix whose cells hold intervals too
MOST_PAIRS = 200  # exploratory ones that are listed besides
KINDS = {"mean": "share", "auc": "AUC", "calibration": "calibration error"}  # others as they are


def write(folder: Path) -> list[Path]:
    """Read a folder's `summary.json` and what lies beside it; write the report's files there."""
    comparison = reading.load(folder)
    texts = {
        "report.html": html(comparison),
        "report.md": formats.markdown(comparison),
        "table.tex": formats.latex(comparison),
        "cells.csv": formats.cells_csv(comparison),
        "pairs.csv": formats.pairs_csv(comparison),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8", newline="")
    return [folder / name for name in texts]


def html(comparison: Comparison) -> str:
    """The page, whole: style, charts, script and data are inside."""
    styles = {label: Style.of(comparison.index(label)) for label in comparison.labels}
    words: dict[str, Any] = {
        name: getattr(reading, name)
        for name in [
            "percent",
            "share",
            "signed",
            "span",
            "p_value",
            "amount",
            "facts",
            "over_runs",
            "scorecard",
            "is_histogram",
            "at_k",
            "at_cost",
            "rank",
            "chance",
            "single_sample",
            "disputes",
            "marked",
            "verdict_class",
        ]
    }
    words |= {"stage_line": formats.stage_line, "swatch": plots.swatch}
    values = {
        "comparison": comparison,
        "costs": reading.COSTS,
        "disputed_columns": reading.DISPUTED,
        "headline": reading.headline(comparison),
        "conditions": reading.conditions(comparison),
        "how_to_read": reading.HOW_TO_READ,
        "gained": reading.against_base(comparison),
        "subjects": {name: reading.by_group(comparison, name) for name in comparison.subjects},
        "styles": styles,
        "legend": plots.legend(styles),
        "charts": {
            name: [
                _forest(comparison, name, styles),
                _level_chart(comparison, name, styles),
                _cost_chart(comparison, name, styles),
            ]
            for name in comparison.benchmarks
        },
        "curves": {
            label: chart
            for label in comparison.labels
            if (chart := _curve_chart(comparison, label, styles[label]))
        },
        "histograms": {label: _histograms(comparison, label, styles[label]) for label in styles},
        "by_number": {label: _by_number(rows) for label, rows in comparison.mechanisms.items()},
        "reliability": {
            label: _reliability(rows, styles[label])
            for label, rows in comparison.mechanisms.items()
        },
        "most_arms": MOST_ARMS,
        "most_pairs": MOST_PAIRS,
        "browsed": _browsed(comparison),
        "snr": None,
    }
    if comparison.snr:
        values |= snr.view(comparison.snr)
    return pages.render("page.html.j2", values, words)


def _browsed(comparison: Comparison) -> dict[str, dict[str, Any]]:
    """Of each benchmark with samples: the table without a script, and what the script unpacks."""
    names = [name for name in comparison.benchmarks if name in comparison.samples.benchmarks]
    found = {}
    for name in names:
        solved = comparison.samples.solved(name, comparison.labels)
        written = comparison.samples.written(solved, samples.CHARACTERS // len(names))
        b = comparison.reference or BASE
        b = b if b in solved.arms else solved.arms[0]
        best = [row["method"] for row in comparison.leaderboard(name)]
        header, left, lines = reading.telling(solved, best, b)
        found[name] = {
            "header": [name, *header],
            "left": left,
            "lines": lines,
            "a": next((arm for arm in best if arm not in (b, BASE)), b),
            "b": b,
            "held": reading.held(solved, written),
            "problems": samples.packed(samples.problem_data(solved)),
            "traces": samples.packed(samples.trace_data(solved, written)),
        }
    return found


# --- charts ------------------------------------------------------------------------------------


def _forest(comparison: Comparison, benchmark: str, styles: Mapping[str, Style]) -> Markup:
    rows = comparison.leaderboard(benchmark)
    return plots.forest(
        f"{benchmark}: accuracy, 95 % intervals",
        [(r["method"], styles[r["method"]], r["accuracy"], tuple(r["ci95"])) for r in rows],
    )


def _level_chart(
    comparison: Comparison, benchmark: str, styles: Mapping[str, Style]
) -> Markup | None:
    found = comparison.levels.get(benchmark)
    if not found:
        return None
    series = [Series(label, styles[label], found[label]) for label in styles if label in found]
    return plots.xy(
        f"{benchmark}: accuracy by level", series, "level", "", shares=True, whole_x=True
    )


def _cost_chart(
    comparison: Comparison, benchmark: str, styles: Mapping[str, Style]
) -> Markup | None:
    """Accuracy over charged FLOPs, or trained tokens where no FLOPs were counted; base, which cost nothing, as a line.

    The arms of the Pareto set (`standing.add_costs`) are ringed.
    """
    rows = {row["method"]: row for row in comparison.leaderboard(benchmark)}
    quantity = "flops" if any(row["costs"]["flops"] for row in rows.values()) else "trained"
    paid = [rows[label] for label in styles if label in rows and rows[label]["costs"][quantity]]
    if not paid:
        return None
    costs = [row["costs"][quantity] for row in paid]
    ringed = [row["method"] for row in paid if row["pareto"]]
    series = [
        Series(
            row["method"],
            styles[row["method"]],
            [(row["costs"][quantity], row["accuracy"])],
            [tuple(row["ci95"])],
            line=False,
        )
        for row in paid
    ]
    return plots.xy(
        f"{benchmark}: accuracy against cost",
        series,
        "charged FLOPs" if quantity == "flops" else "trained tokens",
        "ringed: Pareto set" if ringed else "",
        shares=True,
        log_x=max(costs) > 8 * min(costs),
        level=(BASE, rows[BASE]["accuracy"]) if BASE in rows else None,
        ringed=ringed,
    )


def _curve_chart(comparison: Comparison, label: str, style: Style) -> Markup | None:
    """The loss of each seed; objectives differ between methods, so each has its own axis."""
    runs = [run for run in comparison.runs_of(label) if run.get("curve")]
    if not runs:
        return None
    series = [
        Series(f"seed {run['seed']}", style, thinned(run["curve"]), markers=False) for run in runs
    ]
    starts: dict[str, float] = {}
    for row in runs[0]["curve"]:
        starts.setdefault(str(row["stage"]), float(row["step"]))
    marks = [(step, name) for name, step in starts.items()] if len(starts) > 1 else []
    return plots.xy(f"{label}: loss", series, "step", "", marks=marks)


def thinned(curve: list[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """At most so many (step, loss), each the mean of a bin of equal length."""
    size = -(-len(curve) // BINS)
    bins = [curve[i : i + size] for i in range(0, len(curve), size)]
    return [
        (sum(r["step"] for r in rows) / len(rows), sum(r["loss"] for r in rows) / len(rows))
        for rows in bins
    ]


def _histograms(comparison: Comparison, label: str, style: Style) -> list[Markup]:
    """Those that the first run noted."""
    return [
        plots.histogram(f"{label}: {name}", values[0]["edges"], values[0]["counts"], style)
        for name, values in comparison.notes(label).items()
        if reading.is_histogram(values[0])
    ]


def _by_number(rows: Sequence[reading.Row]) -> list[Markup]:
    """The rows of a scorecard that differ by level or by K: a chart a kind, with its legend."""
    charts = []
    for (kind, axis), lines in reading.by_number(rows).items():
        styles = {prefix: Style.of(index) for index, prefix in enumerate(lines)}
        series = [
            Series(
                prefix,
                styles[prefix],
                [(number, row["value"]) for number, row in at.items()],
                [tuple(row["ci95"] or (row["value"], row["value"])) for row in at.values()],
                shift=min(GAP, SPREAD / len(lines)) * (index - (len(lines) - 1) / 2),
            )
            for index, (prefix, at) in enumerate(lines.items())
        ]
        values = [value for s in series for _, value in s.points]
        numbers = [number for s in series for number, _ in s.points]
        chart = plots.xy(
            f"{KINDS.get(kind, kind)} by {axis}",
            series,
            axis,
            "",
            shares=kind == "mean" and min(values) >= 0 and max(values) <= 1,
            log_x=axis == "K" and 0 < 4 * min(numbers) < max(numbers),
            whole_x=True,
        )
        charts.append(chart + plots.legend(styles))
    return charts


def _reliability(rows: Sequence[reading.Row], style: Style) -> list[Markup]:
    return [
        plots.reliability(
            row["name"], f"ECE {row['value']:.3f}, n = {row['n']}", row["bins"], style
        )
        for row in rows
        if row["kind"] == "calibration" and row["value"] is not None
    ]


# --- the terminal ------------------------------------------------------------------------------


def terminal(summary: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the result, the leaderboards and the verdicts, in at most 100 columns."""
    comparison = Comparison(summary)
    console, width = screen.fitted(console)
    console.print(Text(reading.headline(comparison), style="bold"), width=width)
    for benchmark in comparison.benchmarks:
        console.print(_board(comparison, benchmark), width=width)
        for row in comparison.leaderboard(benchmark):
            if row["pass_at_k"]:
                console.print(Text(f"{row['method']}: {reading.at_k(row)}"), width=width)
        if said := comparison.disputed(benchmark):
            console.print(Text(said), width=width)
        pairs = [pair for pair in comparison.pairs(benchmark) if not pair.get("exploratory")]
        if pairs:
            console.print(_pairs(pairs), width=width)
        for note in dict.fromkeys(pair["note"] for pair in pairs if "note" in pair):
            console.print(Text(f"note: {note}"), width=width)
    console.print(Text(reading.conditions(comparison), style="dim"), width=width)


def _board(comparison: Comparison, benchmark: str) -> Table:
    how = comparison.sampled(benchmark)
    table = screen.grid(
        f"\n{benchmark}" + (f" ({how})" if how else ""),
        ["method"],
        ["accuracy", "95 %", "trun-\ncated", "un-\nparsed", *(head for head, _ in CHARGED)],
    )
    for row in comparison.leaderboard(benchmark):
        mark = " (reference)" if row["method"] == comparison.reference else ""
        table.add_row(
            Text(row["method"] + mark),
            reading.percent(row["accuracy"]),
            reading.span(row["ci95"]),
            reading.share(row["truncated"]),
            reading.share(row["unparsed"]),
            *(reading.amount(quantity, row["costs"][quantity]) for _, quantity in CHARGED),
        )
    return table


def _pairs(pairs: list[Mapping[str, Any]]) -> Table:
    table = screen.grid("", ["a", "is", "than b"], ["difference", "95 %", "p (Holm)", "detectable"])
    table.columns[1].no_wrap = True
    for pair in pairs:
        table.add_row(
            Text(pair["a"]),
            Text(pair["verdict"], style=screen.COLOURS.get(pair["verdict"], "")),
            Text(pair["b"]),
            reading.signed(pair["delta"]),
            reading.span(pair["ci95"]),
            reading.p_value(pair["p_holm"]),
            "" if pair["mde"] is None else f"{100 * pair['mde']:.1f}",
        )
    return table
