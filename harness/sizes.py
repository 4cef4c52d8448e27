"""What a model weighs and how fast a GPU is, from configurations and data sheets; nothing is loaded.

Legend: N parameters, L layers, H hidden width, V vocabulary, T padded tokens of a forward pass.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from harness import models
from harness.config import Checkpoint, ModelSpec, Training, YesNo, model_spec, nearest

GIB = 2**30


class GPU(NamedTuple):
    """One accelerator, as its maker's data sheet says: bf16 without sparsity."""

    memory: float  # bytes
    flops: float  # a second
    bandwidth: float  # bytes a second
    source: str


GPUS = {
    "b200": GPU(180e9, 2250e12, 8.0e12, "NVIDIA HGX B200 data sheet"),
    "h200": GPU(141e9, 989e12, 4.8e12, "NVIDIA H200 SXM data sheet"),
    "h100": GPU(80e9, 989e12, 3.35e12, "NVIDIA H100 SXM data sheet"),
    "a100": GPU(80e9, 312e12, 2.039e12, "NVIDIA A100 80GB SXM data sheet"),
    "a100-40": GPU(40e9, 312e12, 1.555e12, "NVIDIA A100 40GB data sheet"),
    "l40s": GPU(48e9, 362e12, 0.864e12, "NVIDIA L40S data sheet"),
    "l4": GPU(24e9, 121e12, 0.3e12, "NVIDIA L4 data sheet"),
    "a10": GPU(24e9, 125e12, 0.6e12, "NVIDIA A10 data sheet"),
    "rtx4090": GPU(24e9, 165e12, 1.008e12, "NVIDIA Ada architecture white paper"),
}


def gpu(name: str) -> GPU:
    """By its name here, or as its maker writes it: `H100 SXM`, `RTX 4090`."""
    key = name.lower().removesuffix("sxm").replace(" ", "")
    if key not in GPUS:
        raise ValueError(f"unknown GPU {name!r}: {nearest(key, GPUS)}")
    return GPUS[key]


@dataclass(frozen=True)
class Shape:
    """What decides a language model's memory and time."""

    name: str
    parameters: int  # N, embeddings included once
    layers: int  # L
    hidden: int  # H
    kv: int  # key-value heads times their width
    vocabulary: int  # rows of the head
    source: str  # what this is known from
    adapter: int = 0  # weights of its adapter, which alone are trained
    itemsize: float | None = None  # bytes of a weight, where they do not follow from the machine
    offload: bool = False  # its weights take what is left on the GPU

    @property
    def trained(self) -> int:
        return self.adapter or self.parameters

    def weights(self, cuda: bool, default: float) -> float:
        """Bytes of its weights on the device."""
        if self.offload and cuda:
            return 0.0
        return self.parameters * (default if self.itemsize is None else self.itemsize)

    def cache(self, length: int, itemsize: int) -> int:
        """Bytes of keys and values of one sequence."""
        return 2 * self.layers * self.kv * length * itemsize


def shape(spec: Any, known: Mapping[str, Path]) -> Shape:
    """The shape of a suite's model: from its configuration where that is here, else from the size in its name."""
    name, path = models.find(spec, known)
    line = model_spec(spec)
    line = model_spec(line.ask) if isinstance(line, YesNo) else line
    config = configuration(name, path)
    if config is None:
        return _as_told(named(name), line)
    import torch
    from transformers import AutoModelForCausalLM

    text = config.get_text_config(decoder=True)
    heads = text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    with torch.device("meta"):  # shapes without weights
        model = AutoModelForCausalLM.from_config(config)
    count = sum(p.numel() for p in model.parameters())
    found = Shape(
        name,
        count,
        text.num_hidden_layers,
        text.hidden_size,
        (getattr(text, "num_key_value_heads", None) or heads) * width,
        text.vocab_size,
        "its config.json",
    )
    return _as_told(found, line, model)


def _as_told(found: Shape, line: ModelSpec, model: Any = None) -> Shape:
    """With what the suite's line says of types and of an adapter: r (in + out) weights for each adapted module, which is about
    19 r L H of a model that is known by its name alone (four projections of H, three of an 8/3 H wide feed-forward)."""
    if not isinstance(line, Checkpoint):
        return found
    adapter = 0
    if line.adapter is not None:
        from harness.models import adapters

        rank = line.adapter.r
        adapter = 19 * rank * found.layers * found.hidden
        adapter = adapter if model is None else adapters.size(model, line.adapter)
    itemsize = {"8bit": 1.0, "4bit": 0.5, "fp32": 4.0, "bf16": 2.0, "fp16": 2.0}.get(
        line.quantize or line.dtype or ""
    )
    return replace(found, adapter=adapter, itemsize=itemsize, offload=line.offload)


