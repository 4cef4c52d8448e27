"""Writing with a key-value cache, block by block, so that a batch is a function of what was asked and of nothing else.

Legend: B samples of a block, k rows of the batch (those that still write), T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from harness.models.cache import new_cache
from harness.models.codec import Codec
from harness.models.noise import choose, sample_seed
from harness.types import Request, Sampling, Trace

if TYPE_CHECKING:
    from harness.models.hf import HFModel

COMPACT = 0.75  # finished rows leave the batch when at most this share of it still writes

Progress = Callable[[int], object]  # called with how many more samples are finished


@dataclass(frozen=True, slots=True)
class Block:
    """What is computed together: requests of one padded width, each at the same sample indices.

    It is a function of the call's requests and of the sampling without `n`, so a resumed or a larger call computes the
    same batches and gets the same bits.
    """

    requests: tuple[Request, ...]
    places: tuple[int, ...]  # of the requests in the call
    samples: range  # sample indices; the last may lie beyond n
    sampling: Sampling
    width: int
    apart: bool = (
        False  # its samples do not depend on each other: known ones need no second drawing
    )

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """(place of the request, sample index) of each trace, in order."""
        return [(place, sample) for place in self.places for sample in self.samples]


class Writer:
    """One block being written: prefill each request once, spread it over its samples, then a token a step.

    Rows that end leave the batch once a quarter of it has; which rows share a step is a function of the block alone.
    """

    def __init__(self, lm: HFModel, block: Block, progress: Progress) -> None:
        self.lm, self.block, self.sampling, self.progress = lm, block, block.sampling, progress
        self.prompts = [request.encoded(lm) for request in block.requests]
        owners = [row for row in range(len(block.requests)) for _ in block.samples]
        limits = [self._limit(row) for row in range(len(block.requests))]
        shape = len(owners), max(limits)
        device = lm.device
        self.owners = torch.tensor(owners, device=device)  # [B] row of the request
        self.limits = torch.tensor(limits, device=device)[self.owners]
        self.seeds = torch.tensor(
            [
                sample_seed(prompt, request.prefix, block.sampling, sample)
                for prompt, request in zip(self.prompts, block.requests, strict=True)
                for sample in block.samples
            ],
            device=device,
        )
        self.eos = torch.tensor(sorted(lm.eos), device=device)
        self.tokens = torch.zeros(shape, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(shape, device=device)
        self.entropies = torch.zeros(shape, device=device)
        self.lengths = torch.zeros(len(owners), dtype=torch.long, device=device)
        self.finished = torch.tensor(
            [r.prefix[-1:] != () and r.prefix[-1] in lm.eos for r in block.requests], device=device
        )[self.owners]
        self.texts: dict[int, str] = {}  # of rows that met a stop string, cut there

    def _limit(self, row: int) -> int:
        """How many tokens a request may get: the sampling's limit, within the model's positions."""
        request = self.block.requests[row]
        given = len(self.prompts[row]) + len(request.prefix)
        most = getattr(self.lm.model.config, "max_position_embeddings", None)
        return room(request, given, most, self.sampling, self.lm.name)

    def run(self) -> list[Trace]:
        rows = (~self.finished & (self.limits > 0)).nonzero()[:, 0]
        self.progress(len(self.owners) - len(rows))
        if len(rows):
            self._write(rows)
        return self._traces()

    def _write(self, rows: Tensor) -> None:
        cache, logits, mask, position = self._prefill(rows)
        alive = torch.ones_like(rows, dtype=torch.bool)
        left = len(rows)
        for step in range(self.tokens.shape[1]):
            token = self._next(rows, logits, step)
            self.lengths[rows] += alive
            alive = alive & ~self._ends(rows, alive, token, step)
            before, left = left, int(alive.sum())
            self.progress(before - left)
            if not left:
                return
            if left <= COMPACT * len(rows):
                keep = alive.nonzero()[:, 0]
                cache.reorder_cache(keep)
                rows, alive, token = rows[keep], alive[keep], token[keep]
                mask, position = mask[keep], position[keep]
            seen = mask[:, : self.block.width + step + 1]
            logits = self._forward(token[:, None], seen, position[:, None] + step, cache)

    def _prefill(self, rows: Tensor) -> tuple[Any, Tensor, Tensor, Tensor]:
        """Cache, logits, the mask of the block's whole length, and the position of the first written token."""
        width, pad = self.block.width, self.lm.pad
        given = [(*p, *r.prefix) for p, r in zip(self.prompts, self.block.requests, strict=True)]
        ids = torch.tensor(
            [[pad] * (width - len(g)) + list(g) for g in given], device=self.lm.device
        )
        lengths = torch.tensor([len(g) for g in given], device=self.lm.device)
        places = torch.arange(width + self.tokens.shape[1], device=self.lm.device)
        mask = (places >= width - lengths[:, None]).long()
        cache = new_cache(self.lm.model.config)
        seen = mask[:, :width]
        logits = self._forward(ids, seen, positions(seen), cache)
        owners = self.owners[rows]
        cache.reorder_cache(owners)
        return cache, logits[owners], mask[owners], lengths[owners]

    def _forward(self, ids: Tensor, mask: Tensor, position: Tensor, cache: Any) -> Tensor:
        inputs = {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": position,
            "past_key_values": cache,
            "logits_to_keep": 1,
        }
        out = self.lm.model(**self.lm._accepted(inputs), use_cache=True)
        return out.logits[:, -1, : self.lm.vocabulary].float()

    def _next(self, rows: Tensor, logits: Tensor, step: int) -> Tensor:
        """Choose and record a token for each row of the batch."""
        logp = logits.log_softmax(dim=-1)
        token = choose(logits, self.sampling, self.seeds[rows], step)
        self.tokens[rows, step] = token
        self.logprobs[rows, step] = picked(logp, token)
        self.entropies[rows, step] = entropy(logp)
        return token

    def _ends(self, rows: Tensor, alive: Tensor, token: Tensor, step: int) -> Tensor:
        """Which rows end with this token: at an end token, a stop string, or their limit."""
        finished = torch.isin(token, self.eos)
        if self.sampling.stop:
            for place in (alive & ~finished).nonzero()[:, 0].tolist():
                finished[place] = self._stops(int(rows[place]), step)
        self.finished[rows] |= finished & alive
        return finished | (self.limits[rows] == step + 1)

    def _stops(self, row: int, step: int) -> bool:
        """Whether the text written so far holds a stop string; if so, keep the text before it."""
        longest = max(len(stop.encode()) for stop in self.sampling.stop)
        start = max(0, step + 1 - 2 * longest - 8)  # a window that the string cannot exceed
        tail = self.lm.decode(self.tokens[row, start : step + 1].tolist())
        if not any(stop in tail for stop in self.sampling.stop):
            return False
        prefix = self.block.requests[int(self.owners[row])].prefix
        written = self.tokens[row, : step + 1].tolist()
        text = before_stop(self.lm, prefix, written, self.sampling.stop)
        if text is not None:
            self.texts[row] = text
        return text is not None

    def _traces(self) -> list[Trace]:
        author = self.lm.version or self.lm.identity
        tokens, logprobs, entropies = (
            x.tolist() for x in (self.tokens, self.logprobs, self.entropies)
        )
        lengths, finished = self.lengths.tolist(), self.finished.tolist()
        traces = []
        for row, owner in enumerate(self.owners.tolist()):
            request, length = self.block.requests[owner], lengths[row]
            ids = (*request.prefix, *tokens[row][:length])
            text = self.texts.get(row)
            if text is None:
                text = self.lm.decode(ids[:-1] if ids and ids[-1] in self.lm.eos else ids)
            traces.append(
                Trace(
                    problem=request.problem,
                    tokens=ids,
                    text=text,
                    finished=finished[row],
                    prefix=len(request.prefix),
                    index=self.block.samples[row % len(self.block.samples)],
                    author=author,
                    logprobs=tuple(logprobs[row][:length]),
                    entropies=tuple(entropies[row][:length]),
                )
            )
        return traces


