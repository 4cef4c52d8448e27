"""Judges of steps on this machine: process reward models of Transformers, and any language model that is asked yes or no.

Token classifiers are read at the last token; sequence classifiers pool for themselves. Special tokens that some published
models want behind each step are not added: give them in the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from harness.models.collate import padded, right_padded
from harness.models.hf import evaluating, num_parameters, pretrained, quiet
from harness.models.identity import digest, identity
from harness.types import Capability, Ids, LanguageModel

READ_TOKENS = 16384  # tokens of a batch, padding included
POSITIVE = {"label_1", "correct", "good", "+", "yes", "true", "positive", "right", "valid"}


class RewardHF:
    """A token or sequence classifier with one or two labels and its tokenizer, as a `RewardModel`."""

    capabilities: frozenset[Capability] = frozenset(("reward",))

    def __init__(
        self, model: Any, tokenizer: Any, *, name: str | None = None, attention: str | None = None
    ) -> None:
        self.model, self.tokenizer, self.attention = model, tokenizer, attention
        self.name = name or model.config.name_or_path or type(model).__name__
        self.positive = positive_label(model.config, self.name)
        self.per_token = type(model).__name__.endswith("ForTokenClassification")
        config = model.config.get_text_config()
        if config.pad_token_id is None:  # sequence classifiers pool at the last other token
            pad = tokenizer.pad_token_id
            config.pad_token_id = tokenizer.eos_token_id if pad is None else pad
        self.pad: int = config.pad_token_id or 0
        self._identity: str | None = None

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        name: str | None = None,
        attn_implementation: str | None = None,
        quantize: str | None = None,
        offload: bool = False,
    ) -> RewardHF:
        """A folder or a Hub id; fp32 on a CPU and bf16 on a GPU unless told."""
        architectures = AutoConfig.from_pretrained(path).architectures or []
        auto = {
            "ForTokenClassification": AutoModelForTokenClassification,
            "ForSequenceClassification": AutoModelForSequenceClassification,
        }
        fitting = [auto[kind] for kind in auto if any(a.endswith(kind) for a in architectures)]
        if not fitting:
            raise ValueError(
                f"{name or path}: a reward model is a token or sequence classifier, and its config.json names "
                f"{', '.join(architectures) or 'no architecture'}"
            )
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(path)
        model = pretrained(
            fitting[0],
            path,
            device=device,
            dtype=dtype,
            attn_implementation=attn_implementation,
            quantize=quantize,
            offload=offload,
        )
        return cls(model, tokenizer, name=name or str(path), attention=attn_implementation)

    @property
    def num_parameters(self) -> int:
        return num_parameters(self.model)

    @property
    def identity(self) -> str:
        """Digest of the kind of classifier, weights, configuration, tokenizer, template, dtype and engine."""
        if self._identity is None:
            options = {} if self.attention is None else {"attention": self.attention}
            what = identity(self.model, self.tokenizer, (), None, options)
            self._identity = digest([type(self.model).__name__, what])
        return self._identity

    def freeze(self) -> RewardHF:
        """No gradients from here on; returns itself."""
        self.model.requires_grad_(False).eval()
        return self

    def lengths(self, pairs: Sequence[tuple[str, str]]) -> list[int]:
        return [len(ids) for ids in self.encode(pairs)]

    def encode(self, pairs: Sequence[tuple[str, str]]) -> list[Ids]:
        """The tokens that are read of each (user turn, response so far)."""
        turns = {turn: self._turn(turn) for turn in dict.fromkeys(turn for turn, _ in pairs)}
        sequences = []
        for turn, response in pairs:
            written = tuple(self.tokenizer(response, add_special_tokens=False)["input_ids"])
            if not written:
                raise ValueError(
                    f"{self.name}: a reward is about the last step of a response, and one is empty"
                )
            sequences.append((*turns[turn], *written))
        return sequences

    def _turn(self, turn: str) -> Ids:
        if self.tokenizer.chat_template:
            message = [{"role": "user", "content": turn}]
            return tuple(
                self.tokenizer.apply_chat_template(
                    message, add_generation_prompt=True, return_dict=False
                )
            )
        ids = tuple(self.tokenizer(turn + "\n", add_special_tokens=False)["input_ids"])
        start = self.tokenizer.bos_token_id
        return ids if start is None else (start, *ids)

    @torch.no_grad()
    def reward(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """P(the last step is right) of each pair; sequences of one padded length share a batch."""
        sequences = self.encode(pairs)
        widths = [padded(len(ids)) for ids in sequences]
        order = sorted(range(len(pairs)), key=lambda place: (widths[place], place))
        found: dict[int, float] = {}
        with evaluating(self.model):
            while order:
                width = widths[order[0]]
                most = max(1, READ_TOKENS // width)
                group = [place for place in order[:most] if widths[place] == width]
                order = order[len(group) :]
                values = self._read([sequences[place] for place in group], width)
                found.update(zip(group, values.tolist(), strict=True))
        return [found[place] for place in range(len(pairs))]

    def _read(self, sequences: Sequence[Ids], width: int) -> Tensor:
        """P(right), [B]."""
        ids, mask = right_padded(sequences, self.pad, width)
        places = (p.device for p in self.model.parameters() if not p.is_meta)
        device = next(places, torch.device("cpu"))
        logits = self.model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
        if self.per_token:  # [B, T, labels]
            logits = logits[torch.arange(len(ids)), mask.sum(dim=1) - 1]
        logits = logits.float()  # [B, labels]
        if logits.shape[-1] == 1:
            return logits[:, 0].sigmoid()
        return logits.softmax(dim=-1)[:, self.positive]


class YesNo:
    """Any scoring model as a judge: P(yes) / (P(yes) + P(no)) as the answer to a question, which is the user turn."""

    capabilities: frozenset[Capability] = frozenset(("reward",))

    def __init__(self, model: LanguageModel) -> None:
        self.model, self.name = model, model.name
        self.num_parameters: int = getattr(model, "num_parameters", 0)

    @property
    def identity(self) -> str:
        return digest(["yes or no", self.model.identity])

    def rest(self) -> None:
        """Hand back the memory of an engine that scores for it."""
        if rest := getattr(self.model, "rest", None):
            rest()

    def lengths(self, pairs: Sequence[tuple[str, str]]) -> list[int]:
        """Each question is read twice, with either answer."""
        return [sum(len(turn) + len(answer) for turn, answer in two) for two in self._asked(pairs)]

    def reward(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """P(yes) of each pair's question; the response so far belongs into the question."""
        if any(response for _, response in pairs):
            raise ValueError(
                f"{self.name}: a judge gets its whole question in the user turn; leave the response so far empty"
            )
        scores = self.model.score([pair for two in self._asked(pairs) for pair in two])
        nats = torch.tensor([sum(score.logprobs) for score in scores], dtype=torch.float64)
        return nats.view(-1, 2).softmax(dim=-1)[:, 0].tolist()

    def _asked(self, pairs: Sequence[tuple[str, str]]) -> list[list[tuple[Ids, Ids]]]:
        answers = [self.model.tokenize(answer, end=False) for answer in ("yes", "no")]
        return [[(self.model.encode(turn), answer) for answer in answers] for turn, _ in pairs]


def positive_label(config: Any, name: str) -> int:
    """The index of the label that means right: the one that is named so, else the last."""
    if config.num_labels not in (1, 2):
        raise ValueError(
            f"{name}: a reward model has one label or two (wrong, right), and this one has {config.num_labels}"
        )
    names = [str(config.id2label.get(i, "")).strip().lower() for i in range(config.num_labels)]
    named = [i for i, label in enumerate(names) if label in POSITIVE]
    return named[0] if len(named) == 1 else config.num_labels - 1
