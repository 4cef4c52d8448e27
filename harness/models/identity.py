"""What decides a model's outputs, as one digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from typing import Any

import torch
import transformers


def digest(what: Any) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()


SETTINGS_OF_A_FILE = {  # they change with where and how a model was stored, not with what it computes
    "_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip


def identity(model: Any, tokenizer: Any, eos: Collection[int]) -> str:
    """Digest of weights, configuration, tokenizer, template, end tokens, dtype and engine."""
    hasher = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        hasher.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        hasher.update(tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy())
    what = {
        "config": settings(model.config),
        "tokenizer": tokenizer_json(tokenizer),
        "template": tokenizer.chat_template,
        "eos": sorted(eos),
        "engine": ["hf", transformers.__version__, torch.__version__],
    }
    hasher.update(digest(what).encode())
    return hasher.hexdigest()


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
