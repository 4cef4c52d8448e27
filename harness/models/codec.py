"""What turns text into tokens and back, for backends without weights."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Protocol

from harness.types import Ids


class Codec(Protocol):
    """The text side of a `LanguageModel`; every language model is one."""

    @property
    def vocabulary(self) -> int: ...
    @property
    def vocabulary_digest(self) -> str: ...
    def encode(self, prompt: str, system: str | None = None) -> Ids: ...
    def raw(self, text: str) -> Ids: ...
    def tokenize(self, text: str, *, end: bool = True) -> Ids: ...
    def decode(self, ids: Sequence[int]) -> str: ...


class Coded:
    """The text side of a model that has a codec."""

    codec: Codec

    def encode(self, prompt: str, system: str | None = None) -> Ids:
        return self.codec.encode(prompt, system)

    def raw(self, text: str) -> Ids:
        return self.codec.raw(text)

    def tokenize(self, text: str, *, end: bool = True) -> Ids:
        return self.codec.tokenize(text, end=end)

    def decode(self, ids: Sequence[int]) -> str:
        return self.codec.decode(ids)


class Bytes:
    """One token a byte of UTF-8, and four that mark the turns."""

    PAD, END, USER, ASSISTANT = range(256, 260)
    vocabulary = 260
    vocabulary_digest = hashlib.sha256(b"utf-8 bytes, pad, end, user, assistant").hexdigest()

    def encode(self, prompt: str, system: str | None = None) -> Ids:
        first = () if system is None else (self.USER, *system.encode(), self.END)
        return (*first, self.USER, *prompt.encode(), self.END, self.ASSISTANT)

    def raw(self, text: str) -> Ids:
        return tuple(text.encode())

    def tokenize(self, text: str, *, end: bool = True) -> Ids:
        return (*text.encode(), self.END) if end else tuple(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")
