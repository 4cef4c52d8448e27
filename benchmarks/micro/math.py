"""micro_math: reduce an expression, or solve an equation, one step a line; with the truth about every step.

Reduce: a step carries out one operation whose two operands are numbers. Solve: a step undoes the outermost operation, or
merges two neighbouring ones of a kind, `(E+3)-7` into `E-4` and `(E*2)*3` into `E*6`.
"""

from __future__ import annotations

import random
import re
from itertools import pairwise
from typing import Literal

from benchmarks.micro.problems import family_of, problem_id, reasoning_lines, response
from harness.types import Problem

Expression = int | tuple[str, "Expression", "Expression"]  # a number, or (operator, left, right)
Equation = tuple[
    tuple[tuple[str, int], ...], int
]  # operations around x, innermost first; right-hand side
# Which of several valid steps a written solution takes; any: one drawn by the problem's text.
Order = Literal["right", "left", "any"]

SOURCE = "micro_math"
LARGEST, LARGEST_ADDED, LARGEST_X = 99, 49, 20  # any value; a number added in an equation; x
MAX_LINE = 200  # characters; longer lines are not read


# Reduce ---------------------------------------------------------------------------------------------------------------


def calculate(operator: str, left: int, right: int) -> int:
    return left + right if operator == "+" else left - right if operator == "-" else left * right


def draw_expression(rng: random.Random, operators: int) -> tuple[Expression, int] | None:
    """A random expression and its value, every intermediate value in 0..99; None if the draw ran into a dead end."""
    if operators == 0:
        number = rng.randint(1, 9) if rng.random() < 0.85 else rng.randint(10, 29)
        return number, number
    inner = rng.randrange(operators)
    left, right = draw_expression(rng, inner), draw_expression(rng, operators - 1 - inner)
    if left is None or right is None:
        return None
    fitting = [o for o in "+-*" if 0 <= calculate(o, left[1], right[1]) <= LARGEST]
    if not fitting:
        return None
    operator = rng.choice(fitting)
    return (operator, left[0], right[0]), calculate(operator, left[1], right[1])


def write(expression: Expression, outermost: bool = True) -> str:
    """The text of an expression: every compound operand in parentheses."""
    if isinstance(expression, int):
        return str(expression)
    operator, left, right = expression
    text = f"{write(left, False)}{operator}{write(right, False)}"
    return text if outermost else f"({text})"


def read(text: str) -> Expression | None:
    """The expression that `write` would write so; None for any other text."""
    tokens = re.findall(r"\d+|.", text[: MAX_LINE + 1])

    def operand() -> Expression:
        token = tokens.pop(0)
        if token != "(":
            return int(token)
        inside = operation()
        if tokens.pop(0) != ")":
            raise ValueError(text)
        return inside

    def operation() -> Expression:
        left = operand()
        operator = tokens.pop(0)
        if operator not in "+-*":
            raise ValueError(text)
        return operator, left, operand()

    try:
        expression = int(text) if re.fullmatch(r"-?\d+", text) else operation()
    except (ValueError, IndexError):
        return None
    return expression if write(expression) == text else None


def reductions(expression: Expression) -> list[Expression]:
    """Every expression that one operation leads to, left-most operation first."""
    if isinstance(expression, int):
        return []
    operator, left, right = expression
    if isinstance(left, int) and isinstance(right, int):
        return [calculate(operator, left, right)]
    steps: list[Expression] = [(operator, new, right) for new in reductions(left)]
    steps += [(operator, left, new) for new in reductions(right)]
    return steps


def draw_reduce(rng: random.Random, level: int) -> Problem:
    """A random expression with `level` operators."""
    while (drawn := draw_expression(rng, level)) is None:
        pass
    return _problem("reduce", level, f"{write(drawn[0])}=?", str(drawn[1]))


# Solve ----------------------------------------------------------------------------------------------------------------


def draw_solve(rng: random.Random, level: int) -> Problem:
    """A random equation with `level` operations around x."""
    x = value = rng.randint(1, LARGEST_X)
    operations: list[tuple[str, int]] = []
    while len(operations) < level:
        operator = rng.choice("+-*")
        number = rng.randint(2, 9) if operator == "*" else rng.randint(1, LARGEST_ADDED)
        result = calculate(operator, value, number)
        if 0 < result <= LARGEST:
            operations.append((operator, number))
            value = result
    return _problem("solve", level, write_equation((tuple(operations), value)), str(x))


