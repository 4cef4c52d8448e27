"""A report of 5,000 cells of 1,000 problems: how long it takes to write, and to open in headless Chromium.

    python -m benchmarks.speed.report    # some three minutes on two idle cores, 1 GB of disk; wants Chromium

Made-up samples of 50 arms x 10 seeds x 10 benchmarks and an untrained student, judged by `harness.statistics`. A page counts as open
when it has loaded and its next frame is drawn, from the start of the navigation, in a browser that has just been started. The peer
is a page of nothing but the ten tables of problems, as plain HTML with every row in it. Pages take turns; the median counts.
"""

from __future__ import annotations

import argparse
import html
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.speed import machine, write
from benchmarks.speed.chromium import Browser
from harness import report, standing
from harness.report import reading
from harness.statistics import Outcomes, summarise

ARMS, SEEDS, BENCHMARKS, PROBLEMS, STEPS = 50, 10, 10, 1000, 500
QUANTITIES = (*standing.TOKENS, "verifier_calls", "steps", "seconds", "flops")
OPEN = "new Promise(r => requestAnimationFrame(() => setTimeout(() => r(performance.now()))))"


def ledger(place: int) -> dict[str, dict[str, float]]:
    amounts = dict.fromkeys(QUANTITIES, 1e4 * (1 + place % 7)) | {"flops": 1e15 * (1 + place)}
    return {"charged": amounts, "spent": amounts}


def texts(rng: np.random.Generator, count: int, lines: int) -> list[str]:
    """Reasoning of so many lines, made up."""
    numbers = rng.integers(2, 999, (count, lines, 2))
    return [
        "\n".join(f"Step {i}: {a} * {b} = {a * b}, so we go on." for i, (a, b) in enumerate(each))
        for each in numbers.tolist()
    ]


def make(folder: Path, arms: int, seeds: int, benchmarks: int, problems: int) -> int:
    """Write a results folder as a comparison does; how many cells it has."""
    rng = np.random.default_rng(0)
    labels = ["base", *(f"method-{i:02d}" for i in range(arms))]
    summary: dict[str, Any] = {"cells": [], "arms": [], "pairs": []}
    (folder / "samples").mkdir(parents=True)
    for b in range(benchmarks):
        name = f"bench_{b}"
        ids = [f"{name}/problem-{p:04d}" for p in range(problems)]
        prompts, pool = texts(rng, problems, 3), texts(rng, 4 * problems, 9)
        ease = rng.normal(0, 1, problems)
        correct = {
            label: rng.random((1 if label == "base" else seeds, problems, 1))
            < 1 / (1 + np.exp(-ease - 0.02 * place))[None, :, None]
            for place, label in enumerate(labels)
        }
        found = summarise(Outcomes(name, correct), "method-00")
        for label in labels:
            for seed, right in enumerate(correct[label][:, :, 0]):
                columns = {
                    "problem": ids,
                    "prompt": prompts,
                    "correct": right,
                    "status": np.where(right, "ok", "wrong"),
                    "extracted": rng.integers(0, 99, problems).astype(str),
                    "text": [pool[i] for i in rng.integers(0, len(pool), problems)],
                    "gold": ["42"] * problems,
                    "second": [None] * problems,
                    "tokens": rng.integers(100, 900, problems),
                    "truncated": np.zeros(problems, bool),
                    "level": 1 + np.arange(problems) % 5,
                    "subject": [f"subject {p % 6}" for p in range(problems)],
                }
                same = {
                    "benchmark": name,
                    "method": label,
                    "seed": seed,
                    "data_seed": 0,
                    "sample": 0,
                }
                columns |= {key: [value] * problems for key, value in same.items()}
                path = folder / "samples" / f"{name}--{label}--{seed}.parquet"
                pq.write_table(pa.table(columns), path, compression="zstd")
        for cell in found.cells:
            cell |= {"ledger": ledger(labels.index(cell["method"])), "data_seed": 0}
        for arm in found.arms:
            arm["ledger"] = ledger(labels.index(arm["method"]))
        standing.add_costs(found.arms, found.pairs)
        for key in ("cells", "arms", "pairs"):
            summary[key] += getattr(found, key)
    for place, label in enumerate(labels[1:]):
        for seed in range(seeds):
            loss = np.exp(-np.arange(STEPS) / 90) + 0.05 * rng.random(STEPS)
            curve = [{"step": i, "stage": "main", "loss": x} for i, x in enumerate(loss.tolist())]
            stage = {"name": "main", "steps": STEPS, "examples": 4000, "objective": "forward_kl"}
            run = {"method": "sft", "label": label, "seed": seed, "data_seed": 0, "config": {}}
            run |= {"stages": [stage], "notes": {}, "curve": curve, "ledger": ledger(place)}
            path = folder / "runs" / label / str(seed) / "run.json"
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps(run))
    summary |= {"name": "large", "protocol": "made up", "environment": {}, "ledger": ledger(0)}
    (folder / "summary.json").write_text(json.dumps(summary))
    return len(summary["cells"])


