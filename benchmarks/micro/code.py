"""micro_code: compose list operations that a docstring names, one statement a line; lines are judged by running them.

The docstring starts anywhere in the pipeline: `, then` adds an operation after all the others, `, first` before them.
"""

from __future__ import annotations

import ast
import random
from collections.abc import Callable
from functools import lru_cache
from types import CodeType
from typing import Literal

from benchmarks.micro.problems import problem_id, reasoning_lines, response
from harness.types import Problem

SOURCE = "micro_code"
ENTRY = "def f(xs):"
Value = list[int] | int

INPUTS: tuple[Value, ...] = (  # what every program is run on
    [],
    [7, -2, 4, 13, 0, 4, -5, 8],
    [12, 3, 3, -8, 6, 1, 9, -1, 5],
    [2, 15, -4, 11, 10, -3, 17, 14, -6, 18, 20, -9, 16, 19],
)
LARGEST = 10**9  # of a value, and a bound on what a line may compute
MAX_LENGTH = 100

OPERATIONS: dict[str, str] = {
    "double": "[x * 2 for x in xs]",
    "square": "[x * x for x in xs]",
    "negate": "[-x for x in xs]",
    "keep even": "[x for x in xs if x % 2 == 0]",
    "keep odd": "[x for x in xs if x % 2 == 1]",
    "sort": "sorted(xs)",
    "sort down": "sorted(xs, reverse=True)",
    "reverse": "xs[::-1]",
    "drop first": "xs[1:]",
    "drop last": "xs[:-1]",
}
OPERATIONS |= {f"add {k}": f"[x + {k} for x in xs]" for k in range(1, 10)}
OPERATIONS |= {f"subtract {k}": f"[x - {k} for x in xs]" for k in range(1, 10)}
OPERATIONS |= {f"keep above {k}": f"[x for x in xs if x > {k}]" for k in range(1, 10)}
OPERATIONS |= {f"keep below {k}": f"[x for x in xs if x < {k}]" for k in range(1, 10)}
REDUCERS: dict[str, str] = {"sum": "sum(xs)", "count": "len(xs)"}  # these may only come last
STATEMENTS = {name: f"xs = {text}" for name, text in (OPERATIONS | REDUCERS).items()}
FUNCTION_OF: dict[str, Callable[[Value], Value]] = {
    name: eval(f"lambda xs: {text}") for name, text in (OPERATIONS | REDUCERS).items()
}
KINDS = sorted({name.rstrip("123456789 ") for name in OPERATIONS})

ALLOWED = (
    *(ast.Module, ast.Assign, ast.Name, ast.Load, ast.Store, ast.Constant, ast.ListComp, ast.comprehension),
    *(ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.Mod, ast.FloorDiv, ast.UnaryOp, ast.USub, ast.Call, ast.keyword),
    *(ast.Compare, ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.Subscript, ast.Slice),
)  # fmt: skip
FUNCTIONS = {
    "sorted": sorted,
    "sum": sum,
    "len": len,
    "list": list,
    "reversed": reversed,
    "max": max,
    "min": min,
}


@lru_cache(maxsize=100_000)
def compiled(line: str) -> CodeType | None:
    """The code of one harmless assignment to xs; None for every other text."""
    try:
        tree = ast.parse(line[:200])
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None
    nodes = list(ast.walk(tree))
    small = all((type(n.value) is int and n.value < 1000) or n.value is True for n in nodes if isinstance(n, ast.Constant))  # fmt: skip
    bounded = sum(isinstance(n, ast.Mult | ast.ListComp) for n in nodes) <= 2 and len(nodes) < 40
    match tree.body:
        case [ast.Assign(targets=[ast.Name(id="xs")])] if small and bounded:
            if all(isinstance(node, ALLOWED) for node in nodes):
                return compile(tree, "<line>", "exec")
    return None


def run(line: str, value: Value) -> Value | None:
    """What xs is after the line; None if the line may not or cannot run, or leaves something else than a list of ints."""
    code = compiled(line)
    if code is None:
        return None
    names: dict[str, object] = {"__builtins__": FUNCTIONS, "xs": value}
    try:
        exec(code, names)
    except Exception:  # whatever a line of a model may raise
        return None
    result = names["xs"]
    numbers = result if isinstance(result, list) else [result]
    if len(numbers) > MAX_LENGTH or not all(type(n) is int and abs(n) < LARGEST for n in numbers):
        return None
    return result  # type: ignore[return-value]


def after(names: tuple[str, ...], values: list[Value]) -> list[Value] | None:
    """The values after the named operations; None if one cannot be applied."""
    try:
        for name in names:
            values = [FUNCTION_OF[name](value) for value in values]
    except TypeError:  # a list operation after sum or count
        return None
    return values