def write_equation(equation: Equation) -> str:
    """The text of an equation, as in `((x*6)*4)-7=89`."""
    operations, value = equation
    text = "x"
    for operator, number in operations:
        text = f"{text if text == 'x' else f'({text})'}{operator}{number}"
    return f"{text}={value}"


def read_equation(text: str) -> Equation | None:
    """The equation that `write_equation` would write so; None for any other text."""
    match = re.fullmatch(r"([^=]+)=(-?\d{1,9})", text[:MAX_LINE])
    if not match:
        return None
    side, operations = match[1], list[tuple[str, int]]()
    while side != "x":
        peeled = re.fullmatch(r"(x|\(.+\))([-+*])(\d{1,9})", side)
        if not peeled:
            return None
        operations.insert(0, (peeled[2], int(peeled[3])))
        side = peeled[1].removeprefix("(").removesuffix(")")
    equation = tuple(operations), int(match[2])
    return equation if write_equation(equation) == text else None


def undone(equation: Equation) -> Equation | None:
    """The equation without its outermost operation; None where nothing is left or a division leaves a remainder."""
    operations, value = equation
    if not operations:
        return None
    operator, number = operations[-1]
    if operator == "*":
        return (operations[:-1], value // number) if number and value % number == 0 else None
    return operations[:-1], value - number if operator == "+" else value + number


def merges(equation: Equation) -> list[Equation]:
    """Every equation in which two neighbouring operations of a kind have become one, innermost first."""
    operations, value = equation
    merged = []
    for i, ((inner, a), (outer, b)) in enumerate(pairwise(operations)):
        if (inner == "*") != (outer == "*"):
            continue
        if inner == "*":
            one: tuple[tuple[str, int], ...] = (("*", a * b),)
        else:
            total = (a if inner == "+" else -a) + (b if outer == "+" else -b)
            one = (("+" if total > 0 else "-", abs(total)),) if total else ()
        merged.append((operations[:i] + one + operations[i + 2 :], value))
    return merged


# Both -----------------------------------------------------------------------------------------------------------------


def _problem(family: str, level: int, prompt: str, answer: str) -> Problem:
    lines = solution_lines(prompt, "right")
    return Problem(
        id=problem_id(SOURCE, family, level, prompt),
        prompt=prompt,
        answer=answer,
        domain="math",
        level=level,
        solution=response(lines, answer),
        source=SOURCE,
        verifier="exact",
    )


def next_lines(line: str) -> list[str]:
    """Every line that is one valid step after this one; a prompt without its `=?` counts as a line."""
    if "x" not in line:
        expression = read(line)
        return [] if expression is None else [write(new) for new in reductions(expression)]
    equation = read_equation(line)
    if equation is None:
        return []
    steps = [*merges(equation), undone(equation)]
    return [write_equation(step) for step in steps if step is not None]


def solution_lines(prompt: str, order: Order) -> list[str]:
    """A correct derivation: `right` takes the right-most (outermost) step each time, `left` the left-most."""
    lines, rng = [prompt.removesuffix("=?")], random.Random(prompt)
    while steps := next_lines(lines[-1]):
        choice = {"right": -1, "left": 0}.get(order, rng.randrange(len(steps)))
        lines.append(steps[choice])
    return lines[1:]


def solution(problem: Problem, order: Order = "right") -> str:
    """A correct response in the given order."""
    return response(solution_lines(problem.prompt, order), problem.answer or "")


class MathOracle:
    """A line is valid if it is one step after the line before it, whatever that was worth."""

    def valid_steps(self, problem: Problem, text: str) -> list[bool]:
        """Validity of each reasoning line, each judged against its own predecessor."""
        assert family_of(problem) in ("reduce", "solve"), problem.id
        lines = [problem.prompt.removesuffix("=?"), *reasoning_lines(text)]
        return [line in next_lines(before) for before, line in pairwise(lines)]

    def first_invalid(self, problem: Problem, text: str) -> int | None:
        """Index of the first wrong line; None if every line is right."""
        valid = self.valid_steps(problem, text)
        return valid.index(False) if False in valid else None

    def sound(self, problem: Problem, text: str) -> bool:
        """Whether the lines are a whole derivation: all valid, and after the last one nothing is left to do."""
        lines = reasoning_lines(text)
        return bool(lines) and all(self.valid_steps(problem, text)) and not next_lines(lines[-1])
