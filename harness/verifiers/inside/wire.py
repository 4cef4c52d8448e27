"""Messages between referee and player: frames of JSON that hold plain data only.

A value is reduced to what it is made of (an int, a list of ints, ...), whatever its class says about itself: an object that
claims to equal everything arrives as a mere reference, which equals nothing else. JSON, and not pickle or marshal, since one
side is not to be trusted.
"""

from __future__ import annotations

import contextlib
import decimal
import fractions
import json
import os
from collections.abc import Callable
from typing import Any

HEADER = 8  # bytes that say how long a frame is
EXACT = 1 << 53  # integers beyond it are written in hexadecimal, which takes linear time

# How an instance of a subclass (a Counter, a named tuple) becomes one of the plain class itself.
_BASES: dict[type, Callable[[Any], Any]] = {
    int: int.__int__,
    float: float.__float__,
    complex: lambda value: complex(value.real, value.imag),
    str: str.__str__,
    bytes: bytes,
    bytearray: bytes,
    list: lambda value: [*list.__iter__(value)],
    tuple: lambda value: (*tuple.__iter__(value),),
    dict: lambda value: dict(dict.items(value)),
    set: lambda value: {*set.__iter__(value)},
    frozenset: lambda value: frozenset(frozenset.__iter__(value)),
}

# Classes that cross by name, as they are the same on both sides: MBPP has a test that passes `int`.
_CLASSES = {
    kind.__name__: kind
    for kind in (bool, int, float, complex, str, bytes, list, tuple, dict, set, frozenset)
}


class TooLong(Exception):
    """A frame beyond the limit."""


def pack(value: Any, refer: Callable[[Any], int]) -> Any:
    """Plain data as JSON values; `refer` numbers what is not plain, or raises."""
    kind = type(value)
    if value is None or kind is bool or kind is str or kind is float:
        return value
    if kind is int:
        return value if -EXACT < value < EXACT else {"int": hex(value)}
    if kind is list:
        return [pack(item, refer) for item in value]
    if kind is tuple or kind is set or kind is frozenset:
        return {kind.__name__: [pack(item, refer) for item in value]}
    if kind is dict:
        return {"dict": [[pack(k, refer), pack(v, refer)] for k, v in value.items()]}
    if kind is bytes:
        return {"bytes": value.hex()}
    if kind is complex:
        return {"complex": [value.real, value.imag]}
    if kind is fractions.Fraction:
        return {"fraction": [pack(n, refer) for n in (value.numerator, value.denominator)]}
    if kind is decimal.Decimal:
        return {"decimal": str(value)}
    if kind is range:
        return {"range": [pack(n, refer) for n in (value.start, value.stop, value.step)]}
    if kind is type and value in _CLASSES.values():
        return {"class": value.__name__}
    for base, reduce in _BASES.items():
        if base in kind.__mro__:
            return pack(reduce(value), refer)
    return {"thing": refer(value)}


def unpack(data: Any, thing: Callable[[int], Any]) -> Any:
    """What `pack` made JSON of; `thing` finds what a number refers to."""
    if isinstance(data, list):
        return [unpack(item, thing) for item in data]
    if not isinstance(data, dict):
        return data
    ((kind, inner),) = data.items()
    if kind == "thing":
        return thing(inner)
    if kind == "class":
        return _CLASSES[inner]
    if kind == "int":
        return int(inner, 16)
    if kind == "bytes":
        return bytes.fromhex(inner)
    if kind == "decimal":
        return decimal.Decimal(inner)
    items = unpack(inner, thing)
    if kind == "complex":
        return complex(*items)
    if kind == "fraction":
        return fractions.Fraction(*items)
    if kind == "range":
        return range(*items)
    return {"tuple": tuple, "set": set, "frozenset": frozenset, "dict": dict}[kind](items)


def send(descriptor: int, message: Any) -> None:
    body = json.dumps(message).encode()
    data = memoryview(len(body).to_bytes(HEADER, "big") + body)
    while data:
        data = data[os.write(descriptor, data) :]


def receive(descriptor: int, limit: int, ready: Callable[[], None] = lambda: None) -> Any:
    """The next message, EOFError where there is none; `ready` is called before each read and may raise."""
    length = int.from_bytes(_read(descriptor, HEADER, ready), "big")
    if length > limit:
        raise TooLong(f"{length} bytes")
    return json.loads(_read(descriptor, length, ready))


def _read(descriptor: int, length: int, ready: Callable[[], None]) -> bytes:
    parts: list[bytes] = []
    while length:
        ready()
        part = b""
        with contextlib.suppress(BlockingIOError):
            part = os.read(descriptor, min(length, 1 << 20))
            if not part:
                raise EOFError
        parts.append(part)
        length -= len(part)
    return b"".join(parts)
