"""A run of three stages on as many ranks as it is launched with: whole, cut, taken up again, and one that a rank leaves."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from harness import cli, ranks
from harness.config import Adapter, Budget, SamplingSettings, Training
from harness.lab import Workbench
from harness.ledger import Ledger
from harness.models.hf import HFModel
from harness.objectives import forward_kl, nll, reverse_kl
from harness.registry import Method, method
from harness.store import Store
from harness.trainer import Trainer
from harness.types import Example, Lab, OffPolicy, OnPolicy, Problem, Stage
from tests.tiny import tiny_model, tiny_path

STEPS, CUT = 30, 17  # cut in the second stage, three steps after a checkpoint
PROBLEMS = [
    Problem(str(i), f"go {'on ' * (i % 9)}{i}", answer=str(i), verifier="exact") for i in range(20)
]
# Micro-batches of a step: one to five, so that ranks have several, or none.
TRAINING = Training(
    batch_size=5,
    learning_rate=2e-3,
    micro_tokens=128,
    warmup=0.1,
    weight_decay=0.1,
    clip=0.5,
    checkpoint_every=2,
)


def uneven(index: int) -> Example:
    length = 3 + (index * 37) % 70
    response = tuple((index * 11 + 5 * t) % 250 for t in range(length))
    return Example(str(index), (1, 2, 3 + index % 5), response, weight=0.5 + (index % 3) / 2)


def stages(lab: Workbench, seen: list[Any]) -> Iterator[Stage]:
    """A method that has the teacher write and score, and looks at the student between its stages."""
    written = lab.references(n=3, verified=False)
    scores = lab.scores(lab.teacher, [(e.prompt, e.response) for e in written])
    weighted = [
        replace(e, weight=0.5 + (i % 3) / 4 - 0.01 * sum(s.logprobs) / len(s.logprobs))
        for i, (e, s) in enumerate(zip(written, scores, strict=True))
        if s is not None
    ]
    yield Stage("text", OffPolicy([*map(uneven, range(10)), *weighted]), nll, share=0.4)
    seen.append([list(t.tokens) for (t,) in lab.samples(lab.student, 1, judge=True)])
    source = OnPolicy(lab.problems, lab.rollouts(), every=2)
    yield Stage("forward", source, forward_kl, share=0.3, mean="sequence")
    source = OnPolicy(lab.problems, lab.rollouts())
    yield Stage("reverse", source, reverse_kl, share=0.3, optimizer="reset")
    seen.append([list(t.tokens) for (t,) in lab.samples(lab.student, 1)])


class Cut(Exception):
    """The run is over here."""


LEAN = TRAINING.model_copy(update={"packing": True, "gradient_checkpointing": True})


def run(
    checkpoint: Path,
    store: Path,
    watch: Callable[[Trainer], None] | None = None,
    *,
    lean: bool = False,
) -> dict[str, Any]:
    """All of it, or what is left after a checkpoint; lean: an adapter is trained, packed and checkpointed, and its base teaches."""
    torch.manual_seed(0)
    student = tiny_model(0)
    if lean:
        student = HFModel.load(tiny_path(0, 320), device="cpu", name="tiny", adapter=Adapter(r=3))
    blocks: list[int] = []

    def loaded(seed: int) -> HFModel:
        model = tiny_model(seed).freeze()
        count(model)
        return model

    def count(model: HFModel) -> None:
        model.rows = 4  # many blocks
        write = model.generate_block

        def counted(block: Any, **options: Any) -> Any:
            blocks.append(1)
            return write(block, **options)

        model.generate_block = counted  # type: ignore[method-assign]

    count(student)
    ledger = Ledger()
    training = Trainer(
        student,
        LEAN if lean else TRAINING,
        Budget(steps=STEPS),
        0,
        ledger,
        checkpoint=checkpoint,
        watch=watch,
    )
    lab = Workbench(
        student,
        {"teacher": lambda: loaded(1), "base": lambda: loaded(0)}
        if not lean
        else {"teacher": student.base, "base": student.base},
        PROBLEMS,
        Store(store),
        ledger,
        SamplingSettings(max_new_tokens=20),
        clock=lambda: training.clock,
        consumed=lambda: training.consumed,
    )
    lab.notes.update(training.resume() or {})
    resumed, seen = len(training.state.curve), []  # type: ignore[var-annotated]
    for index, stage in enumerate(stages(lab, seen)):
        training.run(index, stage, lambda: lab.teacher, lab.notes)
    weights = [float(p.detach().double().square().sum()) for p in student.model.parameters()]
    return {
        "world": training.accelerator.num_processes,
        "sharded": len(training._shards),
        "resumed": resumed,
        "losses": [row["loss"] for row in training.state.curve],
        "norms": [row["grad_norm"] for row in training.state.curve],
        "weights": weights,
        "seen": seen,
        "blocks": ranks.gather(len(blocks)),
        "charged": ledger.charged,
        "spent": ledger.spent,
    }


def cut(checkpoint: Path, store: Path, *, lean: bool = False) -> None:
    """Leave a checkpoint behind."""

    def watch(training: Trainer) -> None:
        if len(training.state.curve) == CUT:
            raise Cut

    try:
        run(checkpoint, store, watch, lean=lean)
    except Cut:
        return
    raise AssertionError("it was not cut")


def killed(training: Trainer) -> None:
    if len(training.state.curve) == CUT and ranks.rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def compare(suite: Path) -> None:
    """A comparison of a method that fails on one rank, while the other trains."""

    @method("astray", paper=None)
    class Astray(Method):
        def stages(self, lab: Lab) -> Iterator[Stage]:
            written = lab.references(verified=False)
            if ranks.rank() == 1:
                raise ValueError("this rank went astray")
            yield Stage("text", OffPolicy(written), nll)

    sys.argv = ["retort", "compare", str(suite), "--results", str(suite.parent)]
    cli.main()


def main() -> None:
    """Write what two runs found; then come to the end that is asked for."""
    torch.set_num_threads(1)
    folder, end = Path(sys.argv[1]), sys.argv[2]
    tiny_model(0), tiny_model(1)  # Transformers lets only rank 0 write, once there are several
    told = {
        "agreed": ranks.gather(ranks.agree(ranks.rank)),
        "shared": ranks.shared(5, lambda i: 10 * i + ranks.rank()),
    }
    found = [told, run(folder / "whole.pt", folder / "whole")]
    cut(folder / "cut.pt", folder / "cut")
    found.append(run(folder / "again.pt", folder / "again"))  # another number of ranks was cut
    found.append(run(folder / "lean.pt", folder / "lean", lean=True))
    if end == "killed":
        told["speaking"] = ranks.gather(ranks.speaks())  # once: nobody has anything to say later
    if ranks.first():
        (folder / "found.json").write_text(json.dumps(found), encoding="utf-8")
    if end == "killed":
        run(folder / "killed.pt", folder / "killed", killed)
    else:
        compare(Path(end))
    raise AssertionError("it went on")


if __name__ == "__main__":
    main()
