"""The processes of one run under `accelerate launch`: what they agree on, and what they share out.

Each rank runs the same program, so whatever may turn out otherwise on another (a file that is there already, a claim, a
verdict, a sample at a tie) is found by one and told to all. A process that was not launched so is the one rank there is.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar, cast

T = TypeVar("T")

# Ranks wait for one that judges a benchmark for hours; the launcher ends all of them when one dies, so nothing is
# gained by the half hour of gloo or the ten minutes of NCCL.
PATIENCE = timedelta(days=14)


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    return int(os.environ["RANK"]) if world() > 1 else 0


def on_this_machine() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", world())) if world() > 1 else 1


def first() -> bool:
    """Whether this rank reads, writes, judges and speaks for all."""
    return rank() == 0


def agree(find: Callable[[], T]) -> T:
    """What rank 0 finds, on every rank."""
    if world() == 1:
        return find()
    box = [find() if first() else None]
    _distributed().broadcast_object_list(box, src=0, group=_group())
    return cast(T, box[0])


def gather(mine: T) -> list[T]:
    """What each rank has, in their order, on every rank."""
    if world() == 1:
        return [mine]
    found: list[Any] = [None] * world()
    _distributed().all_gather_object(found, mine, group=_group())
    return found


def shared(count: int, make: Callable[[int], T]) -> list[T]:
    """make(0), make(1), …, each by one rank, on every rank."""
    parts = gather([make(i) for i in range(rank(), count, world())])
    return [parts[i % world()][i // world()] for i in range(count)]


def speaks() -> bool:
    """Whether this rank is the first that ends with an error: the launcher ends the others, and one message is enough."""
    if world() == 1:
        return True
    with contextlib.suppress(Exception):  # the store may have gone with the launcher
        store = _distributed().distributed_c10d._get_default_store()
        return bool(store.add("retort/ended", 1) == 1)
    return True


def _distributed() -> Any:
    import torch.distributed  # heavy, and not wanted where there is one rank

    return torch.distributed


@cache
def _group() -> Any:
    """Over which Python objects go: by gloo on any machine, past the collectives of training."""
    join()
    return _distributed().new_group(backend="gloo", timeout=PATIENCE)


def join() -> None:
    """Meet the other ranks, before any other part of Accelerate does with its own timeout."""
    if world() > 1:
        import torch
        from accelerate import PartialState

        # Accelerate asks for it by default, and Transformers would then load weights on rank 0 alone, a teacher's too.
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
        PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
