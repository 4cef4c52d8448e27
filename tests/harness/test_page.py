"""The report's page: its table of problems and its traces, in a browser where there is one; its data, escapes and other formats."""

from __future__ import annotations

import base64
import csv
import gzip
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.speed.chromium import Browser, executable
from harness import report, standing, statistics
from harness.report import formats, plots, reading, samples
from harness.report.plots import Series, Style

ROOT = Path(__file__).parents[2]
NASTY = "</script><script>document.title='run'</script><img src=x onerror=\"document.title='run'\"> 'q' $\\frac{1}{2}$ 🙂 &amp; <!--"
# problem: level, subject, right samples of base (of 2), sft (of 4) and heal (of 4; two seeds with two samples each)
PROBLEMS = {
    "set/2": (10, "Geometry", 1, 2, 4),
    "set/10": (2, "Algebra", 0, 4, 1),
    "set/1": (2, None, 2, 4, 4),
    NASTY: (None, "Algebra", 0, 0, 0),
    "set/3?a=1&b=2#c": (9, "Algebra", 2, 3, 4),
}
COSTS = {"base": 0.0, "sft": 1e12, "heal": 2e12}
REFERENCES = sorted((ROOT / "results" / "reference").glob("*/summary.json"))


def records() -> list[dict]:
    """Of every arm the first samples are right: seed 0 samples 0 and 1, then those of seed 1."""
    rows = []
    for arm, label in enumerate(("base", "sft", "heal")):
        for seed in range(1 if label == "base" else 2):
            for place, (name, (level, subject, *right)) in enumerate(PROBLEMS.items()):
                for sample in range(2):
                    correct = 2 * seed + sample < right[arm]
                    same = label == "base" or (seed, sample) == (0, 0)
                    text = f"p{place} says {NASTY}" if same else f"{label} {seed} {sample} p{place}"
                    rows.append(
                        {
                            "benchmark": "set",
                            "method": label,
                            "seed": seed,
                            "data_seed": 0,
                            "problem": name,
                            "prompt": f"question {place}\n" + NASTY,
                            "sample": sample,
                            "correct": correct,
                            "status": "ok" if correct else "unparsed" if place == 3 else "wrong",
                            "extracted": None if place == 3 and not correct else f"x{seed}",
                            "second": None,
                            "gold": f"gold {place}",
                            "text": text,
                            "tokens": 7 + sample,
                            "truncated": place == 3,
                            "level": level,
                            "subject": subject,
                            "domain": "math",
                        }
                    )
    return rows


def ledger(label: str) -> dict:
    amounts = dict.fromkeys((*standing.TOKENS, "seconds"), 0.0) | {"flops": COSTS[label]}
    return {"charged": amounts, "spent": amounts}


def made(folder: Path, rows: list[dict] | None = None) -> Path:
    """A results folder, one file a cell."""
    rows = records() if rows is None else rows
    judged = statistics.summarise_records(rows, "sft")
    for cell in judged.cells:
        cell["ledger"] = ledger(cell["method"])
    for arm in judged.arms:
        arm["ledger"] = ledger(arm["method"])
    standing.add_costs(judged.arms, judged.pairs)
    summary = {"name": "small", "protocol": "p", "environment": {}, "ledger": ledger("sft")}
    summary |= {"cells": judged.cells, "arms": judged.arms, "pairs": judged.pairs}
    (folder / "samples").mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps(summary))
    for label, seed in {(row["method"], row["seed"]) for row in rows}:
        mine = [row for row in rows if (row["method"], row["seed"]) == (label, seed)]
        path = folder / "samples" / f"set--{label}--{seed}.parquet"
        pq.write_table(pa.Table.from_pylist(mine), path)
    return folder


