r"""Prompts for models that only continue text: solved examples, then the problem, with no chat template.

The examples end as ours are read: a mathematical one in \boxed{}, a program in a fenced block. HumanEval's prompts need none.
"""

from __future__ import annotations

import re

from harness import coding, problems
from harness.types import Problem

GSM8K_SHOTS = 8  # the first training problems
MBPP_SHOTS = (2, 3, 4)  # of the tasks that MBPP sets aside for prompts
MATH = (
    (
        "The sum of two numbers is 14 and their difference is 4. What is the larger one?",
        r"Twice the larger number is the sum plus the difference, $14 + 4 = 18$, so it is $\boxed{9}$.",
    ),
    (
        r"Simplify $\frac{x^2 - 9}{x - 3}$ for $x \neq 3$.",
        r"The numerator is $(x - 3)(x + 3)$. After dividing by $x - 3$ there remains $\boxed{x + 3}$.",
    ),
    (
        "Two fair dice are rolled. What is the probability that the sum is 4?",
        r"Of 36 equally likely rolls, $(1, 3)$, $(2, 2)$ and $(3, 1)$ have the sum 4: $\frac{3}{36} = \boxed{\frac{1}{12}}$.",
    ),
    (
        r"Find all real $x$ with $x^2 - 5x + 6 = 0$.",
        r"Since $x^2 - 5x + 6 = (x - 2)(x - 3)$, the solutions are $\boxed{2, 3}$.",
    ),
)
STDIN = (
    "Given an integer n and then n integers on the next line, print the largest of them.\n\n{task}",
    "n = int(input())\nprint(max(map(int, input().split())))",
)
FUNCTIONAL = (
    "Given a list of integers, return how many of them are even.\n\n{task}\n\n"
    "```python\nclass Solution:\n    def countEven(self, nums: List[int]) -> int:\n```",
    "class Solution:\n    def countEven(self, nums: List[int]) -> int:\n        return sum(n % 2 == 0 for n in nums)",
)


def prompt(problem: Problem) -> str:
    """The text that a base model continues with its answer."""
    if problem.source == "humaneval":
        return (
            problem.prompt.rstrip()
        )  # the line break belongs to the body, for the tokenizer's sake
    if problem.domain == "math":
        shots = _gsm8k() if problem.source == "gsm8k" else MATH
        text = "".join(f"Problem: {asked}\nSolution: {solved}\n\n" for asked, solved in shots)
        return f"{text}Problem: {problem.prompt}\nSolution:"
    shots = _mbpp() if problem.source == "mbpp" else _livecodebench(problem)
    text = "".join(f"{asked}\n\n[BEGIN]\n{solved}\n[DONE]\n\n" for asked, solved in shots)
    return f"{text}{problem.prompt}\n\n[BEGIN]\n"


def _gsm8k() -> tuple[tuple[str, str], ...]:
    found = problems.load("gsm8k", "train", GSM8K_SHOTS)
    return tuple((p.prompt, _boxed(p.solution or "")) for p in found)


def _boxed(solution: str) -> str:
    """A solution of GSM8K in plain words: without its calculator notes, the answer boxed."""
    text, _, answer = re.sub(r"<<[^<>]*>>", "", solution).rpartition("####")
    return rf"{' '.join(text.split())} The answer is $\boxed{{{answer.strip()}}}$."


def _mbpp() -> tuple[tuple[str, str], ...]:
    wanted = [f"mbpp/{number}" for number in MBPP_SHOTS]
    found = {p.id: p for p in problems.every("mbpp") if p.id in wanted}
    return tuple((found[key].prompt, found[key].solution or "") for key in wanted)


def _livecodebench(problem: Problem) -> tuple[tuple[str, str], ...]:
    functional = '"functional"' in (problem.tests or "")[:40]
    asked, solved = FUNCTIONAL if functional else STDIN
    task = coding.FUNCTIONAL if functional else coding.STDIN
    return ((asked.format(task=task), coding.fenced(solved)),)
