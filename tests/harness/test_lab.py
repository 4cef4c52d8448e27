"""The lab: samples out of the store, charged once, cut by caps; randomness that is a function of its purpose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.config import SamplingSettings
from harness.lab import Workbench
from harness.ledger import Ledger
from harness.models.hf import HFModel
from harness.models.scripted import Scripted
from harness.store import Store
from harness.types import Problem, Request
from tests.benches import answer, scripted
from tests.tiny import tiny_model

RIGHT, WRONG = answer("7"), answer("8")
PROBLEMS = [Problem(name, f"{name}=?", "7", verifier="exact") for name in ("p", "qq", "rrr")]


class Counting(HFModel):
    """Counts the blocks that it samples."""

    blocks = 0

    scored = 0  # and the responses that it scores

    def generate_block(self, block: Any, **options: Any) -> Any:
        self.blocks += 1
        return super().generate_block(block, **options)

    def score(self, pairs: Any) -> Any:
        self.scored += len(pairs)
        return super().score(pairs)


def counting(seed: int = 1) -> Counting:
    model = tiny_model(seed)
    return Counting(model.model, model.tokenizer, name="teacher")


def lab(store: Path, teacher: HFModel, **settings: Any) -> Workbench:
    student = tiny_model(0)
    return Workbench(
        student,
        {"base": lambda: tiny_model(0).freeze(), "teacher": lambda: teacher},
        PROBLEMS,
        Store(store),
        settings.pop("ledger", Ledger()),
        SamplingSettings(temperature=1.0, max_new_tokens=12),
        **settings,
    )


def texts(traces: Any) -> list[list[str]]:
    return [[trace.text for trace in group] for group in traces]


def test_a_second_cell_reads_what_the_first_sampled(tmp_path: Path) -> None:
    teacher = counting()
    one, two = lab(tmp_path, teacher), lab(tmp_path, teacher, seed=5)
    first = one.samples(teacher, 4)
    blocks = teacher.blocks
    assert blocks > 0 and texts(two.samples(teacher, 4)) == texts(first)
    assert teacher.blocks == blocks
    assert two._ledger.spent["teacher_generated"] == 0
    written = sum(len(t.tokens) for group in first for t in group)
    assert one._ledger.charged["teacher_generated"] == written
    assert two._ledger.charged["teacher_generated"] == written


def test_more_samples_add_to_those_that_there_are(tmp_path: Path) -> None:
    teacher = counting()
    few = lab(tmp_path, teacher).samples(teacher, 2)
    spent = teacher.blocks
    bench = lab(tmp_path, teacher)
    many = bench.samples(teacher, 4)
    assert [group[:2] for group in texts(many)] == texts(few)
    assert teacher.blocks == 2 * spent or teacher.blocks > spent
    new = sum(len(t.tokens) for group in many for t in group[2:])
    assert bench._ledger.spent["teacher_generated"] == new


def test_asking_twice_is_charged_once(tmp_path: Path) -> None:
    teacher = counting()
    bench = lab(tmp_path, teacher)
    bench.samples(teacher, 2)
    before = dict(bench._ledger.charged)
    bench.samples(teacher, 2)
    assert bench._ledger.charged == before


PAIRS = [((1, 2, 3), (4, 5)), ((1, 2), (6,)), ((1, 2, 3), (4, 5)), ((9,), (8, 7, 6))]


def test_scores_are_shared_and_paid_for_once(tmp_path: Path) -> None:
    teacher = counting()
    one, two = lab(tmp_path, teacher), lab(tmp_path, teacher, seed=5)
    first = one.scores(teacher, PAIRS)
    assert first == [*teacher.score(PAIRS)] and first[0] == first[2]
    assert teacher.scored == 3 + 4  # the equal pair once
    assert two.scores(teacher, PAIRS, purpose="doubt") == first and teacher.scored == 7
    for bench, purpose in ((one, "scoring"), (two, "doubt")):
        assert bench._ledger.charged["teacher_scored"] == 5 + 3 + 4
        assert bench._ledger.purposes == {"teacher_scored": {purpose: 12}}
    assert (one._ledger.spent["teacher_scored"], two._ledger.spent["teacher_scored"]) == (12, 0)
    assert one._ledger.charged["flops"] == 2 * teacher.num_parameters * 12
    more = [*PAIRS, ((5,), (5,))]
    assert two.scores(teacher, more)[:4] == first and two._ledger.charged["teacher_scored"] == 14


def test_a_cap_leaves_the_rest_unscored(tmp_path: Path) -> None:
    teacher = counting()
    bench = lab(tmp_path, teacher, ledger=Ledger({"teacher_scored": 6}))
    found = bench.scores(teacher, PAIRS)
    assert [score is None for score in found] == [False, False, False, True]
    assert bench.notes == {"cut by the cap on teacher_scored": True}


def test_what_was_paid_under_a_spent_cap_is_there_again(tmp_path: Path) -> None:
    """A run that is taken up again starts with the ledger it had, cap spent, and must see what it saw."""
    teacher = counting()
    bench = lab(tmp_path, teacher, ledger=Ledger({"teacher_scored": 6, "teacher_generated": 20}))
    scores, traces = bench.scores(teacher, PAIRS), texts(bench.samples(teacher, 2))
    again = Ledger()
    again.load(bench._ledger.to_dict())
    assert again.exhausted("teacher_scored") and again.exhausted("teacher_generated")
    bench = lab(tmp_path, teacher, ledger=again)
    assert bench.scores(teacher, PAIRS) == scores and texts(bench.samples(teacher, 2)) == traces


def test_what_the_student_scores_is_no_cost_of_the_teachers(tmp_path: Path) -> None:
    bench = lab(tmp_path, counting())
    bench.scores(bench.student, PAIRS[:1])
    assert bench._ledger.charged["teacher_scored"] == 0 and bench._ledger.charged["flops"] > 0


def test_samples_are_told_by_purpose(tmp_path: Path) -> None:
    teacher = counting()
    bench = lab(tmp_path, teacher)
    base = sum(len(t.tokens) for group in bench.samples(teacher, 1) for t in group)
    both = bench.samples(teacher, 2, purpose="more")  # the first one is paid for
    more = sum(len(t.tokens) for group in both for t in group) - base
    assert bench._ledger.purposes == {"teacher_generated": {"samples": base, "more": more}}


def test_a_data_seed_redraws_and_a_training_seed_does_not(tmp_path: Path) -> None:
    teacher = counting()
    first = texts(lab(tmp_path, teacher).samples(teacher, 2))
    assert texts(lab(tmp_path, teacher, seed=9).samples(teacher, 2)) == first
    assert texts(lab(tmp_path, teacher, data_seed=1).samples(teacher, 2)) != first


def test_on_policy_samples_are_fresh_at_every_step_and_not_stored(tmp_path: Path) -> None:
    clock = [(1, 0)]
    bench = lab(tmp_path, counting(), clock=lambda: clock[0])
    first = texts(bench.samples(bench.student, 1, on_policy=True))
    assert texts(bench.samples(bench.student, 1, on_policy=True)) == first
    clock[0] = (1, 1)
    assert texts(bench.samples(bench.student, 1, on_policy=True)) != first
    assert not list(tmp_path.rglob("*.arrow"))
    other = lab(tmp_path, counting(), seed=1, clock=lambda: (1, 0))
    assert texts(other.samples(other.student, 1, on_policy=True)) != first
    assert bench._ledger.charged["student_generated"] > 0
    assert bench._ledger.charged["teacher_generated"] == 0


@pytest.mark.parametrize("warm", [False, True])
def test_a_cap_cuts_in_order_whatever_is_cached(tmp_path: Path, warm: bool) -> None:
    teacher = counting()
    whole = lab(tmp_path / str(warm), teacher).samples(teacher, 2) if warm else None
    bench = lab(tmp_path / str(warm), teacher, ledger=Ledger({"teacher_generated": 30}))
    traces = bench.samples(teacher, 2)
    sizes = [len(t.tokens) for group in traces for t in group]
    assert sum(sizes[:-1]) < 30 <= sum(sizes)
    assert bench.notes["cut by the cap on teacher_generated"] is True
    reference = whole or lab(tmp_path / "other", teacher).samples(teacher, 2)
    flat = [t for group in texts(reference) for t in group]
    assert [t for group in texts(traces) for t in group] == flat[: len(sizes)]
    assert len(sizes) < len(flat)


def test_a_problem_drawn_twice_is_answered_twice(tmp_path: Path) -> None:
    bench = lab(tmp_path, counting())
    one, two, three = PROBLEMS
    made = bench.rollouts([1.0, 2.0, 0.0])([one, two, one, three])
    assert [(e.problem, e.weight) for e in made] == [("p", 1), ("qq", 2), ("p", 1), ("rrr", 0)]
    assert made[0].response != made[2].response and made[3].response == ()


def test_an_unjudged_trace_does_not_pass_for_a_wrong_one(tmp_path: Path) -> None:
    bench = lab(tmp_path, counting())
    ((trace,), *_) = bench.samples(bench.student, 1, on_policy=True)
    with pytest.raises(ValueError, match="was not judged"):
        _ = trace.correct


def test_pass_rates_by_hand() -> None:
    bench = scripted({"a": [RIGHT, WRONG, WRONG, RIGHT], "b": [WRONG] * 4, "c": [RIGHT] * 4})
    assert bench.pass_rates(bench.teacher, 4) == pytest.approx([0.5, 0.0, 1.0])
    assert bench.pass_rates(bench.teacher, 3) == pytest.approx([1 / 3, 0.0, 1.0])


def test_references_weigh_and_leave_out() -> None:
    bench = scripted({"a": [WRONG, RIGHT], "b": [WRONG, WRONG], "c": [RIGHT, WRONG]})
    examples = bench.references([2.0, 1.0, 0.0], n=2)
    assert [(e.problem, e.weight, bench.student.decode(e.response)) for e in examples] == [
        ("a", 2.0, RIGHT),
        ("c", 0.0, ""),
    ]
    assert bench.notes["references"] == {"kept": 1, "no verified response": 1, "weight 0": 1}
    with pytest.raises(ValueError, match="give one a problem"):
        bench.references([1.0])


def test_a_continuation_keeps_its_prefix_and_trains_under_the_bare_prompt(tmp_path: Path) -> None:
    teacher = counting()
    bench = lab(tmp_path, teacher)
    problem = PROBLEMS[0]
    prefix = teacher.tokenize("so far", end=False)
    request = Request(bench.prompt(problem, "7"), problem, prefix)
    ((trace,),) = bench.samples(teacher, 1, requests=[request])
    assert trace.tokens[: len(prefix)] == prefix and trace.prefix == len(prefix)
    example = bench.example(trace, 0.5)
    assert example.prompt == bench.student.encode(bench.prompt(problem))
    assert example.response == trace.tokens and example.weight == 0.5
    assert bench._ledger.charged["teacher_generated"] == len(trace.tokens) - len(prefix)


def test_a_teacher_with_another_vocabulary_is_read_as_text(tmp_path: Path) -> None:
    author = Scripted({problem.id: [RIGHT] for problem in PROBLEMS})
    student = tiny_model(0)
    assert author.vocabulary_digest != student.vocabulary_digest
    bench = Workbench(
        student,
        {"teacher": lambda: author},
        PROBLEMS,
        Store(tmp_path),
        Ledger(),
        SamplingSettings(),
    )
    ((trace,), *_) = bench.samples(author, 1)
    assert bench.example(trace).response == student.tokenize(RIGHT)


def test_randomness_is_a_function_of_seed_and_purpose() -> None:
    one, two = scripted({"a": []}), scripted({"a": []}, seed=1)
    draw = one.rng("order").random(3)
    assert np.array_equal(draw, scripted({"a": []}).rng("order").random(3))
    assert not np.array_equal(draw, one.rng("other").random(3))
    assert not np.array_equal(draw, two.rng("order").random(3))


def test_a_timeout_is_of_the_machine_and_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from harness import verifiers
    from harness.types import Verdict

    problem = Problem("m", "m", "1/2", verifier="math", source="x")
    bench = lab(tmp_path, counting())
    text = r"<think></think>\boxed{0.5}"
    with monkeypatch.context() as slow:
        slow.setattr(verifiers, "verify_many", lambda items, **_: [Verdict("timeout")] * len(items))
        assert bench.verify(problem, text).status == "timeout"
    assert bench.verify(problem, text).status == "ok"


def test_verdicts_of_costly_verifiers_are_kept(tmp_path: Path) -> None:
    items = [Problem("m", "m", "1/2", verifier="math", source="x")]
    author = Scripted({"m": [r"<think></think>\boxed{0.5}"]})

    def bench() -> Workbench:
        pupil = Scripted({"m": [""]}, name="student")
        loaders = {"base": lambda: pupil, "teacher": lambda: author}
        return Workbench(pupil, loaders, items, Store(tmp_path), Ledger(), SamplingSettings())

    one, two = bench(), bench()
    assert one.samples(author, 1)[0][0].correct and two.samples(author, 1)[0][0].correct
    assert (one._ledger.spent["verifier_calls"], two._ledger.spent["verifier_calls"]) == (1, 0)
    assert two._ledger.charged["verifier_calls"] == 1


def test_samples_are_judged_unless_asked_not_to_be() -> None:
    ledger = Ledger()
    bench = scripted({"p": [RIGHT, WRONG]}, {"p": [WRONG, RIGHT]}, ledger=ledger)
    [traces] = bench.samples(bench.teacher, 2, judge=False)
    assert [t.verdict for t in traces] == [None, None] and ledger.charged["verifier_calls"] == 0
    [fresh] = bench.samples(bench.student, 2, on_policy=True)
    assert fresh[0].verdict is None
    [judged] = bench.samples(bench.student, 2, on_policy=True, judge=True)
    assert [t.correct for t in judged] == [False, True]
    assert [t.correct for t in bench.judged(fresh)] == [False, True]


def test_on_policy_randomness_is_a_function_of_the_step_too() -> None:
    step = [0, 0]
    bench = scripted({"p": [RIGHT]}, clock=lambda: tuple(step))
    one, two = bench.rng("x"), bench.rng("x", on_policy=True)
    step[1] = 1
    again, later = bench.rng("x"), bench.rng("x", on_policy=True)
    drawn = [rng.random() for rng in (one, two, again, later)]
    assert drawn[0] == drawn[2] and len(set(drawn)) == 3


def test_flops_of_samples_count_what_is_read_once_a_request(tmp_path: Path) -> None:
    """Two samples under a prefix of three tokens: 2 N (prompt + 3 + what both wrote); on-policy samples alike."""
    for on_policy in (False, True):
        ledger = Ledger()
        bench = lab(tmp_path, tiny_model(1).freeze(), ledger=ledger)
        request = Request("p=?", PROBLEMS[0], (65, 66, 67))
        for _ in range(2):  # once a request also where it is asked again, out of the store
            [traces] = bench.samples(bench.teacher, 2, requests=[request], on_policy=on_policy)
        read = len(bench.teacher.encode("p=?")) + 3
        written = sum(len(t.tokens) - 3 for t in traces)
        parameters = bench.teacher.num_parameters  # type: ignore[attr-defined]
        times = 2 if on_policy else 1
        assert ledger.charged["flops"] == times * 2 * parameters * (read + written)
