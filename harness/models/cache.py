"""A key-value cache that writes in place: the next token costs its own row, not a copy of all that came before."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

ROOM = 128  # positions a buffer starts with beyond its first use; it doubles when full


class BufferedLayer(DynamicLayer):
    """A full-attention layer; `keys` and `values` are views of what is filled in two larger buffers."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.key_buffer = key_states.new_empty(0)
        self.value_buffer = value_states.new_empty(0)
        self.length = self.capacity = 0
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self.length = self.length, self.length + key_states.shape[-2]
        if self.length > self.capacity:
            self.capacity = max(self.length + ROOM, 2 * start)
            self.key_buffer = self._grown(self.key_buffer, key_states, start)
            self.value_buffer = self._grown(self.value_buffer, value_states, start)
        self.key_buffer[:, :, start : self.length] = key_states
        self.value_buffer[:, :, start : self.length] = value_states
        return self._view()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep (or repeat) the given rows."""
        self.key_buffer = self._rows(self.key_buffer, beam_idx)
        self.value_buffer = self._rows(self.value_buffer, beam_idx)
        self._view()

    def _view(self) -> tuple[Tensor, Tensor]:
        self.keys = self.key_buffer[:, :, : self.length]
        self.values = self.value_buffer[:, :, : self.length]
        return self.keys, self.values

    def _grown(self, buffer: Tensor, like: Tensor, filled: int) -> Tensor:
        batch, heads, _, width = like.shape
        grown = like.new_empty(batch, heads, self.capacity, width)
        if filled:
            grown[:, :, :filled] = buffer[:, :, :filled]
        return grown

    def _rows(self, buffer: Tensor, rows: Tensor) -> Tensor:
        picked = buffer.new_empty(len(rows), *buffer.shape[1:])
        torch.index_select(buffer[:, :, : self.length], 0, rows, out=picked[:, :, : self.length])
        return picked


def new_cache(config: Any) -> DynamicCache:
    """The cache that the architecture asks for, with its ordinary full-attention layers buffered."""
    cache = DynamicCache(config=config)
    cache.layers = [
        BufferedLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    return cache
