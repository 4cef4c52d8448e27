"""LoRA through peft, injected into a Transformers model in place: its class, head and forward stay what they were.

W' = W + (alpha / r) B A   (Hu et al. 2021, arXiv:2106.09685, sec. 4.1)   A [r, in] random, B [out, r] zero at the start
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from harness.config import Adapter

NAME = "default"  # peft's name for the one adapter
TRAINED = ".lora_"  # in the names of an adapter's tensors


class Files(NamedTuple):
    """An adapter in peft's format."""

    config: Any
    tensors: dict[str, Tensor]

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.config.save_pretrained(str(folder))
        save_file(self.tensors, folder / "adapter_model.safetensors", {"format": "pt"})


def attach(model: Any, adapter: Adapter, seed: int) -> None:
    """Freeze a model and give it an adapter, in fp32 and drawn from the seed; nothing else that is random moves."""
    # peft loads bitsandbytes where that is installed, which then tells of a faster kernel for 4-bit weights; there are none.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    from peft import LoraConfig, inject_adapter_in_model

    targets(model, adapter)
    config = LoraConfig(
        r=adapter.r,
        lora_alpha=2 * adapter.r if adapter.alpha is None else adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=adapter.targets,
        task_type="CAUSAL_LM",
        base_model_name_or_path=model.config.name_or_path or None,
    )
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        inject_adapter_in_model(config, model, NAME)
    for name, parameter in model.named_parameters():
        if TRAINED in name:
            parameter.data = parameter.data.float()


def targets(model: Any, adapter: Adapter) -> dict[str, Any]:
    """The modules that it adapts; refuses names that no linear module answers to, and the head, whose weight the loss uses as it is."""
    head = model.get_output_embeddings()
    able = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }
    wanted = adapter.targets
    if wanted == "all-linear":
        return able
    if isinstance(wanted, str):
        found = [name for name, _ in model.named_modules() if re.fullmatch(wanted, name)]
        wrong = [name for name in found if name not in able] if found else [wanted]
    else:
        found = [n for n in able if any(n == w or n.endswith(f".{w}") for w in wanted)]
        wrong = [w for w in wanted if not any(n == w or n.endswith(f".{w}") for n in found)]
    if wrong:
        known = sorted({name.rpartition(".")[2] for name in able})
        raise ValueError(
            f"adapter.targets: {', '.join(wrong[:3])} cannot be adapted; the linear modules of this model are "
            f"{', '.join(known)} (a list of such names, a pattern of whole names, or all-linear; never the head)"
        )
    return {name: able[name] for name in found}


def size(model: Any, adapter: Adapter) -> int:
    """How many weights it has: r (in + out) for each module."""
    return sum(adapter.r * sum(m.weight.shape) for m in targets(model, adapter).values())


def layers(model: nn.Module) -> dict[str, Any]:
    """The adapted modules by name."""
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


@contextmanager
def off(model: nn.Module) -> Iterator[None]:
    """The adapter off inside, and back to what it was."""
    # Set on the layers: peft's enable_adapters would switch requires_grad too, on at the end whatever it was before.
    before = {layer: layer._disable_adapters for layer in layers(model).values()}
    try:
        for layer in before:
            layer._disable_adapters = True
        yield
    finally:
        for layer, value in before.items():
            layer._disable_adapters = value


def trained(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The adapter's part of a state."""
    return {name: tensor for name, tensor in state.items() if TRAINED in name}


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """The weights under the adapter, by the names that they have without one."""
    state = model.state_dict()
    return {k.replace(".base_layer.", "."): v for k, v in state.items() if TRAINED not in k}


@torch.no_grad()
def merged(layer: Any) -> Tensor:
    """W + (alpha / r) B A of one module, in fp32."""
    delta = layer.get_delta_weight(NAME)
    return layer.get_base_layer().weight.to(delta.dtype) + delta


def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """The plain model's state with the adapter merged in; what is not adapted is not copied."""
    return base_state(model) | {f"{n}.weight": merged(layer) for n, layer in layers(model).items()}


def untouched(model: nn.Module) -> bool:
    """Whether B is still zero, so that the model computes what it does without its adapter, bit for bit."""
    return not any(layer.lora_B[NAME].weight.any() for layer in layers(model).values())


def files(model: Any) -> Files:
    """What peft's save would write."""
    state = trained(model.state_dict())
    named = {
        f"base_model.model.{name.replace(f'.{NAME}.', '.')}": tensor.detach().cpu().contiguous()
        for name, tensor in state.items()
    }
    config = copy.copy(model.peft_config[NAME])
    config.inference_mode = True
    if not isinstance(config.target_modules, str):
        config.target_modules = sorted(config.target_modules)  # a set is written in any order
    return Files(config, named)


def unwrap(model: Any, *, merge: bool) -> None:
    """Make it a plain model again, a module at a time: with the adapter merged in, and then in fp32, or without it."""
    for name, layer in layers(model).items():
        plain = layer.get_base_layer()
        if merge:
            plain.weight = nn.Parameter(merged(layer), requires_grad=False)
        model.set_submodule(name, plain)
    del model.peft_config
    if merge:
        model.float()
