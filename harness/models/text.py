"""A tokenizer of Transformers and its chat template: the text side of a model, with its weights or without."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from harness.models.identity import digest
from harness.types import Ids

ENCODED = 1 << 14  # rendered prompts that are kept


class Text:
    """Rendering, tokenizing and decoding; what the vocabulary is, and which tokens end a response."""

    def __init__(self, tokenizer: Any, name: str, eos: Collection[int]) -> None:
        self.tokenizer, self.name, self.eos = tokenizer, name, frozenset(eos)
        ids = tokenizer.get_vocab()
        self.vocabulary = max(len(tokenizer), 1 + max(ids.values()))
        self.vocabulary_digest = digest(sorted(ids.items()))
        self.end = tokenizer.eos_token_id if tokenizer.eos_token_id in self.eos else min(self.eos)
        self.pad = self.end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self._encoded: dict[tuple[str, str | None], Ids] = {}

    @classmethod
    def of(cls, path: str | Path, name: str | None = None) -> Text:
        """A tokenizer by itself."""
        from transformers import AutoTokenizer

        name, tokenizer = name or str(path), AutoTokenizer.from_pretrained(path)
        if tokenizer.eos_token_id is None:
            raise ValueError(f"{name}: no end-of-sequence token; set tokenizer.eos_token")
        return cls(tokenizer, name, [tokenizer.eos_token_id])

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
