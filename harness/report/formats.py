"""The same comparison as Markdown, as a LaTeX table, and as CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from harness.report import snr
from harness.report.reading import (
    COSTS,
    DISPUTED,
    HOW_TO_READ,
    Comparison,
    against_base,
    amount,
    at_cost,
    at_k,
    by_group,
    chance,
    conditions,
    disputes,
    facts,
    headline,
    is_histogram,
    listed,
    over_runs,
    p_value,
    percent,
    rank,
    scorecard,
    share,
    signed,
    single_sample,
    span,
)


def markdown(comparison: Comparison) -> str:
    """report.md: the result, then leaderboards, verdicts, what the methods did, and the conditions."""
    parts = [f"# {md(comparison.name)}", md(headline(comparison))]
    for benchmark in comparison.benchmarks:
        parts += [f"## Leaderboard: {md(benchmark)}", md(comparison.sampled(benchmark))]
        parts += [_leaderboard(comparison, benchmark), _at_k(comparison, benchmark)]
        parts.append(md(at_cost(comparison, benchmark)))
    for benchmark in comparison.benchmarks:
        parts += [f"## Verdicts: {md(benchmark)}", _verdicts(comparison.pairs(benchmark))]
        parts.append("\n".join(f"- {md(s)}" for s in single_sample(comparison, benchmark)))
    parts.append(HOW_TO_READ)
    header, lines = against_base(comparison)
    if lines:
        parts += ["## Gained and lost", table(header, lines)]
    if comparison.levels:
        parts.append("## Accuracy by level")
        parts += [_groups(comparison, name, "level ") for name in comparison.levels]
    if comparison.subjects:
        parts.append("## Accuracy by subject")
        parts += [_groups(comparison, name) for name in comparison.subjects]
    if comparison.runs:
        parts.append("## What each method did")
        parts += [
            _did(comparison, label) for label in comparison.labels if comparison.runs_of(label)
        ]
    if comparison.mechanisms:
        parts.append("## Mechanisms")
        parts += [_mechanisms(label, rows) for label, rows in comparison.mechanisms.items()]
    if any(comparison.disputed(name) for name in comparison.benchmarks):
        parts.append("## Where the extractors disagree")
        parts += _disputes(comparison)
    if comparison.snr:
        parts += ["## Signal-to-noise by pass rate", *_snr(comparison.snr)]
    if comparison.summary.get("contamination"):
        parts += ["## Contamination", bullets(comparison.summary["contamination"])]
    parts += [
        "## Conditions",
        conditions(comparison),
        bullets({"protocol": comparison.summary["protocol"]}),
        bullets({"environment": comparison.summary["environment"]}),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _leaderboard(comparison: Comparison, benchmark: str) -> str:
    other = comparison.reference or "base"
    header = [
        "method",
        "accuracy",
        "95 % interval",
        f"against {other}",
        "rank",
        "best",
        "truncated",
        "unparsed",
        *COSTS.values(),
    ]
    rows = [
        [
            row["method"] + (" (reference)" if row["method"] == comparison.reference else ""),
            percent(row["accuracy"]),
            span(row["ci95"]),
            f"{signed(pair['delta'])}, {pair['verdict']}" if (pair := row["pair"]) else "",
            rank(row),
            chance(row["p_best"]),
            share(row["truncated"]),
            share(row["unparsed"]),
            *(amount(quantity, row["costs"][quantity]) for quantity in COSTS),
        ]
        for row in comparison.leaderboard(benchmark)
    ]
    return table(header, rows)


def _at_k(comparison: Comparison, benchmark: str) -> str:
    rows = [row for row in comparison.leaderboard(benchmark) if row["pass_at_k"]]
    return "\n".join(f"- {md(row['method'])}: {at_k(row)}" for row in rows)


def _disputes(comparison: Comparison) -> list[str]:
    parts = []
    for name in comparison.benchmarks:
        if said := comparison.disputed(name):
            parts.append(f"**{md(name)}.** {md(said)}")
        if rows := comparison.disputes.get(name):
            parts.append(table(DISPUTED, disputes(rows)))
    return parts


def _verdicts(pairs: Sequence[Mapping[str, Any]]) -> str:
    header = ["a", "b", "a is", "difference", "95 % interval", "p", "p (Holm)", "detectable"]
    rows = [
        [
            pair["a"],
            pair["b"],
            pair["verdict"] + (" (exploratory)" if pair.get("exploratory") else ""),
            signed(pair["delta"]),
            span(pair["ci95"]),
            p_value(pair["p"]),
            p_value(pair["p_holm"]),
            "" if pair["mde"] is None else f"{100 * pair['mde']:.1f}",
        ]
        for pair in pairs
    ]
    notes = dict.fromkeys(pair["note"] for pair in pairs if "note" in pair)
    return "\n\n".join([table(header, rows), *(f"Note: {md(note)}." for note in notes)])


def _groups(comparison: Comparison, benchmark: str, prefix: str = "") -> str:
    return table(*by_group(comparison, benchmark, prefix))


def _did(comparison: Comparison, label: str) -> str:
    run = comparison.runs_of(label)[0]
    fields = ", ".join(f"{key} = {value}" for key, value in facts(run.get("config") or {}))
    lines = [f"**{md(label)}** ({md(run['method'])}{md('; ' + fields) if fields else ''}): "]
    lines[0] += md(listed(stage_line(stage) for stage in run["stages"])) + "."
    if purposes := comparison.purposes(label):
        lines.append(f"- {md(purposes)}")
    for name, values in comparison.notes(label).items():
        said = "a histogram, see report.html" if is_histogram(values[0]) else over_runs(values)
        lines.append(f"- {md(name)}: {md(said)}")
    return lines[0] + "\n\n" + "\n".join(lines[1:])


def _mechanisms(label: str, rows: Sequence[Mapping[str, Any]]) -> str:
    header = [label, "value", "95 % interval", "cases", "problems"]
    return table(header, scorecard(rows))


def _snr(found: Mapping[str, Any]) -> list[str]:
    parts = ["\n".join(f"- {md(line)}." for line in snr.sentences(found))]
    parts.append(md(f"{snr.conditions(found)} {snr.MEANING}"))
    for name, loss in found["losses"].items():
        parts += [f"**{md(name)}**", table(snr.HEADER, snr.table(loss))]
        parts.append(table(snr.EXPONENTS, snr.exponents(loss)))
        if rows := snr.kernels(loss):
            parts += [table(snr.KERNELS, rows), f"{snr.fed_back(loss)}."]
    return parts


def stage_line(stage: Mapping[str, Any]) -> str:
    """forward: 250 steps of forward_kl on 4000 examples"""
    return f"{stage['name']}: {stage.get('steps', 0)} steps of {stage.get('objective', '?')} on {stage.get('examples', 0)} examples"


def bullets(data: Mapping[str, Any]) -> str:
    return "\n".join(f"- {md(key)}: {md(text)}" for key, text in facts(data))


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, *rows]
    body = ["| " + " | ".join(md(cell) for cell in line) + " |" for line in lines]
    return "\n".join([body[0], "|" + " --- |" * len(header), *body[1:]])


def md(text: str) -> str:
    """One line of text that Markdown shows as it is."""
    text = text.replace("\\", "\\\\")
    text = re.sub(r"(?<!\w)_|_(?!\w)", r"\_", text)  # inside a word it means nothing
    for character in "`*[]<>|#":
        text = text.replace(character, "&lt;" if character == "<" else "\\" + character)
    return " ".join(text.split())


# --- LaTeX -------------------------------------------------------------------------------------


def latex(comparison: Comparison) -> str:
    """table.tex: methods by benchmarks, with booktabs; a dagger where a verdict against the reference was given."""
    names = comparison.benchmarks
    other = comparison.reference or "base"
    boards = {name: {row["method"]: row for row in comparison.leaderboard(name)} for name in names}
    ranked = [name for name in names if any(row["rank"] for row in boards[name].values())]
    heads = [f"\\multicolumn{{2}}{{c}}{{{_tex(n)}}}" if n in ranked else _tex(n) for n in names]
    said = "; ranks with those that no pair of arms rules out" if ranked else ""
    lines = [
        "% needs \\usepackage{booktabs}",
        "\\begin{table}[t]",
        "  \\centering",
        f"  \\caption{{{_tex(headline(comparison))} Accuracy in \\% with 95\\,\\% intervals{said}; "
        f"$\\uparrow$ better and $\\downarrow$ worse than {_tex(other)}.}}",
        f"  \\label{{tab:{''.join(c if c.isalnum() else '-' for c in comparison.name)}}}",
        f"  \\begin{{tabular}}{{l{''.join('cc' if name in ranked else 'c' for name in names)}r}}",
        "    \\toprule",
        f"    & {' & '.join(heads)} & \\\\",
        f"    Method & {' & '.join('accuracy & rank' if n in ranked else 'accuracy' for n in names)} & FLOPs \\\\",
        "    \\midrule",
    ]
    for label in comparison.labels:
        cells = [_tex_cell(boards[name].get(label), name in ranked) for name in names]
        costs = next(board[label]["costs"] for board in boards.values() if label in board)
        lines.append(
            f"    {_tex(label)} & {' & '.join(cells)} & {_tex(amount('flops', costs['flops']))} \\\\"
        )
    lines += ["    \\bottomrule", "  \\end{tabular}", "\\end{table}"]
    return "\n".join(lines) + "\n"


def _tex_cell(row: Mapping[str, Any] | None, ranked: bool) -> str:
    if row is None:
        return "-- & --" if ranked else "--"
    arrow = {"better": "$^{\\uparrow}$", "worse": "$^{\\downarrow}$"}
    sign = arrow.get(row["pair"]["verdict"], "") if row["pair"] else ""
    low, high = (f"{100 * v:.1f}" for v in row["ci95"])
    cell = f"{100 * row['accuracy']:.1f}{sign} {{\\scriptsize [{low}, {high}]}}"
    return f"{cell} & {_tex(rank(row))}" if ranked else cell


TEX = {
    "\\": "\\textbackslash{}",
    "~": "\\textasciitilde{}",
    "^": "\\textasciicircum{}",
    "\N{MINUS SIGN}": "$-$",
    "\N{EN DASH}": "--",
    "\N{LEFT DOUBLE QUOTATION MARK}": "``",
    "\N{RIGHT DOUBLE QUOTATION MARK}": "''",
    "<": "$<$",
    ">": "$>$",
    "|": "\\textbar{}",
    "*": "{*}",  # after the end of a row it would be a command's, as would a bracket
    "[": "{[}",
    "]": "{]}",
    **{c: f"\\{c}" for c in "&%$#_{}"},
}


def _tex(text: str) -> str:
    return "".join(TEX.get(character, character) for character in text)


# --- CSV ---------------------------------------------------------------------------------------

CELL = ("benchmark", "method", "seed", "data_seed", "n_problems", "n_samples", "accuracy")
PAIR = ("benchmark", "a", "b", "family", "exploratory", "verdict", "delta")
P_VALUES = ("p", "p_holm", "p_all", "mde", "at_cost")
INTERVAL = ("ci95_low", "ci95_high")


def cells_csv(comparison: Comparison) -> str:
    """cells.csv: one line a benchmark and trained student, with what it was charged; docs/report.md names the columns."""
    rows = []
    for cell in comparison.summary["cells"]:
        ledger = cell.get("ledger") or {}
        charged = ledger.get("charged", ledger)
        cut = [cell.get("truncated", 0), cell.get("unparsed", 0)]
        costs = [charged.get(name, 0) for name in COSTS]
        rows.append([*(cell.get(k) for k in CELL), *cell["ci95"], *cut, *costs])
    header = [*CELL, *INTERVAL, "truncated", "unparsed", *(f"charged_{name}" for name in COSTS)]
    return _csv(header, rows)


def pairs_csv(comparison: Comparison) -> str:
    """pairs.csv: one line a benchmark and pair of arms."""
    rows = []
    for pair in comparison.summary["pairs"]:
        ratio = pair.get("cost_ratio") or {}
        more = [*(pair.get(name) for name in P_VALUES), ratio.get("tokens"), ratio.get("flops")]
        rows.append([*(pair.get(k) for k in PAIR), *pair["ci95"], *more])
    header = [*PAIR, *INTERVAL, *P_VALUES, "cost_ratio_tokens", "cost_ratio_flops"]
    return _csv(header, rows)


def _csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """What is not known is empty."""
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([header, *rows])
    return file.getvalue()