def plain(folder: Path) -> str:
    """The ten tables of problems with every row."""
    comparison = reading.load(folder)
    parts = ["<!DOCTYPE html><meta charset=utf-8><title>plain</title>"]
    for name in comparison.benchmarks:
        solved = comparison.samples.solved(name, comparison.labels)
        heads = ["problem", "level", "subject", *solved.arms]
        parts.append("<table><tr>" + "".join(f"<th>{html.escape(x)}</th>" for x in heads) + "</tr>")
        for p, problem in enumerate(solved.problems):
            cells = [problem, solved.about["level"][p], solved.about["subject"][p]]
            cells += [f"{100 * share:.0f} %" for share in solved.shares[:, p]]
            parts.append(
                "<tr>" + "".join(f"<td>{html.escape(str(x))}</td>" for x in cells) + "</tr>"
            )
        parts.append("</table>")
    return "".join(parts)


def opened(path: Path, hash: str = "") -> dict[str, float]:
    """Seconds until a page is open, and with a link to a problem until both traces are there."""
    with Browser() as browser:
        browser.open(path, hash)
        found = {"open": browser.run(OPEN) / 1000}
        if hash:
            browser.until("document.documentElement.dataset.shown")
            found["traces"] = (
                browser.run("performance.getEntriesByName('shown')[0].startTime") / 1000
            )
            click = "document.querySelector('[data-sort=\"mean\"]').click()"
            found["sort"] = (
                browser.run(
                    f"(async () => {{ const t = performance.now(); {click}; await {OPEN}; return performance.now() - t; }})()"
                )
                / 1000
            )
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--folder", type=Path, help="where the samples go; default: a temporary one"
    )
    parser.add_argument("--out", type=Path, default=Path("results/reference/speed/report.json"))
    given = parser.parse_args(arguments)
    here = machine()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (given.folder or Path(temporary)) / "large"
        cells = make(folder, ARMS, SEEDS, BENCHMARKS, PROBLEMS)
        start = time.perf_counter()
        report.write(folder)
        write_seconds = time.perf_counter() - start
        peer = folder / "plain.html"
        peer.write_text(plain(folder), encoding="utf-8")
        comparison = reading.load(folder)
        solved = comparison.samples.solved(comparison.benchmarks[-1], comparison.labels)
        problem = solved.problems[solved.telling()[0]]
        link = f"#benchmark={solved.benchmark}&problem={problem}"
        pages = {
            "report": (folder / "report.html", ""),
            "report, at a problem": (folder / "report.html", link),
            "plain tables": (peer, ""),
        }
        took: dict[str, list[dict[str, float]]] = {name: [] for name in pages}
        for _ in range(given.repeats):
            for name, (path, hash) in pages.items():
                took[name].append(opened(path, hash))
        megabytes = {name: path.stat().st_size / 1e6 for name, (path, _) in pages.items()}
    rows = {
        name: {"megabytes": megabytes[name]}
        | {f"{what}_seconds": statistics.median(each[what] for each in found) for what in found[0]}
        | {"open_each": [each["open"] for each in found]}
        for name, found in took.items()
    }
    for name, row in rows.items():
        print(f"{name}: {row['megabytes']:.1f} MB, open in {row['open_seconds']:.2f} s")
    print(f"{cells} cells, written in {write_seconds:.1f} s")
    record = {
        "environment": {
            **here,
            "packages": {name: metadata.version(name) for name in ("pyarrow", "jinja2")},
        },
        "cells": cells,
        "problems": PROBLEMS,
        "repeats": given.repeats,
        "write_seconds": write_seconds,
        "rows": rows,
    }
    write(given.out, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
