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
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

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
from harness.models.identity import digest, identity
from harness.types import Batch, Capability, Ids, Request, Sampling, Scores, Trace

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ROWS = 512  # most rows of a generation block
CACHE_BYTES = 8 << 30  # most memory of a block's key-value cache
SCORED_TOKENS = 16384  # tokens of a scoring batch, padding included
LOGITS = 1 << 24  # logits in memory at once when scoring
ENCODED = 1 << 14  # rendered prompts that are kept


class HFModel:
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
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.name = name or model.config.name_or_path or type(model).__name__
        self.rows = rows
        self.cache_bytes = cache_bytes
        ids = tokenizer.get_vocab()
        self.vocabulary = max(len(tokenizer), 1 + max(ids.values()))
        self.vocabulary_digest = digest(sorted(ids.items()))
        self.eos = end_tokens(model, tokenizer, self.name)
        self.end = tokenizer.eos_token_id if tokenizer.eos_token_id in self.eos else min(self.eos)
        self.pad = self.end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        if len(self._head().weight) < self.vocabulary:
            raise ValueError(
                f"{self.name}: the head has {len(self._head().weight)} rows, fewer than the {self.vocabulary} tokens "
                "of the tokenizer; call model.resize_token_embeddings, or use the tokenizer it was trained with"
            )
        self._accepts = frozenset(inspect.signature(model.forward).parameters)
        self._encoded: dict[tuple[str, str | None], Ids] = {}
        self._identity: tuple[int, str] | None = None
        # Set while the weights change with every step: what traces carry, so that not all weights are hashed each time.
        self.version: str | None = None
        self._head_checked = False

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        name: str | None = None,
        **options: Any,
    ) -> HFModel:
        """A folder or a Hub id; fp32 on a CPU and bf16 on a GPU unless told."""
        device, dtype = placement(device, dtype)
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(path)
            model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        return cls(model.to(device).eval(), tokenizer, name=name or str(path), **options)

    # What it is

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def num_parameters(self) -> int:
        """Weights, embeddings included once."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def identity(self) -> str:
        """Digest of weights, configuration, tokenizer, template, dtype and engine."""
        stamp = sum(p._version for p in self.model.parameters())  # grows with every update in place
        if self._identity is None or self._identity[0] != stamp:
            self._identity = (stamp, identity(self.model, self.tokenizer, self.eos))
        return self._identity[1]

    def touch(self) -> None:
        """Forget the identity: the weights changed."""
        self._identity = None

    # Text and tokens

    def encode(self, prompt: str, system: str | None = None) -> Ids:
        """A user turn through the chat template, with the opening of the answer; before it a system turn, if there is one."""
        known = self._encoded.get((prompt, system))
        if known is None:
            if not self.tokenizer.chat_template:
                raise ValueError(
                    f"{self.name}: its tokenizer has no chat template, so prompts cannot be rendered; "
                    "use an instruct model, or put a chat_template.jinja into its folder"
                )
            turn = [{"role": "user", "content": prompt}]
            if system is not None:
                turn.insert(0, {"role": "system", "content": system})
            known = tuple(
                self.tokenizer.apply_chat_template(
                    turn, add_generation_prompt=True, return_dict=False
                )
            )
            if len(self._encoded) >= ENCODED:
                self._encoded.clear()
            self._encoded[prompt, system] = known
        return known

    def raw(self, text: str) -> Ids:
        """Text to continue, behind the token with which the tokenizer begins a text, if it has one."""
        return tuple(self.tokenizer(text)["input_ids"])

    def tokenize(self, text: str, *, end: bool = True) -> Ids:
        """A response's tokens, no template around them; with the end-of-turn token unless it stands there."""
        ids = tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return (*ids, self.end) if end and ids[-1:] != (self.end,) else ids

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

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
        with evaluating(self.model):
            return Writer(self, block, progress or (lambda finished: None)).run()

    # Scoring

    @torch.no_grad()
    def score(self, pairs: Sequence[tuple[Ids, Ids]]) -> list[Scores]:
        """Teacher-forced log-probabilities and entropies of responses under their prompts."""
        if not all(prompt for prompt, _ in pairs):
            raise ValueError("a response is scored under a prompt; an empty one predicts nothing")
        scores: dict[int, Scores] = {}
        widths = [padded(len(prompt) + len(response)) for prompt, response in pairs]
        order = sorted(range(len(pairs)), key=lambda place: (widths[place], place))
        with evaluating(self.model):
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
        states = self._states(batch.ids, batch.mask)
        return states.reshape(-1, states.shape[-1])[batch.index]

    def _states(self, ids: Tensor, mask: Tensor) -> Tensor:
        inputs: dict[str, Any] = {"input_ids": ids}
        if bool((mask[:, 1:] <= mask[:, :-1]).all()):
            # Nothing attends to padding on its right, so the plain causal kernel will do; positions that
            # stood still over the padding would be taken for packed sequences, and cost a mask.
            inputs["position_ids"] = torch.arange(ids.shape[1], device=ids.device)[None]
        else:
            inputs |= {"attention_mask": mask, "position_ids": positions(mask)}
        return self.model.base_model(**self._accepted(inputs), use_cache=False).last_hidden_state

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [n, V], cut to the vocabulary."""
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
        with evaluating(self.model):
            ids = torch.arange(1, 5, device=self.device).remainder(self.vocabulary)[None]
            whole = self.model(input_ids=ids, use_cache=False).logits[0, :, : self.vocabulary]
            parts = self.head(self._states(ids, torch.ones_like(ids))[0])
        if not torch.allclose(whole.float(), parts.float(), rtol=2e-2, atol=5e-2):
            raise ValueError(
                f"{self.name}: {type(self.model).__name__} changes its logits after the head (a cap or a scale), so scores "
                "and divergences would be wrong; use it as a teacher that only generates"
            )
        self._head_checked = True

    # Weights

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
            model, self.tokenizer, name=self.name, rows=self.rows, cache_bytes=self.cache_bytes
        )
        return twin.freeze()

    def state(self) -> dict[str, Tensor]:
        """A copy of the weights, on the CPU."""
        return {
            name: tensor.detach().cpu().clone() for name, tensor in self.model.state_dict().items()
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.model.load_state_dict(state)
        self.touch()

    def save(self, path: str | Path) -> Path:
        """Write the Transformers format to `path`, all or nothing; what stood there is replaced."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            with quiet():
                self.model.save_pretrained(draft)
                self.tokenizer.save_pretrained(draft)
            draft.chmod(0o755)
            replace_folder(draft, path)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        return path


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
