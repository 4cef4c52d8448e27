"""From examples to a padded batch and its flat loss tokens."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain
from typing import NamedTuple

import torch
from torch import Tensor

from harness.types import Batch, Example, Ids, Tokens

MULTIPLE = 32  # padded lengths are multiples of this, so that kernels see few shapes


class Collated(NamedTuple):
    """A batch, its loss tokens, and the row of the batch that each of them belongs to."""

    batch: Batch
    tokens: Tokens
    sequence: Tensor  # [N]

    def to(self, device: torch.device | str) -> Collated:
        batch, tokens = self.batch, self.tokens
        return Collated(
            Batch(
                batch.ids.to(device),
                batch.mask.to(device),
                batch.index.to(device),
                None if batch.positions is None else batch.positions.to(device),
            ),
            Tokens(
                tokens.targets.to(device),
                tokens.weights.to(device),
                {name: values.to(device) for name, values in tokens.scalars.items()},
                tokens.progress,
            ),
            self.sequence.to(device),
        )


def collate(
    examples: Sequence[Example],
    pad: int,
    multiple: int = MULTIPLE,
    *,
    teacher: bool = False,
    packed: bool = False,
    progress: float = 0.0,
) -> Collated:
    """Pad on the right; `index` points at the positions that predict the loss tokens, row by row, in order.

    With `teacher` the prompts are the teacher's: other positions, the same loss tokens in the same order. `packed` lays all
    end to end in one row, without padding.
    """
    prompts = [prompt(example, teacher) for example in examples]
    kept = [loss_positions(example) for example in examples]
    for example, start in zip(examples, prompts, strict=True):
        check(example, start)
    names = scalar_names(examples)
    sequences = [(*p, *e.response) for p, e in zip(prompts, examples, strict=True)]
    lengths = [len(sequence) for sequence in sequences]
    positions = None
    if packed:
        starts = [0, *accumulate(lengths)]
        ids, mask = right_padded([tuple(chain(*sequences))], pad, starts[-1])
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
    else:
        width = padded(max(lengths), multiple)
        starts = [row * width for row in range(len(lengths))]
        ids, mask = right_padded(sequences, pad, width)
    index = [
        starts[row] + len(prompts[row]) + t - 1 for row, places in enumerate(kept) for t in places
    ]
    targets = [e.response[t] for e, places in zip(examples, kept, strict=True) for t in places]
    weights = [
        e.weight * (1.0 if e.token_weights is None else e.token_weights[t])
        for e, places in zip(examples, kept, strict=True)
        for t in places
    ]
    scalars = {
        name: torch.tensor(
            [scalar(e, name, t) for e, places in zip(examples, kept, strict=True) for t in places],
            dtype=torch.float32,
        )
        for name in names
    }
    sequence = [row for row, places in enumerate(kept) for _ in places]
    return Collated(
        Batch(ids, mask, torch.tensor(index, dtype=torch.long), positions),
        Tokens(
            torch.tensor(targets, dtype=torch.long),
            torch.tensor(weights, dtype=torch.float32),
            scalars,
            progress,
        ),
        torch.tensor(sequence, dtype=torch.long),
    )


def prompt(example: Example, teacher: bool) -> Ids:
    if teacher and example.teacher_prompt is not None:
        return example.teacher_prompt
    return example.prompt


def loss_positions(example: Example) -> list[int]:
    if example.loss is None:
        return list(range(len(example.response)))
    return [t for t, counts in enumerate(example.loss) if counts]


def scalar(example: Example, name: str, t: int) -> float:
    value = example.scalars[name]
    return value[t] if isinstance(value, tuple) else value


def padded(length: int, multiple: int = MULTIPLE) -> int:
    """`length` rounded up."""
    return -(-length // multiple) * multiple


def right_padded(sequences: Sequence[Ids], pad: int, width: int) -> tuple[Tensor, Tensor]:
    """Token ids and mask, both [B, width]."""
    ids = torch.tensor([(*s, *[pad] * (width - len(s))) for s in sequences], dtype=torch.long)
    lengths = torch.tensor([len(s) for s in sequences])
    return ids, (torch.arange(width) < lengths[:, None]).long()


def check(example: Example, start: Ids) -> None:
    """Refuse what no position could predict, and lists of a wrong length."""
    if not start:
        raise ValueError(
            f"problem {example.problem!r}: an example without a prompt cannot be run; "
            "weight-0 examples are counted, not collated"
        )
    per_token = {"loss": example.loss, "token_weights": example.token_weights}
    per_token |= {
        f"scalars[{name!r}]": value
        for name, value in example.scalars.items()
        if isinstance(value, tuple)
    }
    for name, values in per_token.items():
        if values is not None and len(values) != len(example.response):
            raise ValueError(
                f"problem {example.problem!r}: {name} has {len(values)} values for a response of "
                f"{len(example.response)} tokens; give one a response token"
            )


def scalar_names(examples: Sequence[Example]) -> list[str]:
    names = sorted({name for example in examples for name in example.scalars})
    for example in examples:
        missing = [name for name in names if name not in example.scalars]
        if missing:
            raise ValueError(
                f"problem {example.problem!r} lacks the scalars {', '.join(missing)} that other examples of "
                "its batch have; give them to all, or train them under different terms"
            )
    return names
