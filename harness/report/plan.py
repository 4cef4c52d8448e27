"""What a plan says, as rows and sentences; the numbers are those of harness/plan.py."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

GIB = 2**30
QUANTITIES = {
    "teacher_generated": "teacher writes",
    "teacher_scored": "teacher scores",
    "student_generated": "student writes",
    "trained": "trained",
    "steps": "steps",
    "flops": "FLOPs",
}
HEADER = ("arm", "", *QUANTITIES.values(), "hours")


def rows(plan: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Each arm alone (what one cell is charged), and what its first and its later cells spend; then all cells."""
    for label, arm in plan["arms"].items():
        if "failed" in arm:
            continue
        yield (label, "alone", *_amounts(arm["cell"]), "")
        yield ("", "seed 0 spends", *_amounts(arm["first"]), hours(arm["hours"]["first"]))
        if arm["later"] is not None:
            yield ("", "later seeds", *_amounts(arm["later"]), hours(arm["hours"]["later"]))
    total = plan["total"]
    yield ("all cells", "alone", *_amounts(total["charged"]), "")
    yield ("", "with sharing", *_amounts(total["spent"]), hours(plan["hours"]["training"]))


def sentences(plan: Mapping[str, Any]) -> Iterator[str]:
    for label, arm in plan["arms"].items():
        if "failed" in arm:
            yield f"{label} could not be planned: {arm['failed']}; a larger sample may help (--probe)"
    where = plan["gpu"] or "this machine"
    answers, times, workers = plan["evaluation"], plan["hours"], plan["workers"]
    but = f", without {', '.join(answers['missing'])}" if answers["missing"] else ""
    yield f"Evaluation: {plan['cells']} students write {amount(answers['tokens'])} tokens{but}"
    if times["whole"] is not None:
        line = (
            f"Hours on {where}: {hours(times['whole'])} ({hours(times['training'])} of training cells, "
            f"{hours(times['evaluation'])} of evaluation)"
        )
        yield line + (f"; {workers} workers side by side" if workers > 1 else "")
    else:
        yield "Hours: name a GPU with --gpu, as the models are not here to be timed"
    charged, spent = plan["total"]["charged"], plan["total"]["spent"]
    if charged.get("teacher_read"):
        yield (
            f"The teacher's server reads {amount(charged['teacher_read'])} tokens of prompts alone, {amount(spent['teacher_read'])} with "
            f"sharing, and costs {charged['cost']:.4g} alone, {spent['cost']:.4g} with sharing, at the suite's prices"
        )
    if plan["cost"] is not None:
        yield f"Cost: {plan['cost']:,.2f} at {plan['price']:g} an hour, as told"
    if designs := plan["detectable"]:
        yield from _detectable(designs)
    memory, disk = plan["memory"], plan["disk"]
    room = plan["gpu_memory"]
    fits = ""
    if room is not None:
        fits = f" of {size(room)}" + ("" if memory["peak"] < room else ": TOO LITTLE")
    yield (
        f"Peak memory of a worker: {size(memory['peak'])}{fits}: student with optimizer {size(memory['student'])}, "
        f"frozen models {size(memory['frozen'])}, and the larger of training {size(memory['training'])} "
        f"and sampling {size(memory['writing'])}"
        + (
            f"; merged, to be judged, the student is {size(memory['merged'])}"
            if memory["merged"]
            else ""
        )
    )
    yield (
        f"Disk: students {size(disk['students'])}, checkpoints while running {size(disk['checkpoints'])}, "
        f"store of samples {size(disk['store'])}, answers {size(disk['answers'])}"
    )
    yield f"Known from: {plan['how']}"
    yield from plan["assumed"]


def _detectable(designs: Mapping[str, Any]) -> Iterator[str]:
    seeds = next(iter(designs.values()))["seeds"]
    if seeds == 1:
        yield "One seed: accuracies, and no verdict on methods; another seed may turn any difference"
        return
    sizes = ", ".join(
        f"{100 * found['mde']:.1f} points on {name}" for name, found in designs.items()
    )
    yield (
        f"Smallest difference found four times in five: {sizes}, with {seeds} seeds, if arms and seeds differ as the "
        "quickstart's do (docs/statistics.md: with variances of your own)"
    )


def _amounts(column: Mapping[str, float]) -> list[str]:
    return [amount(column[name]) for name in QUANTITIES]


def amount(value: float) -> str:
    """Three digits and a unit: 1950000 is 1.95M."""
    for unit, name in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.3g}"


def size(value: float) -> str:
    return f"{value / GIB:.3g} GiB" if value >= GIB else f"{value / 2**20:.3g} MiB"


def hours(value: float | None) -> str:
    if value is None:
        return ""
    return "< 0.01" if 0 < value < 0.01 else f"{value:,.1f}" if value >= 10 else f"{value:.2f}"
