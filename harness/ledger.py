"""The ledger: what everything cost, in two columns.

*charged* is what a method would cost alone; *spent* is what was done, after sharing through the store.
Caps look at *charged* only, so neither order nor sharing can change a result.
*purposes* says what charges were for, where that was told; the rest of a quantity has no purpose.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

QUANTITIES = (
    "teacher_generated",  # tokens
    "teacher_scored",  # tokens
    "student_generated",  # tokens
    "trained",  # tokens
    "verifier_calls",
    "steps",
    "seconds",
    "flops",
    "teacher_read",  # prompt tokens, of a teacher behind a server
    "cost",  # money that servers are paid, in the unit of their prices
)
_MARK = 12  # bytes kept of each key: among a million, two are alike with odds of 1e-17


def training_flops(parameters: int, tokens: float, trained: int | None = None) -> float:
    """6 N D: forward and backward   (Kaplan et al. 2020, arXiv:2001.08361, section 2.1; N without embeddings)

    4 N D + 2 n D where n of the N are trained: frozen weights pass gradients on and need none (Hu et al. 2021, arXiv:2106.09685,
    section 4.2). What gradient checkpointing computes again is not counted.
    """
    return (4.0 * parameters + 2.0 * (parameters if trained is None else trained)) * tokens


def forward_flops(parameters: int, tokens: float) -> float:
    """2 N D: scoring, or generating, D tokens   (ibid.)"""
    return 2.0 * parameters * tokens


class Ledger:
    """The costs of one cell."""

    def __init__(self, caps: Mapping[str, float] | None = None) -> None:
        self.caps = {_known(quantity): cap for quantity, cap in (caps or {}).items()}
        if "seconds" in self.caps:
            raise ValueError(
                "a cap on seconds would make results depend on the machine; "
                "cap flops, steps or tokens"
            )
        self.charged: dict[str, float] = dict.fromkeys(QUANTITIES, 0)
        self.spent: dict[str, float] = dict.fromkeys(QUANTITIES, 0)
        self.purposes: dict[str, dict[str, float]] = {}  # of charged: quantity -> purpose -> amount
        self._paid: set[bytes] = set()
        self._timing = False

    def charge(
        self, quantity: str, amount: float, key: str | None = None, purpose: str | None = None
    ) -> None:
        """Count what the method would cost alone; what has a key (a sample's, a score's) is paid for once."""
        amount = _plain(quantity, amount)
        if key is not None:
            if self.paid(quantity, key):
                return
            self._paid.add(_mark(quantity, key))
        self.charged[quantity] += amount
        if purpose is not None and amount:
            _add(self.purposes, quantity, purpose, amount)

    def paid(self, quantity: str, key: str | None) -> bool:
        """Whether this was charged before: a cap that is spent takes back nothing."""
        return key is not None and _mark(quantity, key) in self._paid

    def spend(self, quantity: str, amount: float) -> None:
        """Count what was really done."""
        amount = _plain(quantity, amount)
        self.spent[quantity] += amount

    @contextlib.contextmanager
    def timed(self, charge: bool = True) -> Iterator[None]:
        """Spend (and charge) the seconds of a block; a block inside another is not counted again."""
        if self._timing:
            yield
            return
        self._timing, start = True, time.perf_counter()
        try:
            yield
        finally:
            self._timing, elapsed = False, time.perf_counter() - start
            self.spend("seconds", elapsed)
            if charge:
                self.charge("seconds", elapsed)

    def left(self, quantity: str) -> float:
        """What the cap still allows, at least 0; infinite without a cap."""
        return max(0, self.caps.get(_known(quantity), math.inf) - self.charged[quantity])

    def exhausted(self, *quantities: str) -> str | None:
        """The first of these quantities (by default of all) of which nothing is left."""
        return next((name for name in quantities or QUANTITIES if self.left(name) <= 0), None)

    def summary(self) -> dict[str, dict[str, Any]]:
        """Both columns and the purposes, for reports."""
        purposes = {quantity: dict(amounts) for quantity, amounts in self.purposes.items()}
        return {"charged": dict(self.charged), "spent": dict(self.spent), "purposes": purposes}

    def to_dict(self) -> dict[str, Any]:
        """All of it, for an exact resume."""
        paid = base64.b64encode(b"".join(sorted(self._paid))).decode()
        return {**self.summary(), "caps": dict(self.caps), "paid": paid}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Ledger:
        """The ledger of a `to_dict`, or of a `summary`, which has no caps and no keys."""
        ledger = cls()
        ledger.load(data)
        return ledger

    def load(self, data: Mapping[str, Any]) -> None:
        """Become the ledger of a `to_dict`, in place."""
        fresh = Ledger(data.get("caps"))
        for column, stored in (("charged", fresh.charged), ("spent", fresh.spent)):
            stored.update({_known(quantity): amount for quantity, amount in data[column].items()})
        purposes = data.get("purposes", {})
        paid = base64.b64decode(data.get("paid", ""))
        self.caps, self.charged, self.spent = fresh.caps, fresh.charged, fresh.spent
        self.purposes = {_known(quantity): dict(purposes[quantity]) for quantity in purposes}
        self._paid = {paid[i : i + _MARK] for i in range(0, len(paid), _MARK)}


def total(ledgers: Iterable[Ledger]) -> Ledger:
    """All summed over cells; each cell's charges stand, as it would have paid them alone."""
    result = Ledger()
    for ledger in ledgers:
        for quantity in QUANTITIES:
            result.charged[quantity] += ledger.charged[quantity]
            result.spent[quantity] += ledger.spent[quantity]
            for purpose, amount in ledger.purposes.get(quantity, {}).items():
                _add(result.purposes, quantity, purpose, amount)
    return result


def _add(purposes: dict[str, dict[str, float]], quantity: str, purpose: str, amount: float) -> None:
    amounts = purposes.setdefault(quantity, {})
    amounts[purpose] = amounts.get(purpose, 0) + amount


def _plain(quantity: str, amount: float) -> float:
    """An amount as JSON can hold it: counts out of NumPy and torch become Python numbers."""
    _known(quantity)
    assert amount >= 0, f"{amount} {quantity}"
    return amount if isinstance(amount, (int, float)) else float(amount)


def _mark(quantity: str, key: str) -> bytes:
    return hashlib.blake2b(f"{quantity} {key}".encode(), digest_size=_MARK).digest()


def _known(quantity: str) -> str:
    if quantity not in QUANTITIES:
        raise ValueError(f"unknown quantity {quantity!r}; the ledger keeps {', '.join(QUANTITIES)}")
    return quantity
