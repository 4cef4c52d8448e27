"""Any causal language model of Transformers: writes, scores, and offers its hidden states and head for training.

Legend: B sequences, T positions, N loss tokens, H hidden width, V vocabulary, R requests of a block, S samples of each.
"""

from __future__ import annotations

import copy
import inspect
import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from harness.config import Adapter
from harness.models import adapters
from harness.models.collate import padded, right_padded
from harness.models.decoding import (
    Block,
    Progress,
    Writer,
    entropy,
    largest_power,
    picked,
    positions,
    sample_ranges,
)
from harness.models.identity import adapted, digest, identity
from harness.models.text import Text
from harness.types import Batch, Capability, Ids, Request, Sampling, Scores, Trace

if TYPE_CHECKING:
    from harness.models.vllm import StudentEngine

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ROWS = 512  # most rows of a generation block
CACHE_BYTES = 8 << 30  # most memory of a block's key-value cache
SCORED_TOKENS = 16384  # tokens of a scoring batch, padding included
LOGITS = 1 << 24  # logits in memory at once when scoring


class HFModel(Text):
    """A Transformers model and its tokenizer as a `LanguageModel`."""

    capabilities: frozenset[Capability] = frozenset(("generate", "score", "logits"))

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        name: str | None = None,
        rows: int = ROWS,
        cache_bytes: int = CACHE_BYTES,
        adapter: Adapter | None = None,
        attention: str | None = None,
    ) -> None:
        name = name or model.config.name_or_path or type(model).__name__
        super().__init__(tokenizer, name, end_tokens(model, tokenizer, name))
        self.model = model
        self.adapter = adapter  # in the model already
        self.attention = attention  # where it is not the one that Transformers chooses
        self.kept: adapters.Files | None = None  # an adapter that was merged
        self.rows = rows
        self.cache_bytes = cache_bytes
        if len(self._head().weight) < self.vocabulary:
            raise ValueError(
                f"{self.name}: the head has {len(self._head().weight)} rows, fewer than the {self.vocabulary} tokens "
                "of the tokenizer; call model.resize_token_embeddings, or use the tokenizer it was trained with"
            )
        self._accepts = frozenset(inspect.signature(model.forward).parameters)
        self._identity: tuple[int, str] | None = None
        self._base_identity: str | None = None
        # Set while the weights change with every step: what traces carry, so that not all weights are hashed each time.
        self.version: str | None = None
        # What writes in its place; it scores and trains itself.
        self.engine: StudentEngine | None = None
        self._head_checked = self._packing_checked = False

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        name: str | None = None,
        adapter: Adapter | None = None,
        seed: int = 0,
        attn_implementation: str | None = None,
        quantize: str | None = None,
        offload: bool = False,
        **options: Any,
    ) -> HFModel:
        """A folder or a Hub id; fp32 on a CPU and bf16 on a GPU unless told. An adapter is drawn from the seed."""
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(path)
        model = pretrained(
            AutoModelForCausalLM,
            path,
            device=device,
            dtype=dtype,
            attn_implementation=attn_implementation,
            quantize=quantize,
            offload=offload,
        )
        if adapter is not None:
            adapters.attach(model, adapter, seed)
        return cls(
            model.eval(),
            tokenizer,
            name=name or str(path),
            adapter=adapter,
            attention=attn_implementation,
            **options,
        )

    # What it is

    @property
    def device(self) -> torch.device:
        places = (p.device for p in self.model.parameters() if not p.is_meta)
        return next(places, torch.device("cpu"))  # a weight that is offloaded is nowhere

    @property
    def num_parameters(self) -> int:
        """Weights, embeddings included once."""
        return num_parameters(self.model)

    @property
    def num_trained(self) -> int:
        """Weights that training changes."""
        if self.adapter is None:
            return self.num_parameters
        return sum(tensor.numel() for tensor in self.weights().values())

    @property
    def identity(self) -> str:
        """Digest of weights, configuration, tokenizer, template, dtype and engine; an adapter counts from its first update on."""
        stamp = sum(p._version for p in self.model.parameters())  # grows with every update in place
        if self._identity is None or self._identity[0] != stamp:
            self._identity = (stamp, self._digest())
        return self._by_engine(self._identity[1])

    def _by_engine(self, own: str) -> str:
        """Samples that an engine wrote are of another identity than its own."""
        return own if self.engine is None else digest([own, self.engine.identity])

    def _digest(self) -> str:
        if self.adapter is None:
            return self._identity_of(None)
        if adapters.untouched(self.model):
            return self.base_identity
        return adapted(self.base_identity, self.adapter.model_dump(), self.weights())

    def _identity_of(self, state: Mapping[str, Tensor] | None) -> str:
        options = {} if self.attention is None else {"attention": self.attention}
        return identity(self.model, self.tokenizer, self.eos, state, options)

    @property
    def base_identity(self) -> str:
        """The identity of the weights under the adapter, which are frozen and hashed once."""
        if self._base_identity is None:
            self._base_identity = self._identity_of(adapters.base_state(self.model))
        return self._base_identity

    def touch(self) -> None:
        """Forget the identity: the weights changed."""
        self._identity = None

    def _evaluating(self) -> AbstractContextManager[None]:
        """How the model is while it writes and scores."""
        return evaluating(self.model)

    # Writing

    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        *,
        progress: Progress | None = None,
    ) -> list[list[Trace]]:
        """`n` traces a request; their log-probabilities and entropies cover the written tokens, not the prefix."""
        traces: list[list[Trace]] = [[] for _ in requests]
        for block in self.plan(requests, sampling):
            for (place, sample), trace in zip(
                block.pairs, self.generate_block(block, progress=progress), strict=True
            ):
                if sample < sampling.n:
                    traces[place].append(trace)
        return traces

    def plan(self, requests: Sequence[Request], sampling: Sampling) -> list[Block]:
        """The blocks of a call. `n` decides how many there are, never what is in one.

        Sample indices fall into 0, 1, 2-3, 4-7, … doubling until a block is full, so an `n` between computes up to the next.
        """
        if self.engine is not None:
            return self.engine.plan(requests, sampling)
        groups: dict[int, list[int]] = defaultdict(list)
        for place, request in enumerate(requests):
            groups[padded(len(request.encoded(self)) + len(request.prefix))].append(place)
        blocks = []
        for width, members in sorted(groups.items()):
            rows = self._block_rows(width + sampling.max_new_tokens)
            most = largest_power(max(1, rows // len(members)))
            for samples in sample_ranges(sampling.n, most):
                for start in range(0, len(members), rows):
                    places = tuple(members[start : start + rows])
                    chosen = tuple(requests[place] for place in places)
                    blocks.append(Block(chosen, places, samples, sampling, width))
        return blocks

    def _block_rows(self, length: int) -> int:
        config = self.model.config.get_text_config(decoder=True)
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        row = 2 * config.num_hidden_layers * heads * width * length * self.model.dtype.itemsize
        return min(self.rows, largest_power(max(1, self.cache_bytes // row)))

    @torch.no_grad()
    def generate_block(self, block: Block, *, progress: Progress | None = None) -> list[Trace]:
        """The traces of `block.pairs`."""
        if self.engine is not None:
            return self.engine.write(self, block, progress)
        with self._evaluating():
            return Writer(self, block, progress or (lambda finished: None)).run()

    def recompute(self) -> None:
        """Keep no activations inside a layer in train mode; it writes in eval mode, with its cache."""
        self.model.gradient_checkpointing_enable({"use_reentrant": False})

    def rest(self) -> None:
        """Hand back the memory of what writes in its place, before training."""
        if self.engine is not None:
            self.engine.rest()

    # Scoring

    @torch.no_grad()
    def score(self, pairs: Sequence[tuple[Ids, Ids]]) -> list[Scores]:
        """Teacher-forced log-probabilities and entropies of responses under their prompts."""
        if not all(prompt for prompt, _ in pairs):
            raise ValueError("a response is scored under a prompt; an empty one predicts nothing")
        scores: dict[int, Scores] = {}
        widths = [padded(len(prompt) + len(response)) for prompt, response in pairs]
        order = sorted(range(len(pairs)), key=lambda place: (widths[place], place))
        with self._evaluating():
            while order:
                width = widths[order[0]]
                most = max(1, SCORED_TOKENS // width)
                group = [place for place in order[:most] if widths[place] == width]
                order = order[len(group) :]
                for place, found in zip(
                    group, self._score([pairs[p] for p in group], width), strict=True
                ):
                    scores[place] = found
        return [scores[place] for place in range(len(pairs))]

    def _score(self, pairs: Sequence[tuple[Ids, Ids]], width: int) -> Iterator[Scores]:
        ids, mask = right_padded(
            [(*prompt, *response) for prompt, response in pairs], self.pad, width
        )
        index = [
            row * width + len(prompt) + t - 1
            for row, (prompt, response) in enumerate(pairs)
            for t in range(len(response))
        ]
        place = self.device
        batch = Batch(
            ids.to(place), mask.to(place), torch.tensor(index, dtype=torch.long, device=place)
        )
        targets = torch.tensor([t for _, response in pairs for t in response], device=place)
        hidden = self.hidden(batch)
        logprobs, entropies = [], []
        step = max(1, LOGITS // self.vocabulary)
        for start in range(0, len(hidden), step):
            logp = self.head(hidden[start : start + step]).float().log_softmax(dim=-1)
            logprobs += picked(logp, targets[start : start + step]).tolist()
            entropies += entropy(logp).tolist()
        start = 0
        for _, response in pairs:
            stop = start + len(response)
            yield Scores(tuple(logprobs[start:stop]), tuple(entropies[start:stop]))
            start = stop

    # Hidden states and head

    def hidden(self, batch: Batch) -> Tensor:
        """What the head turns into logits, at `batch.index`: [N, H], with gradients unless frozen."""
        self._check_head()
        if batch.positions is not None:
            self._check_packing()
        states = self._states(batch.ids, batch.mask, batch.positions)
        return states.reshape(-1, states.shape[-1])[batch.index]

    def _states(self, ids: Tensor, mask: Tensor, packed: Tensor | None = None) -> Tensor:
        inputs: dict[str, Any] = {"input_ids": ids}
        if packed is not None:
            # Without a mask, Transformers keeps apart the sequences that the positions tell: by a mask of blocks, or
            # by the kernels of FlashAttention for sequences of several lengths.
            inputs["position_ids"] = packed
        elif bool((mask[:, 1:] <= mask[:, :-1]).all()):
            # Nothing attends to padding on its right, so the plain causal kernel will do; positions that
            # stood still over the padding would be taken for packed sequences, and cost a mask.
            inputs["position_ids"] = torch.arange(ids.shape[1], device=ids.device)[None]
        else:
            inputs |= {"attention_mask": mask, "position_ids": positions(mask)}
        return self.model.base_model(**self._accepted(inputs), use_cache=False).last_hidden_state

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [n, V], cut to the vocabulary."""
        if self._head().weight.is_meta:  # offloaded: its module fetches it
            return self._head()(hidden)[..., : self.vocabulary]
        return nn.functional.linear(hidden, self.head_weight, self.head_bias)

    @property
    def head_weight(self) -> Tensor:
        return self._head().weight[: self.vocabulary]  # [V, H]

    @property
    def head_bias(self) -> Tensor | None:
        bias = getattr(self._head(), "bias", None)
        return None if bias is None else bias[: self.vocabulary]

    def _head(self) -> Any:
        return self.model.get_output_embeddings()

    def _accepted(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs that this architecture knows (some have no position ids)."""
        return {name: value for name, value in inputs.items() if name in self._accepts}

    @torch.no_grad()
    def _check_head(self) -> None:
        """Some architectures scale or cap logits after the head; refuse them rather than train on other numbers."""
        if self._head_checked:
            return
        with self._evaluating():
            ids = torch.arange(1, 5, device=self.device).remainder(self.vocabulary)[None]
            whole = self.model(input_ids=ids, use_cache=False).logits[0, :, : self.vocabulary]
            parts = self.head(self._states(ids, torch.ones_like(ids))[0])
        if not torch.allclose(whole.float(), parts.float(), rtol=2e-2, atol=5e-2):
            raise ValueError(
                f"{self.name}: {type(self.model).__name__} changes its logits after the head (a cap or a scale), so scores "
                "and divergences would be wrong; use it as a teacher that only generates"
            )
        self._head_checked = True

    @torch.no_grad()
    def _check_packing(self) -> None:
        """Refuse an architecture that lets packed sequences see each other, such as one with a recurrent state."""
        if self._packing_checked:
            return
        ids = torch.arange(1, 25, device=self.device).remainder(self.vocabulary)[None]
        positions = torch.arange(24, device=self.device).remainder(12)[None]
        with self._evaluating():
            packed = self._states(ids, torch.ones_like(ids), positions)[0, 12:]
            alone = self._states(ids[:, 12:], torch.ones_like(ids[:, 12:]))[0]
        if not torch.allclose(packed.float(), alone.float(), rtol=2e-2, atol=5e-2):
            raise ValueError(
                f"{self.name}: {type(self.model).__name__} does not keep packed sequences apart; set training.packing to false"
            )
        self._packing_checked = True

    # Weights

    def weights(self) -> dict[str, Tensor]:
        """What training changes, by name: the adapter's tensors, or all."""
        state = self.model.state_dict()
        return state if self.adapter is None else adapters.trained(state)

    def writing_state(self) -> dict[str, Tensor]:
        """The state of the plain model, the adapter merged in; the student stays as it is."""
        return (
            self.model.state_dict() if self.adapter is None else adapters.merged_state(self.model)
        )

    def merge(self) -> HFModel:
        """Become the plain model with the adapter merged in, in fp32 and frozen; the adapter is kept to be saved beside."""
        if self.adapter is not None:
            self.kept = adapters.files(self.model)
            adapters.unwrap(self.model, merge=True)
            self.adapter = None
            self.touch()
        return self

    def base(self) -> Base:
        """The model under the adapter, without a copy of its weights."""
        return Base(self)

    def freeze(self) -> HFModel:
        """No gradients from here on; returns itself."""
        self.model.requires_grad_(False).eval()
        return self

    def clone(self) -> HFModel:
        """A frozen deep copy."""
        model = copy.deepcopy(self.model)
        for parameter in model.parameters():
            parameter.grad = None
        twin = HFModel(
            model,
            self.tokenizer,
            name=self.name,
            rows=self.rows,
            cache_bytes=self.cache_bytes,
            adapter=self.adapter,
            attention=self.attention,
        )
        twin.engine = self.engine
        return twin.freeze()

    def state(self) -> dict[str, Tensor]:
        """A copy of the weights that training changes, on the CPU."""
        return {name: tensor.detach().cpu().clone() for name, tensor in self.weights().items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        if self.adapter is not None and state.keys() != self.weights().keys():
            raise ValueError(f"{self.name}: these are not the weights of its adapter")
        self.model.load_state_dict(state, strict=self.adapter is None)
        self.touch()

    def save_weights(self, folder: Path) -> None:
        """The weights that write, with their configuration, in the Transformers format."""
        state = None if self.adapter is None else self.writing_state()
        self.model.save_pretrained(folder, state_dict=state)

    def save(self, path: str | Path) -> Path:
        """Write the Transformers format to `path`, all or nothing; what stood there is replaced.

        An adapter is merged in what is written, and written by itself to `path`/adapter.
        """
        if self.adapter is not None:
            return self.clone().merge().save(path)
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            with quiet():
                self.save_weights(draft)
                self.tokenizer.save_pretrained(draft)
            if self.kept is not None:
                self.kept.write(draft / "adapter")
            draft.chmod(0o755)
            replace_folder(draft, path)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        return path


class Base(HFModel):
    """The model under a student's adapter: the same weights with the adapter and dropout off, and no gradients."""

    def __init__(self, student: HFModel) -> None:
        super().__init__(
            student.model,
            student.tokenizer,
            name=student.name,
            rows=student.rows,
            cache_bytes=student.cache_bytes,
            attention=student.attention,
        )
        self.student, self.engine = student, student.engine

    @property
    def identity(self) -> str:
        return self._by_engine(self.student.base_identity)

    @property
    def num_parameters(self) -> int:
        return self.student.num_parameters - self.student.num_trained

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        self._check_there()
        with evaluating(self.model), adapters.off(self.model):
            yield

    def _check_there(self) -> None:
        if self.student.adapter is None:
            raise RuntimeError(
                f"{self.name}: its adapter was merged, so the model under it is gone"
            )

    @torch.no_grad()
    def hidden(self, batch: Batch) -> Tensor:
        with self._evaluating():
            return super().hidden(batch)

    def freeze(self) -> HFModel:
        """As it is: what has gradients is the student's."""
        return self

    def clone(self) -> HFModel:
        """A plain model of its own."""
        twin = super().clone()
        adapters.unwrap(twin.model, merge=False)
        return twin

    def weights(self) -> dict[str, Tensor]:
        self._check_there()
        return adapters.base_state(self.model)

    writing_state = weights

    def save_weights(self, folder: Path) -> None:
        self.model.save_pretrained(folder, state_dict=self.weights())

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        raise RuntimeError(f"{self.name}: the model under an adapter is frozen")

    def save(self, path: str | Path) -> Path:
        return self.clone().save(path)


def end_tokens(model: Any, tokenizer: Any, name: str) -> frozenset[int]:
    """The ids that end a response: the tokenizer's, and those of the generation config, which may list several."""
    config = getattr(model, "generation_config", None)
    listed = getattr(config, "eos_token_id", None)
    listed = listed if isinstance(listed, list) else [listed]
    ids = frozenset(i for i in (*listed, tokenizer.eos_token_id) if i is not None)
    if not ids:
        raise ValueError(f"{name}: no end-of-sequence token; set tokenizer.eos_token")
    return ids


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off inside, and back to what it was."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars of Transformers."""
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()


def replace_folder(draft: Path, path: Path) -> None:
    """Put `draft` where `path` is."""
    if path.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        os.replace(path, old / path.name)
        os.replace(draft, path)
        shutil.rmtree(old)
    else:
        os.replace(draft, path)


def placement(
    device: str | torch.device | None, dtype: str | torch.dtype | None
) -> tuple[torch.device, torch.dtype]:
    """Where a model goes and in what type; by default a GPU if there is one in bf16, else the CPU in fp32."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if dtype is None:
        dtype = "fp32" if device.type == "cpu" else "bf16"
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ValueError(f"dtype {dtype!r} is unknown; choose one of {', '.join(DTYPES)}")
        dtype = DTYPES[dtype]
    return device, dtype


def pretrained(
    auto: Any,
    path: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    attn_implementation: str | None = None,
    quantize: str | None = None,
    offload: bool = False,
) -> Any:
    """A model of Transformers where and how it is to run; `auto` is the class that reads it."""
    device, dtype = placement(device, dtype)
    given: dict[str, Any] = {"dtype": dtype}
    if attn_implementation is not None:
        given["attn_implementation"] = attn_implementation
    if quantize is not None:
        given["quantization_config"] = quantization(quantize, dtype)
    if quantize is not None or offload:  # Accelerate places it, and moves what is offloaded
        given["device_map"] = "auto" if offload else {"": device}
    try:
        with quiet():
            model = auto.from_pretrained(path, **given)
    except (
        ImportError
    ) as error:  # of a kernel or a quantiser; what is missing is in the first sentence
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from None
    return model.eval() if "device_map" in given else model.to(device).eval()


def quantization(kind: str, dtype: torch.dtype) -> Any:
    """8 bits (LLM.int8, arXiv:2208.07339), or 4 bits of the normal-float type (arXiv:2305.14314)."""
    if kind == "8bit":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )


def num_parameters(model: Any) -> int:
    """Weights; those packed into fewer bytes count as what they stand for."""
    if getattr(model, "quantization_method", None) is not None:
        return int(model.num_parameters())
    return sum(p.numel() for p in model.parameters())
