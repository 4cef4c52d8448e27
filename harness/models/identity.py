"""What decides a model's outputs, as one digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor


def digest(what: Any) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()


SETTINGS_OF_A_FILE = {  # they change with where and how a model was stored, not with what it computes
    "_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip


def identity(
    model: Any,
    tokenizer: Any,
    eos: Collection[int],
    state: Mapping[str, Tensor] | None = None,
    options: Mapping[str, Any] | None = None,
) -> str:
    """Digest of weights, configuration, tokenizer, template, end tokens, dtype and engine.

    `state` takes the place of the model's own; `options` are what else changes its numbers, and say nothing where there are none.
    """
    hasher = hashlib.sha256()
    add(hasher, weights(model) if state is None else state)
    what = {
        "config": settings(model.config),
        "tokenizer": tokenizer_json(tokenizer),
        "template": tokenizer.chat_template,
        "eos": sorted(eos),
        "engine": ["hf", transformers.__version__, torch.__version__],
        **(options or {}),
    }
    hasher.update(digest(what).encode())
    return hasher.hexdigest()


def adapted(base: str, adapter: Mapping[str, Any], state: Mapping[str, Tensor]) -> str:
    """Digest of an adapter over a model of known identity."""
    hasher = hashlib.sha256(digest([base, adapter]).encode())
    add(hasher, state)
    return hasher.hexdigest()


def add(hasher: Any, state: Mapping[str, Tensor]) -> None:
    """Every tensor's name, type, shape and bytes."""
    for name, tensor in sorted(state.items()):
        hasher.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        hasher.update(tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy())


def weights(model: Any) -> Mapping[str, Tensor]:
    """A model's state; what Accelerate keeps elsewhere is fetched."""
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        from accelerate.utils.modeling import get_state_dict_offloaded_model

        return get_state_dict_offloaded_model(model)
    return model.state_dict()


def settings(config: Any) -> dict[str, Any]:
    return {k: v for k, v in config.to_dict().items() if k not in SETTINGS_OF_A_FILE}


def tokenizer_json(tokenizer: Any) -> Any:
    """What decides the tokens; padding and truncation are left to whoever calls."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    return {
        k: v for k, v in json.loads(backend.to_str()).items() if k not in ("padding", "truncation")
    }