def room(request: Request, given: int, most: int | None, sampling: Sampling, name: str) -> int:
    """How many tokens a request may get behind those `given`, of a model with `most` positions."""
    if most is None:
        return sampling.max_new_tokens
    if given >= most:
        raise ValueError(
            f"problem {request.problem.id!r}: prompt and prefix have {given} tokens and {name} has "
            f"{most} positions; shorten the prompt or drop the problem"
        )
    return min(sampling.max_new_tokens, most - given)


def before_stop(
    codec: Codec, prefix: Sequence[int], written: Sequence[int], stop: Sequence[str]
) -> str | None:
    """The response's text before the first stop string in what was written, or None if there is none."""
    given = len(codec.decode(prefix))
    text = codec.decode((*prefix, *written))
    cuts = [place for each in stop if (place := text.find(each, given)) >= 0]
    return text[: min(cuts)] if cuts else None


def sample_ranges(n: int, most: int) -> Iterator[range]:
    """Sample indices 0, 1, 2-3, 4-7, … until n are covered, none wider than `most`: the same blocks for every n."""
    start = 0
    while start < n:
        size = min(max(1, start), most)
        yield range(start, start + size)
        start += size


def largest_power(value: int) -> int:
    """The largest power of two that is at most `value`."""
    return int(1 << (value.bit_length() - 1))


def positions(mask: Tensor) -> Tensor:
    """Position ids [B, T] that count real tokens only."""
    return (mask.cumsum(dim=-1) - 1).clamp_min(0)


def picked(logp: Tensor, targets: Tensor) -> Tensor:
    return logp.gather(-1, targets[:, None])[:, 0]


def entropy(logp: Tensor) -> Tensor:
    """H = -sum_v p_v log p_v in nats, [n]; a probability of zero adds nothing."""
    return -(logp.exp() * logp.clamp_min(-1e30)).sum(dim=-1)
