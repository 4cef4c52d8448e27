"""What the tests of VCRD share: problems, scripted models, a lab of them, and actions written out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from harness.lab import Workbench
from harness.ledger import Ledger
from harness.models.scripted import Scripted
from harness.store import Store
from harness.types import Problem, Request
from methods.vcrd import VCRD
from methods.vcrd.proposals import Action, Pair
from tests.benches import SAMPLING, shared_store

ADD = Problem("add", "1+2=?", "3", verifier="exact")

LONG = Problem(
    "micro_math/reduce-3-x", "(1+2)+(3+4)=?", "10", level=3, source="micro_math", verifier="exact"
)

TEACHER = "<think>\n(1+2)+7\n3+7\n10\n</think>\n10"

STUDENT = "<think>\n3+(3+4)\n3+8\n11\n</think>\n11"


def vcrd(**fields: Any) -> VCRD:
    return VCRD(**{"steps": "line", "refresh": 0, **fields})


class Rewards:
    """A reward model that knows some texts."""

    capabilities = frozenset({"reward"})
    num_parameters = 5

    def __init__(self, table: Mapping[str, float]) -> None:
        self.table, self.name, self.identity = table, "rewards", repr(sorted(table.items()))
        self.seen: list[tuple[str, str]] = []

    def lengths(self, pairs: Any) -> list[int]:
        return [len(turn) + len(text) for turn, text in pairs]

    def reward(self, pairs: Any) -> list[float]:
        self.seen += pairs
        return [self.table[text or turn] for turn, text in pairs]


def bench(
    teacher: Any,
    student: Any = None,
    *,
    problems: Any = (ADD,),
    ledger: Ledger | None = None,
    **more: Any,
) -> Workbench:
    """A lab of two scripted models, of which each answer is a function of (request, sample index) or a table."""
    pupil, author = student or teacher, teacher
    author = author if isinstance(author, Scripted) else Scripted(author, name="teacher")
    pupil = pupil if isinstance(pupil, Scripted) else Scripted(pupil, name="student")
    loaders: dict[str, Callable[[], Any]] = {"base": lambda: pupil, "teacher": lambda: author}
    loaders |= {
        name: (lambda model=model: model)
        for name, model in more.items()
        if name in ("prm", "judge")
    }
    rest = {name: value for name, value in more.items() if name not in loaders}
    store = Store(shared_store() / "vcrd")
    return Workbench(pupil, loaders, problems, store, ledger or Ledger(), SAMPLING, **rest)


def action(
    lab: Workbench, before: str, step: str, *, ends: bool = False, problem: Problem = ADD
) -> Action:
    prefix = lab.teacher.tokenize(before, end=False)
    tokens = (*prefix, *lab.teacher.tokenize(step, end=ends))
    return Action(problem, len(prefix), tokens, before + step, ends)


def written(full: str) -> Callable[[Request, int], str]:
    """A model that continues any prefix as its own response goes on from that length of lines."""

    def answer(request: Request, index: int) -> str:
        lines = full.splitlines(keepends=True)
        done = Scripted({}).decode(request.prefix).count("\n")
        return "".join(lines[done:])

    return answer


def texts(lab: Workbench, found: list[Pair]) -> list[tuple[str, str, str]]:
    """(prefix, teacher's step, student's step) of each pair"""
    say = lab.teacher.decode
    return [
        (say(p.teacher.tokens[: p.teacher.prefix]), say(p.teacher.step), say(p.student.step))
        for p in found
    ]