def test_cells_of_before_a_second_data_seed_are_not_counted_again(tmp_path):
    """Their files lie beside the new ones, which have names of their own."""
    rows = [row for row in records() if row["benchmark"] == "set"]
    second = [row | {"data_seed": 1} for row in rows if row["method"] != "base"]
    folder = made(tmp_path / "small", rows + second)
    summary = json.loads((folder / "summary.json").read_text())
    summary["config"] = {"data_seeds": [0, 1]}
    (folder / "summary.json").write_text(json.dumps(summary))
    for path in (folder / "samples").glob("*.parquet"):
        table = pq.read_table(path)
        if "--base--" in path.name:
            continue
        for data_seed in (0, 1, 2):  # 2: of a suite that had another second one
            mine = table.filter(pa.compute.equal(table["data_seed"], min(data_seed, 1)))
            column = pa.array([data_seed] * len(mine), pa.int64())
            mine = mine.set_column(mine.column_names.index("data_seed"), "data_seed", column)
            pq.write_table(mine, path.with_name(f"{path.stem}-data{data_seed}.parquet"))
            run = {"label": mine["method"][0].as_py(), "seed": mine["seed"][0].as_py()}
            run |= {"data_seed": data_seed}
            names = [f"{run['seed']}-data{data_seed}"] + [str(run["seed"])] * (data_seed == 0)
            for name in names:
                at = folder / "runs" / run["label"] / name / "run.json"
                at.parent.mkdir(parents=True)
                at.write_text(json.dumps(run))
    comparison = reading.load(folder)
    solved = comparison.samples.solved("set", comparison.labels)
    drawn = dict(zip(solved.arms, solved.drawn.sum(1).tolist(), strict=True))
    told = {
        arm["method"]: arm["seeds"] * arm["n_problems"] * arm["n_samples"]
        for arm in summary["arms"]
    }
    assert drawn == told == {"base": 10, "sft": 40, "heal": 40}
    assert [(run["label"], run["seed"], run["data_seed"]) for run in comparison.runs] == [
        (label, seed, data_seed)
        for label in ("heal", "sft")
        for seed in (0, 1)
        for data_seed in (0, 1)
    ]


