"""Rows of HumanEval, MBPP and LiveCodeBench as problems: what is asked, and what a program must do."""

from __future__ import annotations

import ast
import base64
import binascii
import builtins
import json
import pickletools
import re
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

Row = Mapping[str, Any]

FUNCTIONAL = "Complete this starter code, and keep its names:"
STDIN = "Write a program that reads from standard input and writes its answer to standard output."
DIFFICULTY = {"easy": 1, "medium": 2, "hard": 3}  # LiveCodeBench's words as levels
LARGEST = 1 << 29  # bytes of one problem's private tests once unpacked
# The opcodes of a pickle that is one string: nothing here names, builds or calls anything.
STRINGS = {"UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}
HARMLESS = {"PROTO", "FRAME", "MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT", "STOP"}


def humaneval(row: Row) -> Row:
    """The prompt is the head of a program: imports and helpers that its tests use too, then the function to complete."""
    prompt, entry = row["prompt"], row["entry_point"]
    return {
        "id": row["task_id"],
        "prompt": prompt,
        "entry": entry,
        "tests": f"{preface(prompt, entry)}{row['test']}\ncheck({entry})",
        "solution": fenced(prompt + row["canonical_solution"]),
    }


def mbpp(row: Row) -> Row:
    """The task's text with the tests, which alone say what the function is called."""
    setup, tests = row["test_setup_code"], list(row["test_list"])
    shown = fenced("\n".join(tests))
    return {
        "id": row["task_id"],
        "prompt": f"{row['text']}\n\nThe program must pass these tests:\n\n{shown}",
        "entry": tested(setup, tests),
        "tests": "\n".join([setup, *tests] if setup.strip() else tests),
        "solution": fenced(row["code"]),
    }


def livecodebench(row: Row) -> Row:
    """A method of a class with starter code, or a program that reads standard input; public and private tests."""
    tests = [
        *_listed(row["public_test_cases"]),
        *private_tests(row.get("private_test_cases") or "[]"),
    ]
    starter, question = row["starter_code"], row["question_content"].strip()
    spec: dict[str, Any]
    if starter.strip():
        spec = {
            "kind": "functional",
            "entry": _mapping(row["metadata"])["func_name"],
            "class": "Solution" if re.search(r"^class Solution\b", starter, re.MULTILINE) else None,
            "cases": [
                [[json.loads(line) for line in t["input"].split("\n")], json.loads(t["output"])]
                for t in tests
            ],
        }
        task = f"{FUNCTIONAL}\n\n{fenced(starter)}"
    else:
        spec = {"kind": "stdin", "cases": [[t["input"], t["output"]] for t in tests]}
        task = STDIN
    return {
        "id": row["question_id"],
        "prompt": f"{question}\n\n{task}",
        "tests": json.dumps(spec),
        "level": DIFFICULTY.get(row["difficulty"]),
        "solution": fenced(row["reference_solution"]) if "reference_solution" in row else None,
    }


def private_tests(text: str, largest: int = LARGEST) -> list[Any]:
    """LiveCodeBench's private tests: JSON, or base64 of zlib of a pickle of a JSON string.

    The pickle is never loaded, as loading one runs what it says; its opcodes are read, and only those of one string are taken.
    """
    if text.lstrip().startswith("["):
        return _listed(text)
    try:
        unpacker = zlib.decompressobj()
        data = unpacker.decompress(base64.b64decode(text, validate=True), largest)
        if not unpacker.eof:
            raise ValueError(f"more than {largest:,} bytes once unpacked, or cut short")
        return _listed(_pickled(data))
    except (binascii.Error, zlib.error, ValueError) as error:
        raise ValueError(
            f"private tests that cannot be read: {error}; expected JSON, or base64 of zlib of a pickled JSON string"
        ) from None


def _pickled(data: bytes) -> str:
    """The one string that a pickle holds."""
    found: str | None = None
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in STRINGS and found is None:
            found = argument
        elif opcode.name not in HARMLESS:
            raise ValueError(f"the pickle is no plain string ({opcode.name})")
    if found is None:
        raise ValueError("the pickle is empty")
    return found


def preface(prompt: str, entry: str) -> str:
    """What stands before the function that a prompt asks to complete."""
    start = re.search(rf"^def {re.escape(entry)}\b", prompt, re.MULTILINE)
    return prompt[: start.start()] if start else ""


def tested(setup: str, tests: Iterable[str]) -> str | None:
    """The function that every assert calls and the setup does not have, a builtin only if there is no other; None if unclear."""
    called = [_called(test) for test in tests]
    common = (set.intersection(*called) if called else set()) - _bound(setup)
    found = common - set(dir(builtins)) or common
    return found.pop() if len(found) == 1 else None


def _called(source: str) -> set[str]:
    """The plain names that a program calls."""
    return {
        node.func.id
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }


def _bound(source: str) -> set[str]:
    """The names that a program imports, assigns or defines."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.alias):
            found.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found


def fenced(code: str) -> str:
    """A program as a block of Markdown."""
    return f"```python\n{code.rstrip()}\n```"


def _listed(value: Any) -> list[Any]:
    """Tests as a list, from JSON or as they are."""
    found = json.loads(value) if isinstance(value, str) else value
    if not isinstance(found, list):
        raise ValueError(f"tests are a list, got {type(found).__name__}")
    return found


def _mapping(value: Any) -> Mapping[str, Any]:
    return dict(json.loads(value) if isinstance(value, str) else value)