def check_adapter(spec: Any, known: Mapping[str, Path]) -> None:
    """Refuse an adapter for modules that the model does not have, as far as its configuration is here."""
    line = model_spec(spec)
    if isinstance(line, Checkpoint) and line.adapter is not None:
        name, path = models.find(spec, known)
        if configuration(name, path) is not None:
            shape(spec, known)


def configuration(name: str, path: Path) -> Any:
    """A model's configuration out of its folder or the local cache; None where it is in neither."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path if path.is_dir() else name, local_files_only=True)
    except (OSError, ValueError):
        return None


def named(name: str) -> Shape:
    """A dense transformer of the size in a model's name (`…-7B`), N = 12 L H^2 and H = 128 L   (aspect ratio of
    Kaplan et al. 2020, arXiv:2001.08361, sec. 3.2), a quarter of the width for keys and values."""
    found = re.search(r"(?<![\d.])(\d+(?:\.\d+)?)([bm])(?![a-z])", name.lower())
    if found is None:
        raise ValueError(
            f"model {name!r} is not here and its name says no size, so nothing can be planned: give a folder with its "
            "config.json, or fill the local cache (`hf download ID config.json`)"
        )
    count = float(found[1]) * {"b": 1e9, "m": 1e6}[found[2]]
    layers = max(1, round((count / (12 * 128**2)) ** (1 / 3)))
    width = 128 * layers
    return Shape(name, int(count), layers, width, width // 4, 151_936, "the size in its name")


def pass_tokens(training: Training, length: int) -> int:
    """Padded tokens of the largest forward pass; an example that is longer than `micro_tokens` has one of its own."""
    return max(training.micro_tokens, min(training.max_length, length))


class Memory(NamedTuple):
    """Bytes on one GPU (or in one worker), at most, by what they hold."""

    student: float
    frozen: float
    training: float
    writing: float
    merged: float = 0.0  # a student that had an adapter, once that is merged

    @property
    def peak(self) -> float:
        """Training and writing take turns; the models stay, until a merged student is judged alone."""
        trained = self.student + self.frozen + max(self.training, self.writing)
        return max(trained, self.merged + max(self.frozen, self.writing))


def memory(
    student: Shape,
    frozen: Mapping[str, Shape],
    micro_tokens: int,
    length: int,
    cuda: bool,
    checkpointing: bool = False,
) -> Memory:
    """What a cell holds: 16 N of the student (fp32 weights and gradients, two moments of Adam) and 2 N of its cast in autocast,
    or as much of its adapter beside the frozen weights, and 4 N once that is merged, in fp32; the frozen models' weights; 34 T H L
    of activations in bf16, no attention matrix   (Korthikanti et al. 2022, arXiv:2205.05198, eq. 2), with gradient checkpointing
    34 T H of one layer and 2 T H at the border of each   (ibid., sec. 5); the logits of a chunk of both models with their
    gradients, and the head's; or the keys and values of a block of samples of `length` tokens."""
    from harness.models.hf import CACHE_BYTES, ROWS
    from harness.objectives.chunked import ACCELERATOR_BYTES, CHUNK_BYTES

    itemsize = 2 if cuda else 4
    chunk = ACCELERATOR_BYTES if cuda else CHUNK_BYTES["cpu"]
    layers = 17 + student.layers if checkpointing else 17 * student.layers
    activations = itemsize * micro_tokens * student.hidden * layers
    own = 4.0 if student.adapter or student.itemsize is None else student.itemsize
    trained = student.trained * (4 * own + (2 if cuda and own == 4 else 0))
    below = student.weights(cuda, itemsize) if student.adapter else 0.0
    head = 4 * student.vocabulary * student.hidden
    widest = max([student, *frozen.values()], key=lambda each: each.hidden)
    passing = 8 * itemsize * micro_tokens * widest.hidden  # of a frozen model: a layer at a time
    caches = [
        min(ROWS, max(1, CACHE_BYTES // each.cache(length, itemsize)))
        * each.cache(length, itemsize)
        for each in (student, *frozen.values())
    ]
    return Memory(
        trained + below,
        sum(each.weights(cuda, itemsize) for each in frozen.values()),
        activations + 4 * chunk + head + passing,
        max(caches),
        4.0 * student.parameters if student.adapter else 0.0,
    )


def writing_seconds(
    model: Shape, tokens: float, rows: int, length: int, on: GPU, utilisation: float
) -> float:
    """Time to write: a step of `rows` sequences reads all weights and caches, or is bound by its 2 N FLOPs a token.

    t = tokens / rows * max((2 N + rows c) / (u bandwidth), 2 N rows / (u flops))     c: keys and values half way
    """
    moved = 2 * model.parameters + rows * model.cache(length // 2, 2)
    step = max(moved / on.bandwidth, 2 * model.parameters * rows / on.flops) / utilisation
    return tokens / rows * step