class Scripts(HTMLParser):
    """Scripts by id, and every tag and attribute."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.scripts: dict[str | None, str] = {}
        self.inside: str | None = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "script":
            self.inside = dict(attrs).get("id") or "code"

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside:
            self.scripts[self.inside] = data


def unpacked(text: str) -> dict:
    return json.loads(gzip.decompress(base64.b64decode(text)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = made(tmp_path_factory.mktemp("page") / "small")
    report.write(folder)
    return folder


@pytest.fixture(scope="module")
def text(folder):
    return (folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(text):
    return Scripts(text)


# --- data --------------------------------------------------------------------------------------


def test_the_page_carries_the_samples(page):
    table, traces = (unpacked(page.scripts[name]) for name in ("problems-0", "traces-0"))
    rows = {(r["method"], r["seed"], r["sample"], r["problem"]): r for r in records()}
    assert table["arms"] == ["base", "sft", "heal"] and table["problems"] == list(PROBLEMS)
    for place, (level, subject, *right) in enumerate(PROBLEMS.values()):
        assert (table["levels"][place], table["subjects"][place]) == (level, subject)
        assert [counts[place] for counts in table["right"]] == right
        assert [counts[place] for counts in table["drawn"]] == [2, 4, 4]
        assert traces["golds"][place] == f"gold {place}"
        assert traces["prompts"][place] == f"question {place}\n{NASTY}"
    for i, arm in enumerate(traces["arm"]):
        problem = table["problems"][traces["problem"][i]]
        row = rows.pop((table["arms"][arm], traces["seed"][i], traces["sample"][i], problem))
        assert traces["texts"][traces["text"][i]] == row["text"]
        extracted = traces["extracted"][i]
        assert (None if extracted is None else traces["texts"][extracted]) == row["extracted"]
        for name in ("status", "tokens", "truncated", "data_seed"):
            assert traces[name][i] == row[name]
    assert not rows  # every sample, once
    assert len(set(traces["texts"])) == len(traces["texts"])
    assert "The texts of all 50 samples are in this page." in page_text(page)


def page_text(page: Scripts) -> str:
    return " ".join(value for _, value in page.attributes if value)


def test_problems_that_tell_arms_apart_come_first(folder):
    solved = reading.load(folder).samples.solved("set", ["base", "sft", "heal"])
    # shares: .5 .5 1 | 0 1 .25 | 1 1 1 | 0 0 0 | 1 .75 1: variances .0556, .1806, 0, 0, .0139
    assert solved.telling() == [1, 0, 4, 2, 3]
    header, left, lines = reading.telling(solved, ["heal", "sft", "base"], "sft")
    assert header == ["level", "subject", "base", "sft", "heal"] and left == [2]
    assert lines[0] == ["set/10", "2", "Algebra", "0.0 %", "100.0 %", "25.0 %"]
    assert lines[3] == ["set/1", "2", "–", "100.0 %", "100.0 %", "100.0 %"]
    header, _, lines = reading.telling(solved, ["heal", "base", "sft"], "sft", most_arms=2)
    assert header == ["level", "subject", "sft", "heal"]  # the reference and the best


def test_texts_are_cut_where_the_page_would_grow(folder, monkeypatch):
    comparison = reading.load(folder)
    solved = comparison.samples.solved("set", comparison.labels)
    whole = comparison.samples.written(solved, 10**6)
    assert len(whole) == 50
    # In turn: of every arm's first seed sample 0 of each problem, the most telling first, then sample 1, then the next seed.
    order = list(dict.fromkeys((r["seed"], r["sample"], r["problem"]) for r in whole))
    telling = [1, 0, 4, 2, 3]
    assert order == [(t, s, p) for t in (0, 1) for s in (0, 1) for p in telling]
    # One problem: its prompt and the text that all three wrote, x0 and nothing else.
    unit = len(f"question 1\n{NASTY}") + len(f"p1 says {NASTY}") + len("x0")
    assert [r["problem"] for r in comparison.samples.written(solved, unit)] == [1, 1, 1]
    assert comparison.samples.written(solved, unit - 1) == []
    held = reading.held(solved, comparison.samples.written(solved, unit))
    assert held.startswith("This page has the texts of 3 of 50 samples, of 1 of 5 problems")
    data = samples.trace_data(solved, comparison.samples.written(solved, unit))
    assert data["prompts"] == [None, f"question 1\n{NASTY}", None, None, None]
    monkeypatch.setattr(samples, "MOST_PROBLEMS", 2)
    monkeypatch.setattr(samples, "MOST_SAMPLES", 1)
    found = comparison.samples.written(solved, 10**6)
    assert {r["problem"] for r in found} == {0, 1} and {r["sample"] for r in found} == {0}
    assert {r["seed"] for r in found} == {0, 1}


def test_samples_of_cells_that_left_the_comparison_are_not_counted(tmp_path):
    folder = made(tmp_path / "some")
    summary = json.loads((folder / "summary.json").read_text())
    summary["cells"] = [c for c in summary["cells"] if (c["method"], c["seed"]) != ("heal", 1)]
    (folder / "summary.json").write_text(json.dumps(summary))
    solved = reading.load(folder).samples.solved("set", ["base", "sft", "heal"])
    assert solved.drawn[2].tolist() == [2] * 5
    assert solved.right[2].tolist() == [2, 1, 2, 0, 2]


def test_samples_of_an_older_version_show_what_they_have(tmp_path):
    new = {"prompt", "gold", "second", "subject", "extracted", "data_seed"}
    rows = [{k: v for k, v in row.items() if k not in new} for row in records()]
    folder = made(tmp_path / "old", rows)
    text = report.write(folder)[0].read_text(encoding="utf-8")
    scripts = Scripts(text).scripts
    assert unpacked(scripts["traces-0"])["prompts"] == [None] * 5
    assert unpacked(scripts["problems-0"])["right"][1] == [2, 4, 4, 0, 3]


@pytest.mark.parametrize("path", REFERENCES, ids=lambda path: path.parent.name)
def test_committed_summaries_still_make_a_report(path, tmp_path):
    (tmp_path / "summary.json").write_bytes(path.read_bytes())
    written = report.write(tmp_path)
    text = written[0].read_text(encoding="utf-8")
    summary = json.loads(path.read_text())
    assert "<h3>Leaderboard</h3>" in text and 'id="problems"' not in text
    rows = list(csv.DictReader(written[3].open()))
    assert len(rows) == len(summary["cells"])
    assert float(rows[-1]["accuracy"]) == summary["cells"][-1]["accuracy"]


def test_there_are_committed_summaries():
    assert len(REFERENCES) >= 6


# --- safety ------------------------------------------------------------------------------------


def test_only_the_page_s_own_script_may_run_and_nothing_is_loaded(text, page):
    assert set(page.scripts) == {"code", "problems-0", "traces-0"}
    code = (ROOT / "harness" / "report" / "page.js").read_text()
    assert page.scripts["code"] == code and "</script" not in code and "<!--" not in code
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    policy = next(v for k, v in page.attributes if k == "content" and v and "src" in v)
    assert policy.startswith("default-src 'none'") and f"script-src 'sha256-{digest}'" in policy
    assert {"link", "img", "iframe", "b"}.isdisjoint(page.tags)
    assert not [v for k, v in page.attributes if k in {"src", "onerror", "xlink:href"}]
    links = [v for k, v in page.attributes if k == "href"]
    assert links and all(link.startswith("#benchmark=set&a=") for link in links)
    assert "://" not in text and "url(" not in text


def test_same_samples_same_bytes(folder, page, tmp_path):
    assert base64.b64decode(page.scripts["traces-0"])[4:8] == bytes(4)  # gzip's own clock
    again = made(tmp_path / "small")
    for path in report.write(again):
        assert path.read_bytes() == (folder / path.name).read_bytes(), path.name


# --- other formats -----------------------------------------------------------------------------


def test_csv_holds_what_the_summary_holds(folder):
    summary = json.loads((folder / "summary.json").read_text())
    cells = list(csv.DictReader((folder / "cells.csv").open(newline="")))
    pairs = list(csv.DictReader((folder / "pairs.csv").open(newline="")))
    assert [(c["method"], c["seed"]) for c in cells] == [
        ("base", "0"), ("sft", "0"), ("sft", "1"), ("heal", "0"), ("heal", "1"),
    ]  # fmt: skip
    assert [float(c["accuracy"]) for c in cells] == [0.5, 0.8, 0.5, 0.7, 0.6]  # 5, 8, 5, 7, 6 of 10
    assert [c["unparsed"] for c in cells] == ["2"] * 5
    assert [float(c["charged_flops"]) for c in cells] == [0, 1e12, 1e12, 2e12, 2e12]
    assert float(cells[1]["ci95_high"]) == summary["cells"][1]["ci95"][1]
    for row, pair in zip(pairs, summary["pairs"], strict=True):
        assert (row["a"], row["b"], row["verdict"]) == (pair["a"], pair["b"], pair["verdict"])
        assert float(row["delta"]) == pair["delta"] and float(row["ci95_low"]) == pair["ci95"][0]
        assert row["mde"] == ("" if pair["mde"] is None else str(pair["mde"]))
    between = next(row for row in pairs if {row["a"], row["b"]} == {"sft", "heal"})
    assert float(between["cost_ratio_flops"]) == (2.0 if between["a"] == "heal" else 0.5)
    assert between["cost_ratio_tokens"] == ""  # of none


def test_every_row_of_the_latex_table_has_its_columns(folder):
    lines = formats.latex(reading.load(folder)).splitlines()
    spec = next(line for line in lines if "begin{tabular}" in line)
    assert spec.strip().removeprefix("\\begin{tabular}") == "{lccr}"
    rows = [line for line in lines if line.endswith("\\\\")]
    # Three & in a row, but for the first, which has a cell over two columns.
    assert [row.count("& ") for row in rows] == [2, 3, 3, 3, 3]
    assert "\\multicolumn{2}{c}{set}" in rows[0]
    order = [line.strip() for line in lines if line.endswith("rule")]
    assert order == ["\\toprule", "\\midrule", "\\bottomrule"]
    arms = {arm["method"]: arm for arm in reading.load(folder).summary["arms"]}
    place = reading.rank(arms["heal"]).replace("–", "--")
    assert f"& {place} & 2.0e12" in rows[-1]
    assert formats._tex_cell(None, True) == "-- & --"  # an arm that has no such benchmark


def test_latex_escapes_what_would_be_a_command():
    assert formats._tex("[a]*|^~_%–“x”") == (
        "{[}a{]}{*}\\textbar{}\\textasciicircum{}\\textasciitilde{}\\_\\%--``x''"
    )


def test_the_pareto_set_is_ringed(folder, text):
    chart = re.search(r'<svg[^>]*aria-label="set: accuracy against cost".*?</svg>', text, re.S)
    kept = [arm for arm in reading.load(folder).summary["arms"] if arm["cost"]["pareto"]]
    assert {arm["method"] for arm in kept} == {"base", "sft", "heal"}  # no pair is told apart
    assert chart and chart[0].count("<circle") == 2 * 2  # base is a line; a ring has a halo
    assert "ringed: Pareto set" in chart[0]
    series = [Series(name, Style.of(i), [(i, 0.5)]) for i, name in enumerate("ab")]
    none, one = (plots.xy("t", series, "", "", ringed=names) for names in ([], ["b"]))
    assert (none.count("<circle"), one.count("<circle")) == (0, 2)


def many(arms: int) -> list[dict]:
    """More arms than a matrix has room for."""
    rows = []
    for arm in range(arms):
        for seed in range(2):
            for p in range(12):
                correct = (p * (arm + 2) + seed) % 5 < 2
                row = {"benchmark": "set", "method": f"m{arm}", "seed": seed, "problem": f"p{p}"}
                row |= {"sample": 0, "correct": correct, "status": "ok" if correct else "wrong"}
                rows.append({**row, "text": "t", "tokens": 1, "truncated": False, "level": 1})
    return rows


def test_many_arms_have_a_compact_matrix(tmp_path, monkeypatch):
    for name in ("m0", "m1", *(f"m{i}" for i in range(2, 23))):
        monkeypatch.setitem(COSTS, name, 1e12)
    monkeypatch.setattr(statistics, "summarise_records", _against(statistics.summarise_records))
    few, lot = (
        report.write(made(tmp_path / str(n), many(n)))[0].read_text(encoding="utf-8")
        for n in (8, 23)
    )
    assert 'class="matrix"' in few and "Exploratory pairs (21)" in few  # 7 * 6 / 2
    assert 'class="matrix compact"' in lot and "Exploratory pairs" not in lot
    assert "The 231 exploratory pairs stand in the matrix" in lot  # 22 * 21 / 2
    cells = re.findall(r'<td class="(better|worse|unsure)( exploratory)?">([^<]*)</td>', lot)
    assert len(cells) == 23 * 22
    assert sum(1 for _, exploratory, _ in cells if exploratory) == 2 * 231


def _against(summarise):
    return lambda rows, reference: summarise(rows, "m0" if rows[0]["method"] == "m0" else reference)


def test_a_cell_of_the_matrix_says_its_verdict_without_colour():
    pair = {"verdict": "better", "delta": 0.0321, "exploratory": True}
    assert reading.marked(pair) == "▲ +3.2" and reading.verdict_class(pair) == "better exploratory"
    pair = {"verdict": "worse", "delta": -0.0321}
    assert reading.marked(pair) == "▼ −3.2" and reading.verdict_class(pair) == "worse"
    pair = {"verdict": "no verdict", "delta": 0.5, "exploratory": False}
    assert reading.marked(pair) == "+50.0" and reading.verdict_class(pair) == "unsure"


# --- in a browser ------------------------------------------------------------------------------

needs_browser = pytest.mark.skipif(executable() is None, reason="no Chromium")
ROWS = "[...document.querySelectorAll('#problem-rows tr')].map(r => r.cells[0].querySelector('button').textContent)"


@pytest.fixture(scope="module")
def browser():
    with Browser() as browser:
        yield browser


def settle(browser: Browser, action: str) -> None:
    """Do something and wait until the page has answered."""
    before = browser.run("document.documentElement.dataset.shown ?? '0'")
    browser.run(action)
    browser.until(f"(document.documentElement.dataset.shown ?? '0') !== '{before}'")


def chosen(name: str, value: str) -> str:
    event = "input" if name == "text" else "change"
    return f"(() => {{ const e = document.getElementById('{name}'); e.value = {json.dumps(value)}; e.dispatchEvent(new Event('{event}', {{bubbles: true}})); }})()"


def sort_by(name: str) -> str:
    return f"document.querySelector('[data-sort=\"{name}\"]').click()"


@needs_browser
def test_the_table_sorts_and_filters(browser, folder):
    browser.open(folder / "report.html", "#benchmark=set")
    browser.until("document.documentElement.dataset.shown")
    hard = "set/3?a=1&b=2#c"
    # heal against sft: +50, -75, 0, 0, +25 points
    assert browser.run("[a.value, b.value]") == ["heal", "sft"]
    assert browser.run(ROWS) == ["set/2", hard, "set/1", NASTY, "set/10"]
    first = "[...document.querySelector('#problem-rows tr').cells].slice(1).map(c => c.textContent)"
    # difference, heal, sft, level, subject, all arms: (50 + 50 + 100) / 3
    assert browser.run(first) == ["+50.0", "100 %", "50 %", "10", "Geometry", "67 %"]
    assert browser.run("counts.textContent") == (
        "5 of 5 problems: heal solves 2 more often than sft, 1 less often, 2 as often."
    )
    settle(browser, sort_by("difference"))
    assert browser.run(ROWS) == ["set/10", "set/1", NASTY, hard, "set/2"]
    head = (
        "document.querySelector('[data-sort=difference]').parentElement.getAttribute('aria-sort')"
    )
    assert browser.run(head) == "ascending"
    settle(browser, sort_by("problem"))
    names = browser.run(ROWS)
    assert [n for n in names if n != NASTY] == ["set/1", "set/2", hard, "set/10"]  # by number
    settle(browser, sort_by("level"))
    assert browser.run(ROWS) == ["set/2", hard, "set/10", "set/1", NASTY]  # none comes last
    settle(browser, sort_by("level"))
    assert browser.run(ROWS) == ["set/10", "set/1", hard, "set/2", NASTY]  # both ways
    for outcome, found in (
        ("won", {"set/2", hard}),
        ("lost", {"set/10"}),
        ("tied", {"set/1", NASTY}),
    ):
        settle(browser, chosen("outcome", outcome))
        assert set(browser.run(ROWS)) == found
    settle(browser, chosen("outcome", ""))
    settle(browser, chosen("level", "2"))
    assert set(browser.run(ROWS)) == {"set/10", "set/1"}
    settle(browser, chosen("subject", "Algebra"))
    assert browser.run(ROWS) == ["set/10"]
    settle(browser, chosen("level", ""))
    settle(browser, chosen("text", "QUESTION 4"))
    assert browser.run(ROWS) == [hard]
    settle(browser, chosen("text", "no such text"))
    assert browser.run(ROWS) == []
    settle(browser, chosen("text", ""))
    settle(browser, chosen("subject", ""))
    settle(browser, "swap.click()")
    assert browser.run("[a.value, b.value]") == ["sft", "heal"]
    settle(browser, chosen("outcome", "won"))
    assert browser.run(ROWS) == ["set/10"]
    settle(browser, "every.click()")
    heads = "[...document.querySelectorAll('#problem-head th')].map(h => h.textContent)"
    assert browser.run(heads)[-1] == "base"
    assert browser.problems() == []


@needs_browser
def test_two_traces_stand_side_by_side(browser, folder):
    browser.open(folder / "report.html")
    assert browser.run("document.documentElement.dataset.shown") is None  # nothing is unpacked
    settle(browser, "location.hash = '#benchmark=set&a=base&b=heal&problem=set%2F10'")
    assert browser.run(
        "[document.getElementById('traces').hidden, document.getElementById('trace-title').textContent]"
    ) == [
        False,
        "set/10",
    ]
    get = "document.getElementById('{}').textContent".format
    assert browser.run(get("prompt")) == f"question 1\n{NASTY}"
    assert browser.run(get("gold")) == "gold 1"
    assert [browser.run(get(f"name_{side}")) for side in "ab"] == ["base", "heal"]
    assert [browser.run(get(f"text_{side}")) for side in "ab"] == [f"p1 says {NASTY}"] * 2
    assert browser.run("equal.hidden") is False
    assert [browser.run(get(f"verdict_{side}")) for side in "ab"] == ["wrong", "right"]
    options = "[...sample_b.options].map(o => o.textContent)"
    assert browser.run(options) == [
        "seed 0, sample 0: right",
        "seed 0, sample 1: wrong",
        "seed 1, sample 0: wrong",
        "seed 1, sample 1: wrong",
    ]
    settle(browser, chosen("sample_b", "0.1.1"))
    assert browser.run(get("text_b")) == "heal 1 1 p1" and browser.run("equal.hidden") is True
    assert browser.run(get("extracted_b")) == "x1" and browser.run(get("tokens_b")) == "8"
    link = browser.run("location.hash")
    browser.open(folder / "report.html", link)  # it leads back
    browser.until("document.documentElement.dataset.shown")
    assert browser.run(get("text_b")) == "heal 1 1 p1"
    # base against heal: three ties, set/10 -25, set/2 -50: the next by the table's order is its last.
    settle(browser, "document.getElementById('next').click()")
    assert browser.run(get("trace-title")) == "set/2"
    assert browser.run("document.getElementById('next').disabled") is True
    settle(browser, "document.getElementById('previous').click()")
    assert browser.run(get("trace-title")) == "set/10"
    settle(
        browser,
        "location.hash = '#' + new URLSearchParams({benchmark: 'set', problem: "
        + json.dumps(NASTY)
        + "})",
    )
    assert browser.run(get("trace-title")) == NASTY
    assert browser.run(get("verdict_a")) == "no answer could be read"
    assert browser.run(get("extracted_a")) == "none"
    assert browser.run(get("tokens_a")) == "7, cut off"
    settle(browser, "document.getElementById('close').click()")
    assert browser.run("document.getElementById('traces').hidden") is True
    assert browser.run("document.title") == "small: comparison"  # nobody's text has run
    assert browser.problems() == []


@needs_browser
def test_a_keyboard_is_enough(browser, folder):
    browser.open(folder / "report.html", "#benchmark=set")
    browser.until("document.documentElement.dataset.shown")
    browser.run("document.querySelector('#problem-rows button').focus()")
    before = browser.run("document.documentElement.dataset.shown")
    for kind in ("keyDown", "keyUp"):
        browser.send(
            "Input.dispatchKeyEvent",
            type=kind,
            key="Enter",
            code="Enter",
            text="\r",
            windowsVirtualKeyCode=13,
        )
    browser.until(f"document.documentElement.dataset.shown !== '{before}'")
    assert browser.run("document.getElementById('trace-title').textContent") == "set/2"
    assert browser.until("document.activeElement.id === 'trace-title'")
    unnamed = "[...document.querySelectorAll('.browser select, .browser input')].filter(e => !e.labels.length).length"
    assert browser.run(unnamed) == 0


@needs_browser
def test_without_script_on_paper_and_on_a_phone(browser, folder):
    visible = (
        "['.static', '.browser'].map(s => getComputedStyle(document.querySelector(s)).display)"
    )
    browser.open(folder / "report.html", "#benchmark=set&problem=set%2F1")
    browser.until("document.documentElement.dataset.shown")
    assert browser.run(visible) == ["none", "block"]
    browser.send("Emulation.setEmulatedMedia", media="print")
    assert browser.run(visible) == ["block", "none"]
    browser.send("Emulation.setEmulatedMedia", media="")
    try:
        browser.send(
            "Emulation.setDeviceMetricsOverride",
            width=390,
            height=800,
            deviceScaleFactor=1,
            mobile=True,
        )
        assert browser.run("document.documentElement.scrollWidth") <= 390
        browser.send("Emulation.setScriptExecutionDisabled", value=True)
        browser.open(folder / "report.html")
        assert browser.run(visible) == ["block", "none"]
    finally:
        browser.send("Emulation.setScriptExecutionDisabled", value=False)
        browser.send("Emulation.clearDeviceMetricsOverride")


@needs_browser
def test_long_tables_are_drawn_as_they_are_read(browser, tmp_path):
    rows = [
        {"benchmark": "set", "method": arm, "seed": 0, "problem": f"p{p}", "sample": 0}
        | {"correct": p % 3 == 0, "status": "ok", "text": f"t{p}", "truncated": False}
        for arm in ("base", "sft")
        for p in range(230)
    ]
    browser.open(
        report.write(made(tmp_path / "long", rows))[0], "#benchmark=set&sort=problem&order=up"
    )
    browser.until("document.documentElement.dataset.shown")
    count = "document.querySelectorAll('#problem-rows tr').length"
    assert browser.run(count) == 100
    browser.run("document.getElementById('more').click()")
    assert browser.run("document.getElementById('more').textContent") == "Show 30 more of 30"
    browser.run("document.getElementById('more').click()")
    assert browser.run(count) == 230 and browser.run("document.getElementById('more').hidden")
    assert browser.run(ROWS) == [f"p{p}" for p in range(230)]
    settle(browser, "document.querySelectorAll('#problem-rows button')[210].click()")
    assert browser.run(count) == 230  # opening a problem leaves the table as it is
    place = browser.run("held.textContent")
    assert place.startswith("This page has the texts of 400 of 460 samples, of 200 of 230 problems")
