"""What a suite will cost, before anything runs: a walk through its arms (harness/probe.py), scaled up to hours, bytes and money.

Everything that the walk writes goes to a folder that is gone afterwards.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from harness import cell, sizes
from harness.cell import Job
from harness.compare import (
    Silent,
    check,
    check_models,
    check_tasks,
    experiment,
    needs,
    prepare,
    use_data,
)
from harness.config import Experiment
from harness.ledger import forward_flops
from harness.models.hf import ROWS
from harness.probe import TIMED, Cast, Costs, Walk, cast_of, readable, spread, training_problems
from harness.progress import Display
from harness.statistics import planned

PROBLEMS = 256  # looked at by a walk
ASSUMED = (
    24,
    64,
)  # the same of stand-ins, whose numbers a larger sample does not mend; fewer where responses are long,
WRITTEN = 64 * 2048  # so that a sample of all has about so many tokens
UTILISATION = 0.35  # of a GPU's FLOP/s and bandwidth, assumed
STAGES = 3  # boundaries whose weights are kept while a cell runs, at most usually
# How arms and seeds differ, where nothing is known yet: as in results/reference/quickstart on micro_math (the median pair)
PILOT = {"interaction": 0.039, "seed": 0.000012, "noise": 0.093}
ROW_BYTES = 10  # of a sampled token in the store, assumed where none was measured


def forecast(
    suite: str | Path | Experiment,
    *,
    overrides: Sequence[str] = (),
    gpu: str | None = None,
    price: float | None = None,
    utilisation: float = UTILISATION,
    num_problems: int | None = None,
    tokens: int | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Tokens, FLOPs, memory, disk, hours and cost of a comparison; nothing of it is run or kept."""
    setting = experiment(suite, overrides)
    use_data(setting)
    if not 0 < utilisation <= 1:
        raise ValueError(
            f"--utilisation {utilisation:g}: a share of the data sheet, above 0 up to 1"
        )
    if gpu:
        sizes.gpu(gpu)  # refuses an unknown one
    seen, unread = readable(setting)
    cast = cast_of(setting, tokens, unread["problems"])
    if cast.real:
        check(seen, list(setting.methods))
    else:
        check_tasks(seen)
        if "teacher" in cast.prices:  # what a server can do is known without it
            check_models(setting, needs(setting, list(setting.methods)), ("teacher",))
    with tempfile.TemporaryDirectory(prefix="retort-plan-") as place, _threads(setting):
        folder = Path(place)
        every = training_problems(setting, unread["problems"])
        if seen.problems:
            prepare(seen, folder)
            every += cell.training_problems(Job({}, "", 0, 0, folder, folder))
        least, most = ASSUMED
        assumed = max(least, min(most, WRITTEN // cast.length))
        sample = spread(every, num_problems or (PROBLEMS if cast.real else assumed))
        arms: dict[str, dict[str, Any]] = {}
        with Display(len(setting.methods) + 1) if not quiet else Silent() as display:
            walk = Walk(seen, cast, sample, len(every), folder, display)
            for label in setting.methods:
                arms[label] = walk.arm(label)
                display.finish(label)
            answers = walk.evaluation()
            display.finish("evaluation")
    answers["unread"] = unread["benchmarks"]
    return _result(setting, walk, arms, answers, len(every), gpu, price, utilisation)


@contextmanager
def _threads(setting: Experiment) -> Iterator[None]:
    """The suite's threads a cell, for the timing; and those of before."""
    before = torch.get_num_threads()
    state = torch.get_rng_state()
    torch.set_num_threads(setting.threads or max(1, (os.cpu_count() or 1) // setting.workers))
    try:
        yield
    finally:
        torch.set_num_threads(before)
        torch.set_rng_state(state)


# -- what it comes to -------------------------------------------------------------------------------


def _result(
    setting: Experiment,
    walk: Walk,
    arms: Mapping[str, dict[str, Any]],
    answers: Mapping[str, Any],
    total_problems: int,
    gpu: str | None,
    price: float | None,
    utilisation: float,
) -> dict[str, Any]:
    cast, seeds, draws = walk.cast, setting.seeds, len(setting.data_seeds)
    on = sizes.gpu(gpu) if gpu else None
    length = answers["tokens"] / max(1, answers["problems"]) if cast.real else cast.length

    def hours(costs: Costs) -> float | None:
        if on is not None:
            return _gpu_seconds(costs, walk, int(length), on, utilisation) / 3600
        return costs["seconds"] / 3600 if cast.real else None

    rows: dict[str, Any] = {}
    total = Costs()
    for label, found in arms.items():
        if "failed" in found:
            rows[label] = found
            continue
        first, later = found["first"], found["later"] if seeds > 1 else None
        whole = first if later is None else first + later * (seeds - 1)
        whole = whole * draws  # another draw of the data shares nothing with this one
        total += whole
        rows[label] = {
            "cell": first.column("charged"),
            "first": first.column("spent"),
            "later": None if later is None else later.column("spent"),
            "charged": whole.column("charged"),
            "spent": whole.column("spent"),
            "hours": {
                "first": hours(first),
                "later": None if later is None else hours(later),
                "all": hours(whole),
            },
        }
    cells = sum("failed" not in row for row in rows.values()) * seeds * draws + 1
    written = answers["tokens"] * cells
    asked = Costs({
        "seconds": answers["seconds"] * cells,
        "spent student_generated": written,
        "spent flops": forward_flops(cast.shapes["student"].parameters, written),
    })  # fmt: skip
    times = {"training": hours(total), "evaluation": hours(asked)}
    known = [time for time in times.values() if time is not None]
    whole_hours = sum(known) if len(known) == len(times) else None
    return {
        "name": setting.name,
        "how": _how(walk, total_problems),
        "assumed": [*cast.notes, *_assumed(gpu, on, utilisation, cast, answers)],
        "cells": cells,
        "workers": setting.workers,
        "arms": rows,
        "total": {"charged": total.column("charged"), "spent": total.column("spent")},
        "evaluation": {"tokens": written, "missing": [*answers["missing"], *answers["unread"]]},
        "detectable": _detectable(setting, answers["asked"]),
        "hours": {**times, "whole": whole_hours},
        "price": price,
        "cost": None if price is None or whole_hours is None else price * whole_hours,
        "gpu": gpu,
        "gpu_memory": on.memory if on else None,
        "memory": _memory(setting, walk, on is not None or torch.cuda.is_available()),
        "disk": _disk(setting, cast.shapes["student"], total, asked, cells),
    }


def _detectable(setting: Experiment, asked: Mapping[str, Any]) -> dict[str, Any]:
    """The smallest difference of two arms that each benchmark will find four times in five; None on one seed, without verdicts."""
    seeds = setting.seeds * len(setting.data_seeds)
    arms = max(2, len(setting.methods))
    found = {}
    for name, design in asked.items():
        # As of one greedy sample, whose noise the pilot has: what more samples win is not known before.
        estimate = planned(design["problems"], seeds, 1, arms=arms, **PILOT)
        found[name] = {**design, "seeds": seeds, "mde": estimate.mde if seeds > 1 else None}
    return found


def _how(walk: Walk, total: int) -> str:
    played = "the suite's own models" if walk.cast.real else "stand-ins"
    return (
        f"every arm walked through twice on {len(walk.sample)} of {total} training problems with {played}; "
        f"problems scale by {walk.grow:.4g}, stages by their budget"
    )


def _assumed(
    gpu: str | None,
    on: sizes.GPU | None,
    utilisation: float,
    cast: Cast,
    answers: Mapping[str, Any],
) -> Iterator[str]:
    if on is not None:
        yield (
            f"{gpu}: {on.flops / 1e12:.0f} TFLOP/s bf16 dense, {on.bandwidth / 1e12:.2f} TB/s, "
            f"{on.memory / 1e9:.0f} GB ({on.source}), at {utilisation:.0%} of both (assumed; --utilisation)"
        )
    elif cast.real:
        yield "hours are those of this machine, from the walk: sampling in small batches is slower than in the run"
    if cast.real:
        yield f"rollouts are as long as the untrained student's; {TIMED} optimizer steps of a stage were real"
    yield "spent as with an empty store: what yours holds already comes off"
    for name, why in answers["unread"].items():
        yield f"not counted: what {name} asks, whose problems could not be read: {why}"
    if answers["missing"]:
        yield f"not counted: what {', '.join(answers['missing'])} asks, whose problems are lm-eval's own"


def _gpu_seconds(costs: Costs, walk: Walk, length: int, on: sizes.GPU, utilisation: float) -> float:
    """Writing by the roofline of `sizes.writing_seconds`, all else by its FLOPs, and those that checkpointing computes again."""
    shapes, setting = walk.cast.shapes, walk.setting
    left, seconds = costs["spent flops"], 0.0
    if setting.training.gradient_checkpointing:
        left += forward_flops(shapes["student"].parameters, costs["spent trained"])
    for who in ("student", "teacher"):
        tokens = costs[f"spent {who}_generated"]
        if not tokens or who not in shapes:
            continue
        few = costs[f"written {who}_generated"]  # a step's batch at a time
        rows = min(ROWS, max(1, int(on.memory / 4 // shapes[who].cache(length, 2))))
        for part, at_once in ((tokens - few, rows), (few, setting.training.batch_size)):
            seconds += sizes.writing_seconds(
                shapes[who], max(0.0, part), min(rows, at_once), length, on, utilisation
            )
        left -= forward_flops(shapes[who].parameters, tokens)
    return seconds + max(0.0, left) / (on.flops * utilisation)


def _memory(setting: Experiment, walk: Walk, cuda: bool) -> dict[str, float]:
    shapes = walk.cast.shapes
    frozen = {name: shapes["student" if name == "base" else name]
              for name in sorted(walk.used) if name == "base" or name in shapes}  # fmt: skip
    length = setting.sampling.max_new_tokens + walk.longest
    held = cell.memory(setting, shapes["student"], frozen, length, cuda)
    return {**held._asdict(), "peak": held.peak}


def _disk(
    setting: Experiment, student: sizes.Shape, total: Costs, asked: Costs, cells: int
) -> dict[str, float]:
    """Bytes: the students; weights, Adam's moments and the weights between stages of the cells at work; samples and answers."""
    weights = 4.0 * student.parameters
    kept = sum(total[f"spent {who}"] - total[f"written {who}"] for who in ("teacher_generated", "student_generated"))  # fmt: skip
    row = total["stored"] / kept if kept > 0 and total["stored"] else ROW_BYTES
    return {
        "students": (weights + 4.0 * student.adapter) * (cells - 1),
        "checkpoints": 4.0 * student.trained * (3 + STAGES) * setting.workers,
        "store": total["stored"],
        "answers": asked["spent student_generated"] * row,
    }
