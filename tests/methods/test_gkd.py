"""GKD: whose text a step trains on, and what is asked for."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness import registry
from harness.ledger import Ledger
from harness.objectives import forward_kl, jsd, reverse_kl
from harness.types import OnPolicy, Stage
from tests.benches import Cut, Run, answer, listen, scripted

RIGHT, WRONG, OWN = answer("7"), answer("8"), answer("9")
TEACHER = {"a": [WRONG, RIGHT], "b": [WRONG, WRONG], "c": [RIGHT, WRONG]}


class Bench:
    """A scripted lab with a clock that a test sets."""

    def __init__(self, **fields: Any) -> None:
        self.step, self.ledger = 0, Ledger()
        student = {name: [OWN] for name in TEACHER}
        self.lab = scripted(TEACHER, student, ledger=self.ledger, clock=lambda: (0, self.step))
        self.method = registry.build("gkd", {"references": 2, **fields})
        (stage,) = self.method.stages(self.lab)
        self.stage: Stage = stage
        assert isinstance(stage.source, OnPolicy)
        self.source = stage.source

    def authors(self, steps: int) -> str:
        """T or S for each step, which trains on the text of one of them alone."""
        found = []
        for self.step in range(steps):
            made = self.source.make(self.source.problems)
            assert [e.problem for e in made] == [p.id for p in self.source.problems]
            texts = {self.lab.student.decode(e.response) for e in made}
            assert texts in ({RIGHT}, {OWN})
            found.append("S" if texts == {OWN} else "T")
        return "".join(found)


def test_a_share_lambda_of_the_steps_is_the_students() -> None:
    quarter = Bench(lam=0.25)
    drawn = quarter.authors(200)
    assert 0.15 < drawn.count("S") / 200 < 0.35
    assert quarter.authors(200) == drawn == Bench(lam=0.25).authors(200)  # no state between calls
    more = Bench(lam=0.6).authors(200)
    assert 0.5 < more.count("S") / 200 < 0.7
    assert all(b == "S" for a, b in zip(drawn, more, strict=True) if a == "S")  # the same u


def test_the_ends_never_ask_the_other_one() -> None:
    teacher, student = Bench(lam=0.0), Bench(lam=1.0)
    assert teacher.authors(50) == "T" * 50 and student.authors(50) == "S" * 50
    assert teacher.ledger.charged["student_generated"] == 0
    assert student.ledger.charged["teacher_generated"] == 0
    assert student.method.required() == {"teacher.logits"}
    assert teacher.method.required() == {"teacher.generate", "teacher.logits"}


def test_lambda_zero_does_not_sample_at_a_draw_of_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(lam=0.0)
    monkeypatch.setattr(bench.lab, "rng", lambda *_, **__: SimpleNamespace(random=lambda: 0.0))
    assert bench.authors(1) == "T"


def test_problems_without_a_reference_are_left_out_unless_none_is_needed() -> None:
    def ids(**fields: Any) -> list[str]:
        return [problem.id for problem in Bench(**fields).source.problems]

    assert ids(lam=0.0) == ids(lam=0.5) == ["a", "c"]
    assert ids(lam=0.5, references=1) == ["c"]
    assert ids(lam=0.5, keep_wrong_teacher=True) == ids(lam=1.0) == ["a", "b", "c"]


def test_divergence_and_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Bench(beta=0.3).stage.objective == jsd(0.3) and Bench().stage.mean == "token"
    assert Bench(beta=0).stage.objective == forward_kl
    assert Bench(beta=1).stage.objective == reverse_kl
    bench = Bench(lam=1.0, temperature=0.7)
    asked = listen(bench.lab, monkeypatch)
    bench.authors(1)
    assert [(s.temperature, s.top_p, s.top_k) for s in asked] == [(0.7, 1.0, 0)]


def test_a_run_that_was_cut_draws_the_same_authors(tmp_path: Path) -> None:
    """Six steps, of which some are the student's and some the teacher's."""
    whole = Run("gkd", {}, steps=6)
    with pytest.raises(Cut):
        Run("gkd", {}, steps=6, checkpoint=tmp_path / "c.pt", cut_after=3)
    again = Run("gkd", {}, steps=6, checkpoint=tmp_path / "c.pt")
    assert again.losses == whole.losses and again.student.identity == whole.student.identity
    generated = again.ledger.charged["student_generated"]
    assert generated == whole.ledger.charged["student_generated"] > 0
    assert generated < Run("gkd", {"lam": 1.0}, steps=6).ledger.charged["student_generated"]
