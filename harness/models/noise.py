"""Sampling noise that belongs to a sample, not to a batch.

A token is the arg-max of filtered logits plus Gumbel noise, and the noise is a hash of (sample seed, step, token id). So a
sample is the same whatever shares its batch, on whatever device, up to the rounding of the logits themselves.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:  # vLLM's process reads this file without the rest of the bench
    from harness.types import Sampling


def signed(value: int) -> int:
    """The 64-bit pattern of `value` as the int64 that a tensor holds."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


GOLDEN = signed(0x9E3779B97F4A7C15)
FIRST = signed(0xBF58476D1CE4E5B9)
SECOND = signed(0x94D049BB133111EB)


def sample_seed(
    prompt: Sequence[int], prefix: Sequence[int], sampling: Sampling, index: int
) -> int:
    """Seed of one sample: a hash of what it serves. `n` is left out, so asking for more keeps the first ones."""
    what = [
        sampling.seed,
        list(prompt),
        list(prefix),
        float(sampling.temperature),
        float(sampling.top_p),
        sampling.top_k,
        sampling.max_new_tokens,
        list(sampling.stop),
        index,
    ]
    digest = hashlib.sha256(json.dumps(what).encode()).digest()
    return signed(int.from_bytes(digest[:8], "big"))


def mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 on int64 tensors, whose products wrap around."""
    x = (x ^ unsigned_shift(x, 30)) * FIRST
    x = (x ^ unsigned_shift(x, 27)) * SECOND
    return x ^ unsigned_shift(x, 31)


def unsigned_shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def gumbel(seeds: Tensor, step: int | Tensor, vocabulary: int) -> Tensor:
    """Standard Gumbel noise [n, V] for the samples' `step`-th written token; one step, or [n]."""
    steps = (torch.as_tensor(step, device=seeds.device) + 1) * GOLDEN
    tokens = torch.arange(1, vocabulary + 1, device=seeds.device) * GOLDEN
    bits = mix(mix(seeds + steps)[:, None] + tokens)
    uniform = (unsigned_shift(bits, 11).double() + 0.5) * 2.0**-53  # never 0 or 1
    return -(-uniform.log()).log().float()


def keep_top(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits with everything outside the top k, then outside the nucleus of mass p, at -inf; ties at the edge stay."""
    if 0 < top_k < logits.shape[-1]:
        edge = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < edge, -torch.inf)
    if top_p < 1.0:
        ordered = logits.sort(dim=-1, descending=True).values
        mass = ordered.softmax(dim=-1)
        outside = mass.cumsum(dim=-1) - mass >= top_p
        outside[:, 0] = False
        edge = ordered.masked_fill(outside, torch.inf).min(dim=-1, keepdim=True).values
        logits = logits.masked_fill(logits < edge, -torch.inf)
    return logits


def choose(logits: Tensor, sampling: Sampling, seeds: Tensor, step: int) -> Tensor:
    """Next tokens [n] from logits [n, V] (float32)."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    scores = keep_top(logits / sampling.temperature, sampling.top_k, sampling.top_p)
    return (scores + gumbel(seeds, step, logits.shape[-1])).argmax(dim=-1)