def valid_next(pending: tuple[str, ...], values: list[Value]) -> list[int]:
    """Which pending operations may come next: doing them before the others does not change the outcome."""
    goal = after(pending, values)
    return [
        i
        for i, name in enumerate(pending)
        if name not in pending[:i]
        and goal is not None
        and after((name, *pending[:i], *pending[i + 1 :]), values) == goal
    ]


def draw_code(rng: random.Random, level: int) -> Problem:
    """A random pipeline of `level` operations, no kind twice, each of which does something."""
    while True:
        pool = [f"{kind} {rng.randint(1, 9)}" if kind not in OPERATIONS else kind for kind in rng.sample(KINDS, level)]  # fmt: skip
        if level > 1 and rng.random() < 0.4:
            pool[-1] = rng.choice(list(REDUCERS))
        names = tuple(pool)
        if _meaningful(names):
            return _problem(level, names, _docstring(rng, names))


def _meaningful(names: tuple[str, ...]) -> bool:
    """Every operation changes the values, and the outcome depends on the input."""
    values = list(INPUTS)
    for name in names:
        results = after((name,), values)
        if results is None or results == values:
            return False
        values = results
    return len({str(value) for value in values}) == len(INPUTS)


def _docstring(rng: random.Random, names: tuple[str, ...]) -> str:
    low = high = rng.randrange(len(names))
    text = names[low]
    while low > 0 or high < len(names) - 1:
        if high == len(names) - 1 or (low > 0 and rng.random() < 0.5):
            low -= 1
            text += f", first {names[low]}"
        else:
            high += 1
            text += f", then {names[high]}"
    return text


def pipeline(prompt: str) -> tuple[str, ...]:
    """The operations that a prompt names, in the order in which they are to be applied."""
    names: list[str] = []
    for phrase in prompt.split('"""')[1].split(", "):
        if phrase.startswith("first "):
            names.insert(0, phrase.removeprefix("first "))
        else:
            names.append(phrase.removeprefix("then "))
    return tuple(names)


def _problem(level: int, names: tuple[str, ...], docstring: str) -> Problem:
    prompt = f'{ENTRY}\n    """{docstring}"""'
    outcomes = after(names, list(INPUTS)) or []
    tests = [f"assert f({xs}) == {out}" for xs, out in zip(INPUTS, outcomes, strict=True)]
    return Problem(
        id=problem_id(SOURCE, "code", level, prompt),
        prompt=prompt,
        answer=", ".join(names),
        tests="\n".join(tests) + "\n",
        domain="code",
        level=level,
        solution=program(names),
        source=SOURCE,
        verifier="code",
    )


def program(names: tuple[str, ...]) -> str:
    """The response that applies the operations in this order: the statements, then the function."""
    lines = [STATEMENTS[name] for name in names]
    body = [f"    {line}" for line in [*lines, "return xs"]]
    return response(lines, "\n".join(["```python", ENTRY, *body, "```"]))


def solution(problem: Problem, order: Literal["right", "left", "any"] = "right") -> str:
    """A correct response: `right` keeps the pipeline's order, `left` brings forward the last operation that may go next."""
    pending, values = pipeline(problem.prompt), list(INPUTS)
    names: list[str] = []
    rng = random.Random(problem.prompt)
    while pending:
        able = valid_next(pending, values)
        i = {"right": 0, "left": able[-1]}.get(order, rng.choice(able))
        names.append(pending[i])
        values = after((pending[i],), values) or values
        pending = pending[:i] + pending[i + 1 :]
    return program(tuple(names))


class CodeOracle:
    """A line is valid if it does what a pending operation does, and the others can still follow in their order."""

    def valid_steps(self, problem: Problem, text: str) -> list[bool]:
        """Validity of each statement. A wrong one that runs a pending operation out of turn uses it up."""
        pending, values = pipeline(problem.prompt), list(INPUTS)
        valid = []
        for line in reasoning_lines(text):
            results = [result for value in values if (result := run(line, value)) is not None]
            done = [i for i, name in enumerate(pending) if after((name,), values) == results]
            done.sort(
                key=lambda i: STATEMENTS[pending[i]] != line
            )  # the operation it spells, if any
            possible = valid_next(pending, values)
            good = [i for i in done if i in possible]
            valid.append(bool(good))
            if len(results) == len(values):
                values = results
            for i in (good or done)[:1]:
                pending = pending[:i] + pending[i + 1 :]
        return valid

    def first_invalid(self, problem: Problem, text: str) -> int | None:
        """Index of the first wrong line; None if every line is right."""
        valid = self.valid_steps(problem, text)
        return valid.index(False) if False in valid else None

    def sound(self, problem: Problem, text: str) -> bool:
        """Whether the statements are all valid and as many as the pipeline has operations."""
        valid = self.valid_steps(problem, text)
        return all(valid) and len(valid) == len(pipeline(problem.prompt))
