"""What the likeliest tokens say of an entropy."""

from __future__ import annotations

import torch
from torch import Tensor


def entropy_bounds(top: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
    """The middle of where H can lie, and half the width, from the K largest log-probabilities [n, K], nats: each [n].

    H_K + r ln(1 / min(p_K, r)) <= H <= H_K + r ln((V - K) / r),   r = 1 - sum of the K,   H_K = -sum_{v <= K} p_v ln p_v

    The V - K others sum to r, and none is above c = min(p_K, r): -sum q ln q >= sum q ln(1 / c) = r ln(1 / c), and it is largest
    where all are r / (V - K). With K >= V, or no mass left, both are H_K.
    """
    top = top[:, :vocabulary].double()
    p = top.exp()
    known = -(p * top.clamp_min(-1e30)).sum(-1)
    others, last = vocabulary - top.shape[-1], p[:, -1]
    # Rounded log-probabilities may leave a rest that no tail of V - K tokens up to p_K could have.
    rest = (1 - p.sum(-1)).clamp_min(0).minimum(others * last)
    low = -torch.xlogy(rest, rest.minimum(last))
    high = torch.xlogy(rest, torch.tensor(float(max(1, others)))) - torch.xlogy(rest, rest)
    return known + (low + high) / 2, (high - low) / 2
