"""Cells as tasks of a Ray cluster, of one that is started for them or one that is there."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness import cell
from harness.cell import Job
from harness.config import Experiment
from harness.executors import remote
from harness.executors.remote import Died, Order

MEMORY = 100 * 2**20  # of a local cluster's object store, which holds nothing but orders
ANSWER = 120.0  # seconds that a node may take to import Retort


@dataclass
class Ray:
    """`--executor ray`: as many cells at a time as the cluster has room for."""

    address: str | None  # of a running cluster; None starts one on this machine
    gpus: float | None  # of a cell; default 1 where the cluster has any
    cpus: (
        int | None
    )  # of a cell, and its threads; default the suite's threads, or this machine's cores over workers

    def run(self, jobs: Sequence[Job], experiment: Experiment, display: Any) -> None:
        cpus = self.cpus or cell.threads_of(experiment)
        notes = jobs[0].folder / "ray"
        notes.mkdir(parents=True, exist_ok=True)
        with _connected(self.address):
            tasks = _Tasks(cpus, self._gpus())
            common = remote.common(jobs, cpus, logs=True)
            tasks.check(common)
            remote.run(jobs, experiment, display, tasks, common, notes)

    def _gpus(self) -> float:
        import ray

        if self.gpus is not None:
            return self.gpus
        return 1.0 if ray.cluster_resources().get("GPU") else 0.0


@dataclass
class _Tasks:
    """A `Cluster` of remote.py."""

    cpus: int
    gpus: float
    orders: dict[Any, Order] = field(default_factory=dict)

    def check(self, common: Order) -> None:
        """Refuse a cluster without room for a cell, or one with a node that would not give the same results."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self._room()
        ask = ray.remote(num_cpus=0, max_retries=0)(remote.entry())
        there = {
            ask.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            ).remote(common): node["NodeManagerHostname"]
            for node in _nodes()
        }
        for answer, name in there.items():
            try:
                error = ray.get(answer, timeout=ANSWER)
            except (ray.exceptions.GetTimeoutError, ray.exceptions.RayError) as failure:
                raise ValueError(
                    f"the Ray node {name} does not answer ({_first(failure)}): end it, or start it again"
                ) from None
            if error is not None:
                raise error

    def _room(self) -> None:
        need = {"CPU": self.cpus, "GPU": self.gpus}
        for node in _nodes():
            if all(node["Resources"].get(kind, 0) >= amount for kind, amount in need.items()):
                return
        sizes = ", ".join(
            f"{node['NodeManagerHostname']} {node['Resources'].get('CPU', 0):g} CPUs and {node['Resources'].get('GPU', 0):g} GPUs"
            for node in _nodes()
        )
        raise ValueError(
            f"a cell needs {self.cpus} CPUs and {self.gpus:g} GPUs, and no node of the Ray cluster has them ({sizes or 'no nodes'}): "
            "give less with --cpus-per-cell and --gpus-per-cell, or add a node"
        )

    def submit(self, orders: Sequence[Order]) -> list[Any]:
        import ray

        self._room()  # nodes may have died, and a task without room would wait for ever
        # Deaths are counted by us, over all of a cell's lives.
        work = ray.remote(num_cpus=self.cpus, num_gpus=self.gpus, max_retries=0)(remote.entry())
        tasks = [work.options(name=Path(order["notes"]).name).remote(order) for order in orders]
        self.orders.update(zip(tasks, orders, strict=True))
        return tasks

    def ended(self, tasks: Sequence[Any]) -> Sequence[Any]:
        import ray

        done, _ = ray.wait(list(tasks), timeout=remote.PAUSE)
        return done

    def result(self, task: Any) -> Exception | None:
        import ray

        try:
            return ray.get(task)
        except ray.exceptions.RayTaskError:  # a bug keeps its traceback
            raise
        except ray.exceptions.RayError as death:
            raise Died(_first(death)) from None

    def state(self, task: Any) -> tuple[str, int, int] | None:
        return None

    def log(self, task: Any) -> Path:
        return Path(self.orders[task]["notes"] + ".log")

    def cancel(self, tasks: Sequence[Any]) -> None:
        import ray

        for task in tasks:
            with contextlib.suppress(Exception):  # the cluster may be what is broken
                ray.cancel(task, force=True)


@contextlib.contextmanager
def _connected(address: str | None) -> Iterator[None]:
    """A connection to a cluster; one that was started for it ends with it."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    if address is not None and address.startswith("ray://"):
        raise ValueError(
            f"--ray-address {address!r}: run this on a machine of the cluster, with --ray-address auto or HOST:PORT"
        )
    if address not in (None, "auto"):
        _answering(address)
    own: dict[str, Any] = {"include_dashboard": False, "object_store_memory": MEMORY}
    try:
        ray.init(
            address or "local",
            log_to_driver=False,
            logging_level=logging.ERROR,
            **(own if address is None else {}),
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"--ray-address {address}: {_first(error)} (`ray start --head` starts a cluster)"
            if address
            else f"Ray does not start: {_first(error)}"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def _answering(address: str) -> None:
    """Ask at once, as Ray would try for a minute and then end the process."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--ray-address {address}: no Ray cluster answers there ({error}): give HOST:PORT as `ray start --head` printed it"
        ) from None


def _nodes() -> list[dict[str, Any]]:
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def _first(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
