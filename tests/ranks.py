"""A run of two stages on as many ranks as it is launched with; rank 0 prints the loss trace as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch

from harness.config import Budget, Training
from harness.ledger import Ledger
from harness.objectives import forward_kl, nll
from harness.trainer import Trainer
from harness.types import Example, OffPolicy, OnPolicy, Problem, Request, Sampling, Stage
from tests.tiny import tiny_model

STEPS = 52


def example(index: int, student_prompt: str = "go") -> Example:
    length = 3 + (index * 37) % 70  # uneven on purpose
    response = tuple((index * 11 + 5 * t) % 250 for t in range(length))
    return Example(str(index), (1, 2, 3 + index % 5), response, weight=0.5 + (index % 3) / 2)


def main() -> None:
    torch.set_num_threads(1)
    student, teacher = tiny_model(0), tiny_model(1).freeze()
    training = Training(batch_size=8, learning_rate=2e-3, micro_tokens=192, warmup=0.1)
    run = Trainer(student, training, Budget(steps=STEPS), 0, Ledger())

    def make(problems: Sequence[Problem]) -> list[Example]:
        requests = [Request(problem.prompt, problem) for problem in problems]
        sampling = Sampling(max_new_tokens=20, seed=run.clock[1])
        traces = student.generate(requests, sampling)
        return [Example(t[0].problem.id, student.encode("go"), t[0].tokens) for t in traces]

    problems = [Problem(str(i), f"go {i}") for i in range(20)]
    stages = [
        Stage("off", OffPolicy([example(i) for i in range(30)]), nll, share=0.5),
        Stage("on", OnPolicy(problems, make), forward_kl, share=0.5, mean="sequence"),
    ]
    for index, stage in enumerate(stages):
        run.run(index, stage, lambda: teacher, {})
    if run.accelerator.is_main_process:
        print(
            json.dumps([run.accelerator.num_processes, *(row["loss"] for row in run.state.curve)])
        )


main()
