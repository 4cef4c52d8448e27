"""The report: what it must contain, on plausible made-up results."""

from __future__ import annotations

import html
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from harness import report, standing, statistics
from harness.report import formats, plots, reading
from harness.report.plots import Scale, Style

LEVELS = 6
# label -> (method, shift of skill by level, cost factor)
ARMS = {
    "sft": ("sft", 0.0, 1.0),
    "paced": ("paced", 0.2, 1.6),
    "heal": ("heal", 0.02, 2.4),
    "limo": ("limo", -0.17, 0.4),
    "<script>alert(1)</script>|x_y": ("vcrd", 0.01, 3.1),
}


def example(
    folder: Path,
    *,
    seeds: int = 3,
    problems: int = 240,
    arms: list[str] | None = None,
    steps: int = 60,
) -> Path:
    """Write a comparison as harness.compare does; the numbers are made up."""
    rng = np.random.default_rng(0)
    labels = ["base", *(arms or ARMS)]
    records = []
    for benchmark, harder in (("micro_math", 0.0), ("micro_code", 0.15)):
        ease = rng.beta(2, 2, problems)
        for label in labels:
            for seed in range(1 if label == "base" else seeds):
                shift = -0.35 if label == "base" else ARMS[label][1] + 0.015 * rng.standard_normal()
                for p in range(problems):
                    level = 1 + p % LEVELS
                    rate = 0.95 - 0.14 * level + shift - harder + 0.3 * (ease[p] - 0.5)
                    correct = bool(rng.random() < rate)
                    cut = not correct and rng.random() < 0.06
                    records.append(
                        {
                            "benchmark": benchmark,
                            "method": label,
                            "seed": seed,
                            "data_seed": 0,
                            "problem": f"{benchmark}/{p}",
                            "sample": 0,
                            "correct": correct,
                            "status": "ok" if correct else "unparsed" if cut else "wrong",
                            "extracted": "4" if correct else None,
                            "text": "</script><script>alert(2)</script>",
                            "tokens": 40,
                            "truncated": cut and rng.random() < 0.5,
                            "level": level if benchmark == "micro_math" else None,
                            "subject": ("Algebra", "Geometry")[level % 2]
                            if benchmark == "micro_math"
                            else None,
                            "domain": "math",
                        }
                    )
    judged = statistics.summarise_records(records, "sft")
    (folder / "samples").mkdir(parents=True)
    for benchmark in ("micro_math", "micro_code"):
        rows = [row for row in records if row["benchmark"] == benchmark]
        pq.write_table(pa.Table.from_pylist(rows), folder / "samples" / f"{benchmark}.parquet")
    total = {"charged": dict.fromkeys(QUANTITIES, 0.0), "spent": dict.fromkeys(QUANTITIES, 0.0)}
    for index, label in enumerate(labels[1:]):
        for seed in range(seeds):
            run = example_run(label, seed, steps, index)
            path = folder / "runs" / f"arm{index}" / str(seed) / "run.json"
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps(run))
            for cell in judged.cells:
                if (cell["method"], cell["seed"]) == (label, seed):
                    cell["ledger"] = run["ledger"]
            for column in total:
                for name in QUANTITIES:
                    total[column][name] += run["ledger"][column][name]
    ledgers = {cell["method"]: cell.get("ledger") for cell in judged.cells}
    for arm in judged.arms:
        charged = (ledgers[arm["method"]] or {"charged": dict.fromkeys(QUANTITIES, 0)})["charged"]
        arm["ledger"] = {"charged": {k: arm["seeds"] * v for k, v in charged.items()}}
    standing.add_costs(judged.arms, judged.pairs)
    for cell in judged.cells:
        cell.setdefault("ledger", {"charged": dict.fromkeys(QUANTITIES, 0), "spent": {}})
    summary = {
        "name": "paced-frontier",
        "protocol": {
            "benchmarks": {
                "micro_math": {"template": "{prompt}\n<b>think</b>", "sampling": {"n": 1}}
            },
            "engine": {"backend": "harness.models.hf", "torch": "2.13.0"},
            "hash": "5f0c2a91",
        },
        "config": {"name": "paced-frontier", "student": "micro/student", "teacher": "micro/teacher"}
        | {"data_seeds": [0], "seeds": seeds, "reference": "sft", "budget": {"steps": steps}},
        "config_hash": "c0ffee42",
        "contamination": {
            "loaded": 4000,
            "kept": 3988,
            "rule": "half",
            "dropped": 12,
            "benchmarks": {"micro_math": {"exact": 5, "half": 12, "any": 310}},
            "dropped_ids": [f"p{i}" for i in range(20)],
        },
        "cells": judged.cells,
        "arms": judged.arms,
        "pairs": judged.pairs,
        "ledger": total,
        "environment": {"python": "3.11", "commit": "abc1234", "version": "0.1.0", "gpu": None},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


QUANTITIES = [
    "teacher_generated",
    "teacher_scored",
    "student_generated",
    "trained",
    "verifier_calls",
    "steps",
    "seconds",
    "flops",
]


def example_run(label: str, seed: int, steps: int, index: int) -> dict:
    rng = np.random.default_rng(100 * index + seed)
    method, _, factor = ARMS[label]
    halves = [("forward", steps // 2), ("reverse", steps - steps // 2)]
    stages = halves if method == "paced" else [("main", steps)]
    curve = [
        {
            "step": step + 1,
            "stage": stages[0][0] if step < stages[0][1] else stages[-1][0],
            "loss": float(
                (1 + index) * (0.2 + np.exp(-step / 15)) * (1 + 0.05 * rng.standard_normal())
            ),
            "lr": 1e-3 * (1 - step / steps),
            "tokens": 2048 + seed,
        }
        for step in range(steps)
    ]
    trained = 2048.0 * steps
    charged = {
        "teacher_generated": 3.2e5 * factor,
        "teacher_scored": 1.1e5 if method == "paced" else 0.0,
        "student_generated": 4.5e4 * (method != "sft"),
        "trained": trained,
        "verifier_calls": 4000.0,
        "steps": float(steps),
        "seconds": 71.0 * factor + seed,
        "flops": 2.4e12 * factor,
    }
    notes = {"references": {"kept": 3600 + seed, "no verified response": 388 - seed}}
    if method == "paced":
        notes["weights"] = {"edges": [0, 0.25, 0.5, 0.75, 1.0], "counts": [400, 900, 2100, 600]}
    return {
        "method": method,
        "label": label,
        "seed": seed,
        "data_seed": 0,
        "config": {"alpha": 1.0, "beta": 2.0} if method == "paced" else {},
        "stages": [
            {
                "name": name,
                "steps": n,
                "examples": 3600,
                "share": n / steps,
                "objective": "forward_kl",
            }
            for name, n in stages
        ],
        "notes": notes,
        "curve": curve,
        "ledger": {"charged": charged, "spent": {**charged, "teacher_generated": 1e5}},
    }


class Page(HTMLParser):
    """Tables as lists of rows, and every tag, attribute and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in {"meta", "path", "rect", "br", "input"}:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in {"td", "th"}:
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        if tag not in {"meta", "path", "rect", "br", "input"}:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if {"td", "th"} & set(self.open) and "title" not in self.open:
            row = self.tables[-1][-1]
            row[-1] = " ".join(f"{row[-1]} {data}".split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return example(tmp_path_factory.mktemp("results") / "paced-frontier")


@pytest.fixture(scope="module")
def written(folder):
    return {path.name: path.read_text(encoding="utf-8") for path in report.write(folder)}


@pytest.fixture(scope="module")
def page(written):
    return Page(written["report.html"])


@pytest.fixture(scope="module")
def comparison(folder):
    return reading.load(folder)


def test_leaderboard_shows_accuracy_and_charged_costs(page, comparison):
    board = page.tables[0]
    rows = {row[0].removesuffix(" reference"): row for row in board[2:]}
    arms = {r["method"]: r for r in comparison.summary["arms"] if r["benchmark"] == "micro_math"}
    assert rows.keys() == arms.keys()
    assert rows["paced"][1] == f"{100 * arms['paced']['accuracy']:.1f} %"
    assert rows["paced"][3].endswith("better")
    # teacher generated 3.2e5 x 1.6, scored, student generated, trained 60 x 2048, FLOPs, mean seconds
    assert rows["paced"][8:] == ["512k", "110k", "45k", "123k", "3.8e12", "115 s"]
    assert rows["base"][8:] == ["0"] * 6
    low, high = arms["sft"]["rank_ci95"]
    assert rows["sft"][4] == (f"{low}" if low == high else f"{arms['sft']['rank']} ({low}–{high})")
    assert rows["paced"][5] == reading.chance(arms["paced"]["p_best"])
    means = [float(row[1].removesuffix(" %")) for row in board[2:]]
    assert means == sorted(means, reverse=True)


def test_the_headline_is_of_whole_benchmarks(comparison):
    summary = json.loads(json.dumps(comparison.summary))
    for rows in (summary["cells"], summary["pairs"]):
        rows += [
            {**r, "benchmark": "micro_math/easy"} for r in rows if r["benchmark"] == "micro_math"
        ]
    banded = reading.Comparison(summary)
    assert "micro_math/easy" in banded.benchmarks
    assert reading.headline(banded) == reading.headline(reading.Comparison(comparison.summary))


def test_accuracy_by_subject_is_a_table(written, comparison):
    header, lines = reading.by_group(comparison, "micro_math")
    assert header == ["micro_math", "Algebra", "Geometry"] and len(lines) == len(comparison.labels)
    assert set(comparison.subjects) == {"micro_math"}  # the other says none
    by_level = dict(comparison.levels["micro_math"]["sft"])
    algebra = dict(comparison.subjects["micro_math"]["sft"])["Algebra"]
    even = [by_level[level] for level in by_level if level % 2 == 0]
    assert min(even) <= algebra <= max(even)
    assert (
        "By subject" in written["report.html"] and "## Accuracy by subject" in written["report.md"]
    )
    assert lines[0][1] in written["report.md"]


def test_gains_and_losses_against_the_untrained_student_stand_in_one_table(written, comparison):
    header, lines = reading.against_base(comparison)
    assert header[1:] == comparison.benchmarks and len(lines) == len(comparison.labels) - 1
    pair = comparison.pair("micro_code", lines[0][0], "base")
    place = header.index("micro_code")
    assert lines[0][place].startswith(f"{reading.signed(pair['delta'])} (")
    assert lines[0][place].endswith(pair["verdict"])
    for name in ("report.html", "report.md"):
        assert "Gained and lost" in written[name] and lines[0][place] in written[name]


def test_matrix_says_every_pair_from_both_sides(page, comparison):
    matrix = page.tables[1]
    labels = comparison.labels
    assert matrix[0][1:] == labels
    cell = {
        (row[0], b): text for row in matrix[1:] for b, text in zip(labels, row[1:], strict=True)
    }
    assert cell["paced", "sft"].startswith("▲ +")
    assert cell["sft", "paced"].startswith("▼ " + reading.MINUS)
    assert "detectable" in cell["heal", "sft"]
    assert "exploratory" in cell["paced", "limo"]
    assert cell["sft", "sft"] == "·"


def test_verdict_rows_carry_all_numbers(page, comparison):
    row = next(row for row in page.tables[2] if row[:3] == ["heal", "cannot tell", "sft"])
    pair = comparison.pair("micro_math", "heal", "sft")
    assert row[3] == reading.signed(pair["delta"])
    assert row[4] == reading.span(pair["ci95"])
    assert row[5:] == [f"{pair['p']:.3f}", f"{pair['p_holm']:.3f}", f"{100 * pair['mde']:.1f}"]


def test_page_is_one_file_that_opens_offline(written, page):
    assert {"link", "img", "iframe"}.isdisjoint(page.tags)
    assert not [v for k, v in page.attributes if k in {"src", "xlink:href"}]
    assert all(v.startswith("#") for k, v in page.attributes if k == "href")
    assert "url(" not in written["report.html"]
    assert "://" not in written["report.html"]
    assert page.open == []


def test_page_escapes_what_others_wrote(written, page):
    assert page.tags.count("script") == 1 + 2 * 2  # test_page.py says what is in them
    assert "<script>alert" not in written["report.html"]
    assert "&lt;script&gt;alert(1)" in written["report.html"]
    assert "<b>think" not in written["report.html"]
    assert any("<script>alert(1)</script>|x_y" in text for text in page.text)


def test_page_draws_every_chart(written, page):
    labels = [v for k, v in page.attributes if k == "aria-label"]
    for wanted in (
        "micro_math: accuracy, 95 % intervals",
        "micro_math: accuracy by level",
        "micro_code: accuracy against cost",
        "paced: loss",
        "paced: weights",
    ):
        assert wanted in labels
    drawn = written["report.html"].partition("<script")[0].lower()
    assert "nan" not in drawn.replace("nano", "")


def test_page_says_what_was_done_and_under_which_conditions(page):
    text = " ".join(" ".join(page.text).split())
    assert "conditional on the teacher's samples (data_seeds: 0)" in text
    assert "references.kept: 3601 (3600 to 3602 over 3 runs)" in text
    assert "forward: 30 steps of forward_kl on 3600 examples" in text
    assert "benchmarks.micro_math.any" in text
    assert "20 entries" in text
    assert "5f0c2a91" in text
    assert "abc1234" in text


def test_markdown_and_latex_escape_and_agree(written, comparison):
    markdown, table = written["report.md"], written["table.tex"]
    assert "<script" not in markdown
    accuracy = next(r for r in comparison.leaderboard("micro_math") if r["method"] == "paced")
    assert f"| paced | {100 * accuracy['accuracy']:.1f} % |" in markdown
    width = {
        line.replace("\\|", "").count("|")
        for line in markdown.splitlines()
        if "&lt;script" in line and line[0] == "|"
    }
    # leaderboard, verdicts, levels, gains: the label's own bar adds none
    assert width <= {15, 9, 8, 4}
    assert "\\toprule" in table
    assert "$<$script$>$alert(1)$<$/script$>$\\textbar{}x\\_y &" in table
    assert f"{100 * accuracy['accuracy']:.1f}$^{{\\uparrow}}$" in table
    assert table.count("{") == table.count("}")


def test_same_input_same_bytes(folder, written, tmp_path):
    again = {path.name: path.read_text(encoding="utf-8") for path in report.write(folder)}
    assert again == written


def test_a_pair_reads_from_both_sides():
    pair = {"a": "x", "b": "y", "delta": 0.2, "ci95": [-0.1, 0.5], "verdict": "worse", "p": 0.3}
    back = {"a": "y", "b": "x", "delta": -0.2, "ci95": [-0.5, 0.1], "verdict": "better", "p": 0.3}
    assert reading.turned(pair) == back
    assert reading.turned(back) == pair
    more = {"mcnemar": {"b": 5, "c": 1, "p": 0.2}, "at_cost": "worse but cheaper"}
    more |= {
        "sign": {"wins": 2, "losses": 7, "p": 0.2},
        "cost_ratio": {"tokens": 0.5, "flops": None},
    }
    back = reading.turned({**pair, **more})
    assert back["mcnemar"] == {"b": 1, "c": 5, "p": 0.2}
    assert back["sign"] == {"wins": 7, "losses": 2, "p": 0.2}
    assert back["at_cost"] == "better but costlier"
    assert back["cost_ratio"] == {"tokens": 2, "flops": None}
    assert reading.turned(back) == {**pair, **more}


def test_place_and_cost_are_told(written, comparison):
    markdown = written["report.md"]
    said = reading.at_cost(comparison, "micro_math")
    pair = comparison.pair("micro_math", "paced", "sft")
    assert f"{pair['at_cost']}: " in said
    assert f"paced ({pair['cost_ratio']['tokens']:.2g} × the tokens" in said
    assert (
        said in html.unescape(written["report.html"])
        and "Against sft at its charged cost" in markdown
    )
    assert "| rank | best |" in markdown


@pytest.mark.parametrize(
    ("p", "text"), [(None, "–"), (0.0, "<1 %"), (0.034, "3 %"), (0.996, ">99 %")]
)
def test_a_chance_has_no_false_digits(p, text):
    assert reading.chance(p) == text


def test_levels_add_up_to_the_accuracy(comparison):
    assert set(comparison.levels) == {"micro_math"}  # the other has no levels
    for row in comparison.leaderboard("micro_math"):
        levels = comparison.levels["micro_math"][row["method"]]
        assert [level for level, _ in levels] == list(range(1, LEVELS + 1))
        # as many problems at each level
        assert sum(value for _, value in levels) / LEVELS == pytest.approx(row["accuracy"])


def test_minimal_summary_is_enough(tmp_path):
    """Only the keys that the design lists; no runs, no samples."""
    cell = {"benchmark": "b", "n_problems": 10, "n_samples": 1, "truncated": 0, "unparsed": 1}
    summary = {
        "name": "small",
        "protocol": "abc",
        "environment": {},
        "cells": [
            {
                **cell,
                "method": "base",
                "seed": 0,
                "accuracy": 0.1,
                "ci95": [0.0, 0.4],
                "ledger": {},
            },
            {
                **cell,
                "method": "sft",
                "seed": 0,
                "accuracy": 0.5,
                "ci95": [0.2, 0.8],
                "ledger": {"trained": 9},
            },
            {
                **cell,
                "method": "sft",
                "seed": 1,
                "accuracy": 0.7,
                "ci95": [0.4, 0.9],
                "ledger": {"trained": 9},
            },
        ],
        "pairs": [
            {"a": "sft", "b": "base", "benchmark": "b", "delta": 0.5, "ci95": [0.2, 0.8]}
            | {"p": 0.01, "p_holm": 0.01, "mde": 0.3, "verdict": "better"}
        ],
        "ledger": {"charged": {}, "spent": {}},
    }
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    page = Page(report.write(tmp_path)[0].read_text(encoding="utf-8"))
    assert page.tables[0][2][:4] == ["sft", "60.0 %", "20.0 to 90.0", "+50.0 better"]
    assert reading.headline(reading.load(tmp_path)) == (
        "On b, sft (+50.0 points, 20.0 to 80.0) is better than base."
    )


def small(folder: Path, purposes: list[dict], mechanisms: dict | None = None) -> tuple[str, str]:
    """The HTML and the Markdown of one arm, which has a run for each of these purposes."""
    cell = {"benchmark": "b", "n_problems": 10, "n_samples": 1, "accuracy": 0.3, "ci95": [0.1, 0.6]}
    arms = [("base", 0), *(("he<a>l", seed) for seed in range(len(purposes)))]
    summary = {
        "name": "small",
        "protocol": "abc",
        "environment": {},
        "cells": [{**cell, "method": label, "seed": seed} for label, seed in arms],
        "pairs": [],
        "ledger": {},
    }
    folder.mkdir(exist_ok=True)
    (folder / "summary.json").write_text(json.dumps(summary))
    for seed, shares in enumerate(purposes):
        run = {
            "method": "heal",
            "label": "he<a>l",
            "seed": seed,
            "config": {},
            "stages": [{"name": "main"}],
            "ledger": {"charged": {}, "spent": {}, "purposes": shares},
        }
        (folder / "runs" / str(seed)).mkdir(parents=True)
        (folder / "runs" / str(seed) / "run.json").write_text(json.dumps(run))
    if mechanisms is not None:
        (folder / "mechanisms.json").write_text(json.dumps({"arms": mechanisms}))
    page, markdown, *_ = (path.read_text(encoding="utf-8") for path in report.write(folder))
    return page, markdown


def test_teacher_tokens_are_told_by_purpose(tmp_path):
    runs = [
        {
            "teacher_generated": {"base": 450_000, "<i>": 120_000, "repair": 300_000},
            "teacher_scored": {"scoring": 90_000},
            "student_generated": {"samples": 5},
        },
        {"teacher_generated": {"base": 464_000, "<i>": 120_000}},
    ]
    page, markdown = small(tmp_path, runs)
    said = "generated: base 457k, {} 120k, repair 150k; scored: scoring 45k"  # means of two runs
    assert f"<li>teacher tokens by purpose: {said.format('&lt;i&gt;')}</li>" in page
    assert f"- teacher tokens by purpose: {said.format('&lt;i' + chr(92) + '>')}\n" in markdown


@pytest.mark.parametrize(
    ("purposes", "said"),
    [
        ({}, None),
        ({"teacher_generated": {"samples": 70}}, None),
        ({"teacher_scored": {"training": 8}}, None),
        ({"student_generated": {"samples": 5, "probe": 6}}, None),
        ({"teacher_generated": {"repair": 70}}, "generated: repair 70"),
        (
            {"teacher_scored": {"training": 8}, "teacher_generated": {"samples": 70}},
            "generated: samples 70; scored: training 8",
        ),
    ],
)
def test_purposes_that_the_totals_tell_are_not_said(tmp_path, purposes, said):
    for text in small(tmp_path, [purposes]):
        assert ("by purpose" in text) == (said is not None)
        assert said is None or f"teacher tokens by purpose: {said}" in text


def test_mechanisms_are_shown_with_their_intervals(tmp_path):
    rows = [
        {"name": "a|<b> hit", "value": 0.6543, "ci95": [0.601, 0.7049], "kind": "mean"}
        | {"n": 231, "problems": 87},
        {"name": "validity", "value": 0.87149, "ci95": [0.8, 0.92], "kind": "auc"}
        | {"n": 1200, "problems": None},
        {"name": "peak", "value": 12.34567, "ci95": [-3.0, 1234.56], "kind": "number"}
        | {"n": None, "problems": 9},
        {"name": "edge", "value": 0.25, "ci95": None, "kind": "mean", "n": 4, "problems": 3},
        {"name": "void", "value": None, "ci95": None, "kind": "auc", "n": 0, "problems": 0},
    ]
    other = [{"name": "of no arm here", "value": 1.0, "ci95": None, "kind": "mean"}]
    page, markdown = small(tmp_path, [{}], {"he<a>l": rows, "base": [], "gone": other})
    table = Page(page).tables[1]
    assert table == [
        ["", "value", "95 % interval", "cases", "problems"],
        ["a|<b> hit", "65.4 %", "60.1 to 70.5", "231", "87"],
        ["validity", "0.871", "0.800 to 0.920", "1200", "–"],
        ["peak", "12.35", "-3 to 1235", "–", "9"],
        ["edge", "25.0 %", "–", "4", "3"],
        ["void", "–", "–", "0", "0"],
    ]
    section = page[page.index("<h2>Mechanisms") : page.index("<h2>Conditions")]
    assert section.count("<h3>") == 1
    assert "he&lt;a&gt;l</h3>" in section
    assert page.index("What each method did") < page.index("<h2>Mechanisms")
    after = markdown[markdown.index("## What each") : markdown.index("## Conditions")]
    assert after.partition("## Mechanisms\n\n")[2] == (
        "| he&lt;a\\>l | value | 95 % interval | cases | problems |\n"
        "| --- | --- | --- | --- | --- |\n"
        "| a\\|&lt;b\\> hit | 65.4 % | 60.1 to 70.5 | 231 | 87 |\n"
        "| validity | 0.871 | 0.800 to 0.920 | 1200 | – |\n"
        "| peak | 12.35 | -3 to 1235 | – | 9 |\n"
        "| edge | 25.0 % | – | 4 | 3 |\n"
        "| void | – | – | 0 | 0 |\n\n"
    )
    assert "Mechanisms" not in "".join(small(tmp_path / "none", [{}]))


def level_rows(kind: str, prefix: str, axis: str, values: dict) -> list[dict]:
    return [
        {"name": f"{prefix}, {axis}{number}", "value": value, "kind": kind, "n": 40, "problems": 20}
        | {"ci95": None if value is None else [value - 0.1, value + 0.1]}
        for number, value in values.items()
    ]


def test_rows_by_level_or_k_are_drawn(tmp_path):
    rows = [
        *level_rows("mean", "t<e>st", "level ", {3: 0.5, 12: 0.6, 4: 0.7, 5: None}),
        *level_rows("mean", "other, level 1", "level ", {3: 0.2, 4: 0.3}),
        *level_rows("mean", "alone", "level ", {3: 0.2, 4: None}),
        *level_rows("auc", "t<e>st", "level ", {3: 0.5}),
        *level_rows("correlation", "r", "K = ", {1: -0.25, 2: 0.3, 8: 0.7}),
        *({**row, "ci95": None} for row in level_rows("number", "bare", "K = ", {0: 3.0, 8: 4.0})),
        *level_rows("mean", "no number", "level ", {"x": 0.2, "y": 0.3}),
    ]
    groups = reading.by_number(rows)
    assert {group: {p: [*at] for p, at in lines.items()} for group, lines in groups.items()} == {
        ("mean", "level"): {"t<e>st": [3, 4, 12], "other, level 1": [3, 4]},
        ("correlation", "K"): {"r": [1, 2, 8]},
        ("number", "K"): {"bare": [0, 8]},
    }
    page, markdown = small(tmp_path, [{}], {"he<a>l": rows})
    read = Page(page)
    labels = [v for k, v in read.attributes if k == "aria-label"]
    assert labels.count("share by level") == labels.count("correlation by K") == 1
    assert labels.count("number by K") == 1
    assert not any("AUC" in label or "reliability" in label for label in labels)
    for said in ("t<e>st: 60.0 % at 12", "other, level 1: 30.0 % at 4", "r: -0.25 at 1"):
        assert said in read.text
    apart = [
        float(re.search(rf'translate\((\S+) \S+\)" [^>]+><title>{point}<', page)[1])
        for point in ("t&lt;e&gt;st: 50.0 % at 3", "other, level 1: 20.0 % at 3")
    ]
    assert apart[1] - apart[0] == pytest.approx(report.GAP, abs=0.11)  # intervals side by side
    assert page.count('<ul class="legend">') == 4  # of the page and of each chart
    row = (
        f"| r, K = 1 | {reading.MINUS}0.25 | {reading.MINUS}0.35 to {reading.MINUS}0.15 | 40 | 20 |"
    )
    assert row in markdown
    assert "| r, K = 8 | 0.70 | 0.60 to 0.80 | 40 | 20 |" in markdown


def test_each_calibration_row_has_a_diagram(tmp_path):
    full = {"low": 0.8, "high": 0.9, "n": 36, "mean": 0.85, "share": 0.75, "ci95": [0.5, 0.9]}
    thin = {"low": 0.0, "high": 0.1, "n": 4, "mean": 0.05, "share": 0.25, "ci95": None}
    row = {"value": 0.1104, "ci95": [0.05, 0.171], "kind": "calibration", "n": 40, "problems": 20}
    long = "V of a <prefix> whose name is far too long for the title of any panel, at level nine"
    rows = [
        {"name": name, **row, "bins": [thin, full]} for name in ("V, level 1", "V, level 2", long)
    ]
    void = {"name": "void", **row, "value": None, "ci95": None, "n": 0, "bins": []}
    page, markdown = small(tmp_path, [{}], {"he<a>l": [*rows, void], "base": rows[:1]})
    read = Page(page)
    labels = [v for k, v in read.attributes if k == "aria-label"]
    names = ["V, level 1", "V, level 2", long, "V, level 1"]
    assert [v for v in labels if "reliability" in v] == [f"{name}: reliability" for name in names]
    assert labels.count("calibration error by level") == 1
    assert page.count("<circle") == 8 and page.count("ECE 0.110, n = 40") == 4
    assert any(text.startswith("…") and text.endswith("at level nine") for text in read.text)
    assert "0.8 to 0.9: 36 cases, mean 0.850, share 0.750 (0.500 to 0.900)" in read.text
    assert "| V, level 1 | ECE 0.110 | 0.050 to 0.171 | 40 | 20 |" in markdown
    assert "| void | – | – | 0 | 20 |" in markdown


def test_a_reliability_diagram_is_to_scale():
    bins = [
        {"low": 0.2, "high": 0.3, "n": 9, "mean": 0.25, "share": 0.5, "ci95": [0.0, 1.0]},
        {"low": 0.9, "high": 1.0, "n": 36, "mean": 1.0, "share": 0.0, "ci95": [0.0, 0.1]},
    ]
    drawn = plots.reliability("V", "", bins, Style.of(0))
    left, bottom, right, top = map(
        float, re.search(r'class="rule" d="M(\S+) (\S+)L(\S+) ([^"]+)"', drawn).groups()
    )
    assert right - left == bottom - top  # the diagonal is one
    points = re.findall(r'<circle cx="(\S+)" cy="(\S+)" r="(\S+)"', drawn)
    (x, y, r), (x1, y1, r1) = [tuple(map(float, point)) for point in points]
    assert (x - left) / (right - left) == pytest.approx(0.25, abs=0.01)
    assert (bottom - y) / (bottom - top) == pytest.approx(0.5, abs=0.01)
    assert (x1, y1, r1) == (right, bottom, 2 * r)  # four times the cases: four times the area
    assert f'd="M{x:g} {bottom:g}V{top:g}"' in drawn


# --- sentences ---------------------------------------------------------------------------------


def test_headline_names_better_worse_and_undecided(comparison):
    sentence = reading.headline(comparison)
    assert sentence.startswith("On micro_math, paced (+")
    assert "is better than sft" in sentence
    assert "limo (" + reading.MINUS in sentence
    assert "cannot be told from sft (a difference of " in sentence
    assert sentence.count(".") > 1
    assert "; on micro_code, " in sentence


def test_one_seed_reads_as_no_verdict(tmp_path):
    folder = example(tmp_path / "one", seeds=1, problems=30, arms=["sft", "paced", "heal"])
    report.write(folder)
    sentence = reading.headline(reading.load(folder))
    assert f"no verdict is given ({statistics.ONE_SEED})" in sentence
    text = (folder / "report.md").read_text()
    assert statistics.ONE_SEED in text
    pair = reading.load(folder).pair("micro_math", "paced", "sft")
    assert f"{pair['mcnemar']['b']} problems only by paced" in text
    assert text.count("McNemar") == 10  # two benchmarks, five pairs of a family


@pytest.mark.parametrize(
    ("quantity", "value", "text"),
    [
        ("trained", 0, "0"),
        ("trained", 950, "950"),
        ("trained", 1_234_567, "1.23M"),
        ("flops", 3.46e15, "3.5e15"),
        ("seconds", 71.4, "71 s"),
        ("seconds", 5400, "90 min"),
        ("seconds", 86400, "24 h"),
    ],
)
def test_amounts(quantity, value, text):
    assert reading.amount(quantity, value) == text


def test_numbers_in_words():
    assert reading.points(-0.0123) == f"{reading.MINUS}1.2 points"
    assert reading.signed(0.0001) == "0.0"
    assert reading.span([-0.011, 0.053]) == f"{reading.MINUS}1.1 to 5.3"
    assert reading.p_value(0.00004) == "<0.001"
    assert reading.share(0.0004) == "<0.1 %"
    assert reading.listed(["a", "b", "c"]) == "a, b and c"
    assert reading.over_runs([1, 2, 6]) == "3 (1 to 6 over 3 runs)"
    assert reading.over_runs([True, True]) == "True"
    assert reading.facts({"a": {"b": [1, 2]}, "c": None}) == [("a.b", "1, 2"), ("c", "none")]


# --- charts ------------------------------------------------------------------------------------


def test_scales():
    scale = Scale(0, 1, 100, 0)
    assert [scale(v) for v in (0, 0.25, 1)] == [100, 75, 0]
    assert scale.ticks() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert Scale(2, 6, 10, 50)(3) == 20
    log = Scale(10, 1000, 0, 300, log=True)
    assert log(100) == pytest.approx(150)
    log = Scale(1, 1000, 0, 300, log=True)
    assert log.ticks() == [1, 10, 100, 1000]
    assert Scale(2e12, 9e12, 0, 1, log=True).ticks() == [2e12, 5e12]
    around = plots.linear([0.31, 0.78], 0, 1)
    assert (around.low, around.high) == pytest.approx((0.3, 0.8))
    assert plots.share_scale([1.0, 1.0], 0, 1).high == 1.0


def test_styles_stay_apart():
    looks = [Style.of(i) for i in range(24)]
    assert len(set(looks)) == 24
    assert Style.of(None) not in looks


def test_long_curves_are_thinned():
    curve = [{"step": i, "loss": float(i)} for i in range(1, 1001)]
    thin = report.thinned(curve)
    assert len(thin) <= report.BINS
    assert thin[0] == (4.0, 4.0)  # the mean of 1 to 7


def test_terminal_fits_100_columns(comparison):
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    report.terminal(comparison.summary, console)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 100
    assert "paced" in text
    assert "cannot tell" in text
    assert "[" not in text.replace("[0, 1]", "")  # no markup left, none eaten
    assert "<script>alert(1)</script>|x_y" in text.replace("\n", "") or "<script>" in text


def test_stage_line():
    stage = {"name": "main", "steps": 5, "examples": 7, "objective": "nll"}
    assert formats.stage_line(stage) == "main: 5 steps of nll on 7 examples"


def disputed_example(folder: Path) -> Path:
    """A comparison of one arm whose four samples a problem two extractors judged, not always alike."""
    records = [
        {
            "benchmark": "math500", "method": label, "seed": 0, "data_seed": 0, "problem": f"math500/{p}",
            "sample": sample, "correct": sample == 0, "status": "ok" if sample == 0 else "wrong",
            "extracted": "<b>0.5</b>", "second": "wrong" if label == "sft" else "ok" if sample == 0 else "wrong",
            "gold": r"\frac{1}{2}", "truncated": False, "level": 1, "domain": "math",
        }
        for label in ("base", "sft") for p in range(30) for sample in range(4)
    ]  # fmt: skip
    judged = statistics.summarise_records(records, "sft")
    (folder / "samples").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(records), folder / "samples" / "math500.parquet")
    sampling = {"n": 4, "temperature": 0.6, "top_p": 0.95, "top_k": 0, "max_new_tokens": None}
    one = {"sampling": sampling, "generation": {"max_gen_toks": 8192, "until": []}}
    summary = {
        "name": "disputed", "protocol": {"benchmarks": {"math500": one}, "hash": "x"}, "environment": {},
        "cells": judged.cells, "arms": judged.arms, "pairs": judged.pairs, "ledger": {},
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_disagreements_of_the_extractors_and_decoding_are_shown(tmp_path):
    folder = disputed_example(tmp_path / "disputed")
    report.write(folder)
    markdown = (folder / "report.md").read_text(encoding="utf-8")
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    text = " ".join(" ".join(page.text).split())
    console = Console(record=True, width=100, file=io.StringIO())
    report.terminal(json.loads((folder / "summary.json").read_text()), console)
    plain = " ".join(console.export_text().split())
    for said in (markdown, text, plain):
        assert "avg@4, temperature 0.6, top_p 0.95, at most 8192 tokens" in said.replace("\\", "")
        assert "pass@4 100.0 %" in said and "maj@4 0.0 %" in said
        assert "decides: base 0, sft 30." in said
    row = ["math500/0", "sft/0, sample 0", "<b>0.5</b>", r"\frac{1}{2}", "ok", "wrong"]
    table = next(table for table in page.tables if table[0] == reading.DISPUTED)
    assert table[1] == row and len(table) == 1 + reading.DISPUTES == 21
    assert markdown.count("| sft/0, sample 0 |") == 20 and "&lt;b\\>0.5" in markdown


def test_samples_without_a_second_verdict_have_no_disagreements(written, comparison):
    assert comparison.disputes == {} and "second extractor" not in written["report.html"]
    assert comparison.sampled("micro_math") == "one sample a problem, greedy"
    assert comparison.sampled("micro_code") == "" and comparison.sampled("micro_math/high") != ""


def test_a_tuned_comparison_says_what_tuning_took(tmp_path):
    folder = example(tmp_path, arms=["sft", "paced"], seeds=2, problems=30)
    summary = json.loads((folder / "summary.json").read_text())
    assert "best setting" not in reading.conditions(reading.Comparison(summary))
    cost = {"charged": {"flops": 1.5e12}}
    summary["tuned"] = {
        "sft": {"trials": 12, "params": {"samples": 8}, "dev": 0.4, "ledger": cost},
        "paced": {"trials": 12, "params": {"alpha": 0.4321}, "dev": 0.5, "ledger": cost},
    }
    said = reading.conditions(reading.Comparison(summary))
    assert "12 trials each on dev problems (3.0e12 FLOPs in all)" in said
    assert "sft: samples 8; paced: alpha 0.432." in said
