"""VCRD: the properties P1 to P7, each formula by hand, and the logic of proposals on scripted models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from math import exp
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import PROBLEMS
from harness import registry
from harness.lab import Workbench
from harness.ledger import Ledger
from harness.models.scripted import Reply, Scripted
from harness.objectives import forward_kl, skew_kl, skew_reverse_kl
from harness.store import Store
from harness.types import Example, Ids, Measure, OnPolicy, Problem, Request, Scores, Tokens
from methods.vcrd import VCRD
from methods.vcrd.loss import StepLoss, TokenWeighted, examples
from methods.vcrd.proposals import Action, Pair, pairs, positions, propose
from methods.vcrd.validity import ESTIMATORS, judge, validities
from methods.vcrd.weights import weights
from tests.benches import SAMPLING, Cut, Run, shared_store

FORMS = ["sigmoid", "linear", "ratio", "exp", "hard", "relu"]  # calibrated by Delta
CONTROLS = ["teacher_only", "student_only", "inverted", "shuffled", "uniform"]
RNG = np.random.default_rng(0)


def vcrd(**fields: Any) -> VCRD:
    return VCRD(**{"steps": "line", "refresh": 0, **fields})


def weigh(form: str, teacher: Any, student: Any, **fields: Any) -> list[float]:
    v = np.asarray(teacher, dtype=float), np.asarray(student, dtype=float)
    return weights(vcrd(weight=form, **fields), *v, np.random.default_rng(1)).tolist()


# -- weights --------------------------------------------------------------------------------------


def test_weights_by_hand() -> None:
    vt, vs = [0.9, 0.5, 0.2], [0.3, 0.5, 0.7]  # Delta 0.6, 0, -0.5
    s = [2 / (1 + exp(-d / 0.4)) for d in (0.6, 0.0, -0.5)]
    wide = {"low": 0.0, "high": 100.0}
    assert weigh("sigmoid", vt, vs, tau=0.4, **wide) == pytest.approx(s)
    assert weigh("inverted", vt, vs, tau=0.4, **wide) == pytest.approx([2 - x for x in s])
    assert weigh("linear", vt, vs, strength=0.5, **wide) == pytest.approx([1.3, 1, 0.75])
    assert weigh("ratio", vt, vs, **wide) == pytest.approx([1.5, 1, 4 / 9], abs=1e-5)
    assert weigh("exp", vt, vs, tau=0.3, **wide) == pytest.approx([exp(2), 1, exp(-5 / 3)])
    assert weigh("hard", vt, vs, delta=0.0) == [1, 0, 0]  # Delta > 0: a tie is no reason to learn
    assert weigh("hard", vt, vs, delta=0.2) == [1, 1, 0]
    assert weigh("relu", vt, vs) == pytest.approx([0.6, 0, 0])
    assert weigh("teacher_only", vt, vs, **wide) == pytest.approx([1.8, 1, 0.4])
    assert weigh("student_only", vt, vs, **wide) == pytest.approx([1.4, 1, 0.6])
    assert weigh("uniform", vt, vs) == [1, 1, 1]


def test_the_clip() -> None:
    assert weigh("exp", [1, 0], [0, 1], tau=0.1, low=0.1, high=3.0) == [3, 0.1]
    assert weigh("sigmoid", [0], [1], tau=0.1, low=0.3) == [0.3]
    assert weigh("linear", [0], [1], strength=5.0) == [0.05]  # never negative
    assert weigh("hard", [0], [1], low=0.2) == [0] == weigh("relu", [0], [1], low=0.2)  # gates


GRID = [(t / 10, s / 10) for t in range(11) for s in range(11)]


@pytest.mark.parametrize("form", ["sigmoid", "linear", "exp", "hard", "relu"])
def test_p2_only_the_difference_counts(form: str) -> None:
    assert weigh(form, [0.9, 0.6], [0.7, 0.4]) == pytest.approx([weigh(form, [0.5], [0.3])[0]] * 2)
    assert weigh("teacher_only", [0.9], [0.7]) != weigh(
        "teacher_only", [0.5], [0.3]
    )  # the control does not


@pytest.mark.parametrize("form", FORMS + CONTROLS)
def test_p4_the_update_never_reverses(form: str) -> None:
    assert min(weigh(form, *zip(*GRID, strict=True), strength=3.0, tau=0.05)) >= 0
    logits = torch.randn(2, 40, 7, generator=torch.Generator().manual_seed(0))
    nothing = Tokens(torch.zeros(40, dtype=torch.long), torch.ones(40), {})
    for objective in vcrd().objectives.values():  # distances from the teacher
        assert (objective(logits[0], logits[1], nothing) >= 0).all()


@pytest.mark.parametrize("form", FORMS)
def test_p5_the_weight_grows_with_the_teachers_lead(form: str) -> None:
    leads = [weigh(form, [0.5 + d / 2], [0.5 - d / 2])[0] for d in np.linspace(-1, 1, 41)]
    assert all(a <= b + 1e-12 for a, b in pairwise(leads)) and leads[0] < leads[-1]
    worse = [weigh("inverted", [0.5 + d / 2], [0.5 - d / 2])[0] for d in np.linspace(-1, 1, 41)]
    assert all(a >= b for a, b in pairwise(worse)) and worse[0] > worse[-1]


def test_shuffled_weights_are_those_of_the_method_in_another_order() -> None:
    vt, vs = [0.9, 0.5, 0.2, 0.7], [0.3, 0.5, 0.7, 0.6]
    assert sorted(weigh("shuffled", vt, vs)) == pytest.approx(sorted(weigh("sigmoid", vt, vs)))


def test_shuffled_weights_fall_back_to_the_base_loss_in_expectation() -> None:
    """A closed form: one logistic student per pair, l_k = (theta - y_k)^2 / 2, so the weighted step is theta - sum w y / sum w.
    Over the permutations it is the step of uniform weights, theta - mean y; the true weights move it elsewhere."""
    vt, vs, y = (
        np.array([0.9, 0.5, 0.1, 0.8]),
        np.array([0.1, 0.5, 0.9, 0.1]),
        np.array([3.0, -1, 2, 7]),
    )
    rng, setting = np.random.default_rng(3), vcrd(weight="shuffled")
    pulls = np.array(
        [w @ y / w.sum() for w in (weights(setting, vt, vs, rng) for _ in range(6000))]
    )
    error = pulls.std() / len(pulls) ** 0.5
    assert abs(pulls.mean() - y.mean()) < 4 * error < 0.2
    own = np.array(weigh("sigmoid", vt, vs))
    assert abs(own @ y / own.sum() - y.mean()) > 10 * error


def test_p6_the_token_weight_is_a_constant_of_the_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 30, 5, generator=generator).double()
    nothing = Tokens(torch.zeros(30, dtype=torch.long), torch.ones(30), {})
    objective, base = TokenWeighted(skew_kl(0.1)), skew_kl(0.1)
    leaf = student.clone().requires_grad_()
    weight = objective.weight(student, teacher)
    objective(leaf, teacher, nothing).sum().backward()
    _, slope = base.gradient(student.clone(), teacher, nothing)  # type: ignore[attr-defined]
    assert torch.allclose(leaf.grad, weight[:, None] * slope)  # type: ignore[arg-type]
    assert (weight[student.argmax(-1) == teacher.argmax(-1)] == 0).all() and (weight > 0).any()


def test_the_token_weight_by_hand() -> None:
    teacher = torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2]]).log() + 3  # logits, not normalised
    student = torch.tensor([[0.1, 0.8, 0.1], [0.9, 0.0, 0.1]])
    assert TokenWeighted.weight(student, teacher).tolist() == pytest.approx([1 - 0.3 / 0.5, 0])


# -- validity -------------------------------------------------------------------------------------

ADD = Problem("add", "1+2=?", "3", verifier="exact")


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


def test_rollouts_by_hand() -> None:
    def teacher(request: Request, index: int) -> str:
        return "</think>\n3" if index < (3 if request.prefix[-2:] == good else 1) else "</think>\n4"

    def student(request: Request, index: int) -> str:
        return "</think>\n3" if index < 1 else "</think>\n4"

    lab = bench(Scripted(teacher, name="t1"), Scripted(student, name="s1"))
    good = lab.teacher.tokenize("3\n", end=False)
    steps = [action(lab, "<think>\n", "3\n"), action(lab, "<think>\n", "4\n")]
    by = lambda **f: ESTIMATORS["rollout"](lab, vcrd(**f), steps, False)  # noqa: E731
    assert by(completer="teacher", rollouts=5) == pytest.approx([4 / 7, 2 / 7])  # (c+1) / (K+2)
    assert by(completer="student", rollouts=5) == pytest.approx([2 / 7, 2 / 7])
    # both: 3 by the teacher (3 and 1 right), 2 by the student (1 right)
    assert by(completer="both", rollouts=5) == pytest.approx([5 / 7, 3 / 7])


def test_a_step_that_ends_the_response_counts_by_its_answer() -> None:
    lab = bench({"add": ["</think>\n4"]}, prm=Rewards({"<think>\n3\n": 0.7}))
    done = "<think>\n3\n</think>\n"
    steps = [
        action(lab, done, "3", ends=True),
        action(lab, "<think>\n", "3\n"),
        action(lab, done, "4", ends=True),
    ]
    assert judge(lab, vcrd(validity="prm"), steps, False) == [1, 0.7, 0]
    assert judge(lab, vcrd(validity="const"), steps, False) == [0.5] * 3


def test_likelihood_by_hand() -> None:
    def scores(nats: float) -> Callable[[Ids, Ids], Scores]:
        # The prefix is free, so a mean over the whole response would be smaller than over the step.
        return lambda prompt, response: Scores(
            tuple(0.0 if i < 8 else -nats * (i - 7) for i in range(len(response))),
            (0.0,) * len(response),
        )

    def model(name: str, nats: float) -> Scripted:
        return Scripted({}, name=name, capabilities={"generate", "score"}, scores=scores(nats))

    lab = bench(model("t2", 0.1), model("s2", 0.5))
    step = action(lab, "<think>\n", "3\n")  # two tokens, of 1 and 2 times as many nats
    assert step.prefix == 8
    value = exp((0.1 + 0.2 + 0.5 + 1.0) / 4)
    assert ESTIMATORS["likelihood"](lab, vcrd(), [step], False) == pytest.approx([1 / value])


def test_the_judge_is_asked_about_one_step_after_what_stands_before_it() -> None:
    from methods.vcrd.validity import QUESTION

    asked = QUESTION.format(problem="1+2=?", before="<think>\n", step="3\n")
    judge_ = Rewards({asked: 0.9})
    lab = bench({"add": [""]}, judge=judge_)
    step = action(lab, "<think>\n", "3\n")
    assert ESTIMATORS["judge"](lab, vcrd(), [step], False) == [0.9]
    assert lab._ledger.charged["verifier_calls"] == 1 and lab._ledger.charged["flops"] > 0
    assert ESTIMATORS["judge"](lab, vcrd(), [step], False) == [0.9] and len(judge_.seen) == 1


LONG = Problem(
    "micro_math/reduce-3-x", "(1+2)+(3+4)=?", "10", level=3, source="micro_math", verifier="exact"
)


@pytest.mark.parametrize(("before", "step", "ends", "valid"), [
    ("<think>\n", "3+(3+4)\n", False, 1),
    ("<think>\n", "(1+2)+7\n", False, 1),  # the other order is as valid
    ("<think>\n", "4+(3+4)\n", False, 0),
    ("<think>\n", "3+7\n", False, 0),  # two operations at once
    ("<think>\n3+(3+4)\n", "</think>\n", False, 0),  # closed too early
    ("<think>\n3+(3+4)\n3+7\n10\n", "</think>\n", False, 1),
    ("<think>\n4+(3+4)\n", "4+7\n", False, 1),  # a right step after a wrong one
    ("<think>\n4+(3+4)\n4+7\n11\n", "</think>\n", False, 0),
    ("<think>\n3+(3+4)\n3+7\n10\n</think>\n", "10", True, 1),
    ("<think>\n3+(3+4)\n3+7\n10\n</think>\n", "11", True, 0),
])  # fmt: skip
def test_the_oracle_by_hand(before: str, step: str, ends: bool, valid: int) -> None:
    lab = bench({LONG.id: [""]}, problems=(LONG,), oracle=PROBLEMS["micro_math"].oracle)
    given = action(lab, before, step, ends=ends, problem=LONG)
    assert judge(lab, vcrd(validity="oracle"), [given], False) == [valid]


def test_without_an_oracle_it_says_what_to_do_before_anything_is_sampled() -> None:
    ledger = Ledger()
    lab = bench(written(TEACHER), ledger=ledger)
    with pytest.raises(
        ValueError, match="validity 'oracle' needs problems whose steps can be judged"
    ):
        list(vcrd(validity="oracle").stages(lab))
    assert ledger.charged["teacher_generated"] == 0


def test_chance_is_a_function_of_the_step() -> None:
    lab = bench({"add": [""]})
    steps = [action(lab, "<think>\n", f"{i}\n") for i in range(200)]
    one, two = (ESTIMATORS["random"](lab, vcrd(), s, False) for s in (steps, steps[::-1]))
    assert one == two[::-1] and 0.4 < np.mean(one) < 0.6 and 0 <= min(one) < max(one) < 1  # type: ignore[arg-type, type-var]


def test_equal_proposals_have_delta_zero_and_no_verifier_is_called() -> None:
    ledger = Ledger()
    lab = bench(written("<think>\n3\n</think>\n3"), ledger=ledger)
    found = pairs(lab, vcrd(positions=9), [ADD], False)
    assert len(found) == 3 and all(pair.same for pair in found)
    teacher, student = validities(lab, vcrd(), found, False)
    assert (teacher - student == 0).all()
    assert ledger.charged["verifier_calls"] == 0 and "validity" not in str(ledger.purposes)


def test_what_a_cap_left_unjudged_has_delta_zero() -> None:
    lab = bench(written("<think>\n3\n</think>\n3"), written("<think>\n4\n</think>\n4"))
    found = pairs(lab, vcrd(prefixes="teacher", positions=9), [ADD], False)
    poor = bench(lab.teacher, lab.student, ledger=Ledger({"teacher_generated": 0}))
    teacher, student = validities(poor, vcrd(completer="teacher"), found[:1], False)
    assert not found[0].same and (teacher[0], student[0]) == (0.5, 0.5)


# -- proposals ------------------------------------------------------------------------------------


def texts(lab: Workbench, found: list[Pair]) -> list[tuple[str, str, str]]:
    """(prefix, teacher's step, student's step) of each pair"""
    say = lab.teacher.decode
    return [
        (say(p.teacher.tokens[: p.teacher.prefix]), say(p.teacher.step), say(p.student.step))
        for p in found
    ]


def written(full: str) -> Callable[[Request, int], str]:
    """A model that continues any prefix as its own response goes on from that length of lines."""

    def answer(request: Request, index: int) -> str:
        lines = full.splitlines(keepends=True)
        done = Scripted({}).decode(request.prefix).count("\n")
        return "".join(lines[done:])

    return answer


TEACHER = "<think>\n(1+2)+7\n3+7\n10\n</think>\n10"
STUDENT = "<think>\n3+(3+4)\n3+8\n11\n</think>\n11"


@pytest.mark.parametrize(("prefixes", "own"), [("teacher", TEACHER), ("student", STUDENT)])
def test_both_steps_stand_under_the_same_prefix(prefixes: str, own: str) -> None:
    lab = bench(
        Scripted(written(TEACHER), name=f"t {own}"),
        Scripted(written(STUDENT), name=f"s {own}"),
        problems=(LONG,),
    )
    found = pairs(lab, vcrd(prefixes=prefixes, positions=9), [LONG], False)
    lines, t, s = (x.splitlines(keepends=True) for x in (own, TEACHER, STUDENT))
    expected = [("".join(lines[:k]), t[k], s[k]) for k in range(1, 6)]
    assert texts(lab, found) == expected
    assert [p.teacher.terminal for p in found] == [False] * 4 + [True]
    assert {p.source for p in found} == {prefixes}


def one_step(model: str, separator: str, before: str = "", limit: int = 128) -> str:
    """What `propose` takes from a model that would write this much."""

    def answer(request: Request, index: int) -> str:
        return model[len(Scripted({}).decode(request.prefix)) - len(before) :]

    lab = bench(Scripted(answer, name=repr((model, separator, before, limit))))
    given = action(lab, before, "x")
    setting = vcrd(steps=separator, max_step=limit)
    (found,) = propose(lab, setting, "teacher", False, [(given, setting.steps)])  # type: ignore[list-item]
    assert found.tokens[: found.prefix] == given.tokens[: given.prefix]
    return lab.teacher.decode(found.step) + ("<end>" if found.terminal else "")


@pytest.mark.parametrize(("says", "separator", "step"), [
    ("one\ntwo\n", "line", "one\n"),
    ("\n\none\ntwo", "line", "\n\none\n"),  # a blank line is no step: it goes on
    ("one\ntwo\n\nthree", "blank", "one\ntwo\n\n"),
    ("one", "line", "one<end>"),  # the end inside a step
    ("f(1,\n  2)\nx", "statement", "f(1,\n  2)\n"),  # a bracket is open: it goes on
    ("f(1,\n  2)\nx", "line", "f(1,\n"),
    ("It is so. And so.", "sentence", "It is so. "),
])  # fmt: skip
def test_one_step_of_a_model(says: str, separator: str, step: str) -> None:
    assert one_step(says, separator, "before\n") == step


def test_a_step_that_is_too_long_is_cut() -> None:
    assert one_step("abcdefgh\n", "line", limit=5) == "abcde"
    assert one_step("ab\ncdefgh\n\ni", "blank", limit=6) == "ab\n"  # its first line
    assert one_step("f(\nabcdefgh)", "statement", limit=6) == "f(\n"


def test_the_opening_of_a_think_is_no_step() -> None:
    assert one_step("<think>\none\ntwo\n", "line") == "<think>\none\n"


def test_auto_takes_the_separator_of_the_domain() -> None:
    from methods.vcrd.proposals import separator

    domains = ["math", "code", "instructions"]
    found = [separator(vcrd(steps="auto"), Problem("p", "", domain=d)) for d in domains]
    assert found == ["blank", "statement", "sentence"]


def test_positions() -> None:
    drawn = [positions(np.random.default_rng(i), 6, 2) for i in range(2000)]
    assert all(len(set(d)) == 2 and d == sorted(d) and d[0] >= 0 and d[1] < 6 for d in drawn)
    # 0 is drawn with 1/3, and put there in half of the other cases
    assert np.mean([0 in d for d in drawn]) == pytest.approx(2 / 3, abs=0.04)
    assert (
        positions(np.random.default_rng(0), 3, 9) == [0, 1, 2]
        and positions(np.random.default_rng(0), 0, 2) == []
    )


def test_a_response_that_was_cut_off_lends_its_whole_steps_only() -> None:
    lab = bench(
        Scripted(
            lambda r, i: "<think>\n" + "1\n" * 2 + "2" * 300 if not r.prefix else "5\n",
            name="endless",
        )
    )
    found = pairs(lab, vcrd(prefixes="teacher", positions=99), [ADD], False)
    assert [step for _, step, _ in texts(lab, found)] == ["1\n", "1\n"]


# -- on the micro world ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run() -> Run:
    return Run(
        "vcrd", {"steps": "line", "refresh": 0, "validity": "oracle", "positions": 2}, train=False
    )


def made(run: Run) -> list[Example]:
    """The examples of all problems; a stage shows those of its first step."""
    assert isinstance(run.method, VCRD)
    return run.method.examples(run.lab, run.lab.problems, False)


def local(run: Run, **fields: Any) -> list[Pair]:
    return pairs(run.lab, vcrd(positions=2, **fields), run.lab.problems, False)


def test_p1_p7_a_pair_is_two_steps_under_one_prefix(run: Run) -> None:
    found = local(run)
    assert {pair.source for pair in found} == {"teacher", "student"}
    for pair in found:
        assert pair.teacher.prefix == pair.student.prefix
        cut = pair.teacher.prefix
        assert pair.teacher.tokens[:cut] == pair.student.tokens[:cut]
        for action in (pair.teacher, pair.student):
            step = run.student.decode(action.step)
            assert action.terminal or (step.count("\n") == 1 and step.endswith("\n"))


def step_loss(run: Run, action: Action, objective: Any) -> float:
    """mean_i D(teacher, student) over the step's tokens, from whole logits"""
    prompt = run.student.encode(run.lab.prompt(action.problem))
    ids = torch.tensor([(*prompt, *action.tokens)])
    rows = slice(len(prompt) + action.prefix - 1, len(prompt) + len(action.tokens) - 1)
    with torch.no_grad():
        q, p = (model.model(ids).logits[0, rows] for model in (run.student, run.teacher))
    return float(objective(q, p, Tokens(ids[0], ids[0], {})).mean())


@pytest.mark.parametrize("fields", [
    {}, {"gamma": 0.25}, {"base_loss": "fkl"}, {"base_loss": "rkl", "normalise": "none"}, {"base_loss": "gjsd", "beta": 0.3},
    {"normalise": "none", "weight": "relu"},
])  # fmt: skip
def test_the_packed_loss_is_the_definition(fields: dict[str, Any]) -> None:
    """One step over all pairs: sum_k w_k [T_k + gamma S_k] over sum_k w_k (1 + gamma), or over the number of proposals."""
    settings = {"steps": "line", "refresh": 0, "positions": 3, "validity": "oracle", **fields}
    run = Run("vcrd", settings, train=False)
    method = run.method
    assert isinstance(method, VCRD)
    found = pairs(run.lab, method, run.lab.problems, False)
    w = weights(method, *validities(run.lab, method, found, False), RNG)
    sides = {who: (method.gamma if who == "student" else 1.0) for who in method.objectives}
    total = sum(
        weight * scale * step_loss(run, getattr(pair, who), method.objectives[who])
        for pair, weight in zip(found, w, strict=True)
        for who, scale in sides.items()
    )
    scale = len(found) * len(sides) if method.normalise == "none" else w.sum() * sum(sides.values())
    made_ = method.examples(run.lab, run.lab.problems, False)
    assert len(made_) == len(found) * len(sides) and any(not e.response for e in made_)
    assert len({round(x, 6) for x in w.tolist()}) > 1
    run.trainer._step(run.stages[0], made_, lambda: run.lab.teacher, 0.0)
    assert run.losses == pytest.approx([total / scale], rel=1e-4)


def test_packing_by_hand() -> None:
    """A response of three steps of 2 tokens; at its first both models agree, at its last the other model writes 3 tokens."""
    lab = bench({"add": [""]})
    full = lab.teacher.tokenize("a\nb\nc\n", end=False)
    first, last = Action(ADD, 0, full[:2], "", False), Action(ADD, 4, full, "", False)
    other = Action(ADD, 4, (*full[:4], *lab.teacher.tokenize("de\n", end=False)), "", False)
    given = [Pair(first, first, "student"), Pair(other, last, "student")]
    own, apart, *saved = examples(lab, given, [2.0, 0.5], {"teacher": 1.0, "student": 0.25})
    # the response: 2 as teacher's, 0.5 as student's first step, 0.125 as student's last
    assert own.response == full and own.weight == pytest.approx(2.625)
    assert own.loss == (True, True, False, False, True, True)
    assert [x * 2.625 for x in own.scalars["teacher"]] == pytest.approx([1, 1, 0, 0, 0, 0])  # type: ignore[union-attr]
    assert [x * 2.625 for x in own.scalars["student"]] == pytest.approx(
        [0.25, 0.25, 0, 0, 0.0625, 0.0625]
    )  # type: ignore[union-attr]
    assert (
        apart.response == other.tokens
        and apart.weight == 0.5
        and apart.loss == (*[False] * 4, *[True] * 3)
    )
    assert apart.scalars["teacher"] == pytest.approx((*[0] * 4, *[1 / 3] * 3)) and not any(
        apart.scalars["student"]
    )  # type: ignore[arg-type]
    assert [(e.weight, e.response) for e in saved] == [
        (0, ())
    ] * 2  # four proposals in two sequences


def test_the_step_losss_gradient_is_that_of_autograd() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 6, 5, generator=generator).double()
    shares = {
        "teacher": torch.tensor([0, 0.5, 1, 0, 0.2, 0]).double(),
        "student": torch.tensor([0.3, 0, 1, 0, 0, 0]).double(),
    }
    tokens = Tokens(torch.zeros(6, dtype=torch.long), torch.ones(6), shares)
    objective = StepLoss(vcrd().objectives)
    leaf = student.clone().requires_grad_()
    value = objective(leaf, teacher, tokens)
    value.sum().backward()
    loss, slope = objective.gradient(student.clone(), teacher, tokens)
    assert torch.allclose(value, loss) and torch.allclose(leaf.grad, slope)  # type: ignore[arg-type]
    assert value[3] == 0 == value[5]


@pytest.mark.parametrize("fields", [
    {"validity": "oracle"}, {"validity": "rollout", "rollouts": 4}, {"validity": "rollout", "rollouts": 4, "completer": "student"},
    {"validity": "likelihood"},
])  # fmt: skip
def test_p3_the_students_step_can_be_the_better_one(run: Run, fields: dict[str, Any]) -> None:
    setting = vcrd(positions=2, **fields)
    found = pairs(run.lab, setting, run.lab.problems, False)
    run.teacher._allowed |= {"score"}
    teacher, student = validities(run.lab, setting, found, False)
    assert (student > teacher).any() and (teacher > student).any()
    assert ((teacher >= 0) & (teacher <= 1) & (student >= 0) & (student <= 1)).all()


def test_all_weight_forms_share_one_set_of_proposals_and_verdicts(run: Run) -> None:
    fields = {"steps": "line", "refresh": 0, "rollouts": 2, "positions": 2}
    first = Run("vcrd", fields, train=False)
    assert first.ledger.charged["teacher_generated"] > 0
    for form in ("linear", "teacher_only", "inverted", "shuffled"):
        other = Run("vcrd", {**fields, "weight": form}, seed=1, train=False)
        assert (
            other.ledger.spent["teacher_generated"] == other.ledger.spent["student_generated"] == 0
        )
        assert (
            other.ledger.charged["teacher_generated"] == first.ledger.charged["teacher_generated"]
        )
        assert [e.response for e in made(other)] == [e.response for e in made(first)]
    uniform = Run("vcrd", {**fields, "weight": "uniform"}, train=False)
    assert "validity" not in uniform.ledger.purposes["teacher_generated"]  # it asks nobody


def test_a_step_holds_at_most_as_many_sequences_as_the_batch() -> None:
    fields = {"steps": "line", "refresh": 3, "positions": 3, "validity": "const"}
    run = Run("vcrd", fields, train=False)
    source = run.stages[0].source
    assert isinstance(source, OnPolicy) and source.every == 3
    block = list(
        run.lab.problems
    )  # 24: three steps of 8 sequences, each of 2 responses with 3 more each at most
    assert isinstance(run.method, VCRD) and len(run.method._few(block)) == 6
    assert len(VCRD(positions=64, refresh=3)._few(block)) == 3
    drawn = source.make(block)
    assert 0 < sum(bool(e.response) for e in drawn) <= 24


def test_fkl_leaves_the_students_step_out_and_gamma_can() -> None:
    for fields in ({"base_loss": "fkl"}, {"gamma": 0.0}):
        alone = Run(
            "vcrd",
            {"steps": "line", "refresh": 0, "validity": "oracle", "positions": 2, **fields},
            train=False,
        )
        assert not any(any(e.scalars["student"]) for e in made(alone) if e.response)  # type: ignore[arg-type]
    assert VCRD(base_loss="fkl").objectives == {"teacher": forward_kl}


def test_the_default_loss_is_skew_kl_on_the_teachers_and_skew_reverse_kl_on_the_students_step() -> (
    None
):
    assert VCRD().objectives == {"teacher": skew_kl(0.1), "student": skew_reverse_kl(0.1)}


def test_the_token_variant_trains_on_whole_responses() -> None:
    run = Run("vcrd", {"steps": "line", "refresh": 0, "granularity": "token"})
    assert all(e.loss is None for e in run.examples[0]) and {e.term for e in run.examples[0]} == {
        "teacher",
        "student",
    }
    assert "validity" not in run.ledger.purposes.get("teacher_generated", {})


@pytest.mark.parametrize(("fields", "needs"), [
    ({"validity": "prm"}, {"prm.reward"}), ({"validity": "judge"}, {"judge.reward"}), ({"validity": "likelihood"}, {"teacher.score"}),
    ({}, set()), ({"validity": "prm", "weight": "uniform"}, set()),
])  # fmt: skip
def test_what_it_needs_depends_on_the_judge(fields: dict[str, Any], needs: set[str]) -> None:
    assert VCRD(**fields).required() == VCRD.needs | needs


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="gamma: rkl trains on the student's steps alone"):
        registry.build("vcrd", {"gamma": 0.0, "base_loss": "rkl"})
    with pytest.raises(ValueError, match="granularity: token weighs a divergence"):
        registry.build("vcrd", {"granularity": "token", "base_loss": "ce"})


def test_it_works_on_code() -> None:
    """Statements, completions judged by running the tests."""
    problems = PROBLEMS["micro_code"].load("train", 12, levels=(4,))
    run = Run(
        "vcrd",
        {"refresh": 0, "rollouts": 2, "positions": 3, "steps": "auto"},
        items=problems,
        steps=2,
    )
    assert all(np.isfinite(run.losses)) and run.ledger.charged["verifier_calls"] > 0
    notes = run.lab.notes["pairs"]
    low, _, high = notes["V of the student's step, deciles 1, 5, 9"]
    assert notes["prefixes"] > 20 and low < high


def test_normalisation_is_that_of_the_step(run: Run) -> None:
    assert run.stages[0].normalise == "step" and run.stages[0].mean == "sum"
    plain = Run(
        "vcrd",
        {"steps": "line", "refresh": 0, "normalise": "none", "validity": "const"},
        train=False,
    )
    assert plain.stages[0].normalise == "none"


ON_POLICY = {"steps": "line", "refresh": 2, "positions": 2, "rollouts": 2, "completer": "both"}


def test_on_policy_proposals_are_those_of_the_student_as_it_is() -> None:
    run = Run("vcrd", ON_POLICY)
    (stage,) = run.stages
    assert isinstance(stage.source, OnPolicy) and stage.source.every == 2
    assert run.ledger.charged["student_generated"] > 0 and run.trainer.state.stages[0]["steps"] == 4
    other = Run("vcrd", ON_POLICY, seed=1, train=False)
    assert [e.response for e in other.examples[0]] != [e.response for e in run.examples[0]]


def test_an_on_policy_run_that_was_cut_ends_in_the_same_student(tmp_path: Path) -> None:
    whole = Run("vcrd", ON_POLICY)
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(Cut):
        Run("vcrd", ON_POLICY, checkpoint=path, cut_after=3)
    again = Run("vcrd", ON_POLICY, checkpoint=path)
    assert again.losses == whole.losses and again.student.identity == whole.student.identity
    assert again.ledger.purposes == whole.ledger.purposes


# -- scorecard ------------------------------------------------------------------------------------


def test_the_scorecard_holds_every_estimator_against_the_oracle() -> None:
    run = Run(
        "vcrd",
        {"steps": "line", "refresh": 0, "rollouts": 4, "positions": 2},
        items=PROBLEMS["micro_math"].load("train", 12, levels=(4, 5)),
        train=False,
    )
    run.teacher._allowed |= {"score"}
    rows = run.method.mechanisms(run.lab)
    same = rows["both propose the same step"]
    found = pairs(run.lab, vcrd(positions=2), run.lab.problems, False)
    assert isinstance(same, Measure) and same.values == [float(pair.same) for pair in found]
    both = [rows[f"the {who}'s step is the better one"].values for who in ("teacher", "student")]  # type: ignore[union-attr]
    assert any(both[0]) and not any(a and b for a, b in zip(*both, strict=True))
    area = rows["AUC of V on the student's steps: rollouts by teacher, K = 4"]
    assert (
        isinstance(area, Measure)
        and area.labels is not None
        and len(area.values) == len(area.labels) < len(found)
    )
    for k in (2, 4, 8):
        assert f"calibration of V: rollouts by both, K = {k}" in rows
    assert any(
        name.startswith("correlation of V with the truth: rollouts by student, level 4")
        for name in rows
    )
    assert "calibration of V: likelihood" in rows
    assert not any("process reward model" in name for name in rows)  # the suite names none


def test_controls_have_no_scorecard() -> None:
    run = Run("vcrd", {"steps": "line", "refresh": 0, "weight": "uniform"}, train=False)
    assert run.method.mechanisms(run.lab) == {}


# -- what an independent reader's mutations left standing -------------------------------------------


class Spied(Workbench):
    """Notes what it is asked for."""

    asked: list[tuple[Any, dict[str, Any]]]

    def samples(self, model: Any, n: int = 1, **how: Any) -> Any:
        self.asked.append((model, how))
        return super().samples(model, n, **how)


def spied(step: list[int], **more: Any) -> Spied:
    lab = bench(
        written(TEACHER), written(STUDENT), problems=(LONG,), clock=lambda: tuple(step), **more
    )
    lab.__class__ = Spied
    lab.asked = []  # type: ignore[attr-defined]
    base = Scripted(written(STUDENT), name="base")
    lab.models.loaders["base"] = lambda: base  # type: ignore[attr-defined]
    return lab  # type: ignore[return-value]


@pytest.mark.parametrize("fresh", [False, True])
def test_who_is_asked_and_how(fresh: bool) -> None:
    lab = spied([0, 0])
    setting = vcrd(prefixes="student", temperature=0.7, top_p=0.9, completer="student", rollouts=2)
    found = pairs(lab, setting, [LONG], fresh)
    validities(lab, setting, found, fresh)
    by = {how["purpose"]: (model, how) for model, how in lab.asked}
    student = lab.student if fresh else lab.base
    assert by["prefixes"][0] is by["validity"][0] is student and by["proposals"][0] is lab.teacher
    assert (
        by["prefixes"][1].get("on_policy", False)
        is by["validity"][1].get("on_policy", False)
        is fresh
    )
    for purpose in ("prefixes", "proposals"):
        how = by[purpose][1]
        assert (how["temperature"], how["top_p"], how["judge"]) == (0.7, 0.9, False)
    how = by["validity"][1]
    assert (how["temperature"], how["top_p"], how["judge"]) == (1.0, 1.0, True)


def test_on_policy_draws_are_new_at_every_refresh_and_others_never() -> None:
    from methods.vcrd.proposals import responses

    many = [Problem(f"p{i}", "1+2=?", "3", verifier="exact") for i in range(60)]
    step = [0, 0]
    lab = bench(written(TEACHER), problems=many, clock=lambda: tuple(step))
    drawn = {}
    for fresh in (False, True):
        for step[1] in (0, 4):
            writers = [who for _, who in responses(lab, vcrd(), many, fresh)]
            cuts = [p.own.prefix for p in pairs(lab, vcrd(positions=1), many, fresh)]
            drawn[fresh, step[1]] = (writers, cuts)
    assert drawn[False, 0] == drawn[False, 4]
    assert drawn[True, 0][0] != drawn[True, 4][0] and drawn[True, 0][1] != drawn[True, 4][1]
    for mix, least, most in ((0.0, 0, 0), (0.25, 5, 26), (1.0, 60, 60)):
        writers = [who for _, who in responses(lab, vcrd(mix=mix), many, False)]
        assert least <= writers.count("student") <= most


def test_shuffled_weights_are_drawn_anew_at_every_refresh() -> None:
    step = [0, 0]
    many = [Problem(f"q{i}", "1+2=?", "3", verifier="exact") for i in range(20)]
    lab = bench(written(TEACHER), written(STUDENT), problems=many, clock=lambda: tuple(step))
    setting = vcrd(weight="shuffled", validity="random", prefixes="teacher", positions=9)
    drawn = []
    for step[1] in (0, 4):
        drawn.append([e.weight for e in setting.examples(lab, many, True)])
    assert drawn[0] != drawn[1] and sorted(drawn[0]) != [1.0] * len(drawn[0])


@pytest.mark.parametrize(("says", "separator", "step"), [
    ("Is it? Yes.", "sentence", "Is it? "), ("Go! Now.", "sentence", "Go! "), ("a = 1\nb\n\nc", "block", "a = 1\nb\n\n"),
    ("f(\n\n1)\n\nb", "block", "f(\n\n1)\n\n"),
])  # fmt: skip
def test_where_a_model_is_stopped(says: str, separator: str, step: str) -> None:
    assert one_step(says, separator, "before\n") == step


def test_a_model_that_writes_blank_lines_for_ever_comes_to_an_end() -> None:
    lab = bench(Scripted(lambda request, index: "\n", name="blank"))
    (found,) = propose(
        lab, vcrd(max_step=5), "teacher", False, [(action(lab, "before\n", "x"), "line")]
    )
    assert lab.teacher.decode(found.step) == "\n" * 5


def test_a_model_that_writes_nothing_makes_no_proposal() -> None:
    lab = bench(Scripted(lambda request, index: Reply("", finished=False), name="mute"))
    assert propose(lab, vcrd(), "teacher", False, [(action(lab, "before\n", "x"), "line")]) == []


@pytest.mark.parametrize(("full", "separator"), [
    ("<think>\na\n\n\nb\n</think>\nc", "line"), ("<think>\na\n\n\n\nb\n</think>\n\nc\n", "blank"), ("One.  Two.\n\nThree.", "sentence"),
    ("x = 1\n\nreturn 1\n", "statement"),
])  # fmt: skip
def test_one_model_on_both_sides_always_proposes_the_same_step(full: str, separator: str) -> None:
    def goes_on(request: Request, index: int) -> str:
        return full[len(Scripted({}).decode(request.prefix)) :]

    lab = bench(Scripted(goes_on, name=f"both {full!r}"), Scripted(goes_on, name=f"too {full!r}"))
    for prefixes in ("teacher", "student"):
        found = pairs(lab, vcrd(steps=separator, prefixes=prefixes, positions=9), [ADD], False)
        assert len(found) > 1 and all(pair.same for pair in found)


def test_inside_a_step_that_is_too_long_both_propose_lines() -> None:
    full = "a1\nb2\nc3\nd4\n\nz"

    def goes_on(request: Request, index: int) -> str:
        return full[len(Scripted({}).decode(request.prefix)) :]

    lab = bench(Scripted(goes_on, name="long"), Scripted(goes_on, name="long too"))
    found = pairs(
        lab, vcrd(steps="blank", max_step=8, prefixes="teacher", positions=9), [ADD], False
    )
    assert [lab.teacher.decode(pair.other.step) for pair in found] == [
        "a1\n",
        "b2\n",
        "c3\n",
        "d4\n\n",
        "z",
    ]
    assert all(pair.same for pair in found)


def test_what_no_verifier_can_read_is_left_unjudged() -> None:
    """Every completion of a problem without an answer is an error: no rate, no weight, and a note that says how many."""
    mute = Problem("mute", "1+2=?", None, verifier="exact")
    lab = bench(written(TEACHER), written(STUDENT), problems=(mute,))
    found = pairs(lab, vcrd(prefixes="teacher", positions=9), [mute], False)
    teacher, student = validities(lab, vcrd(), found, False)
    assert (teacher == 0.5).all() and (student == 0.5).all()
    assert lab.notes["steps that could not be judged"] == 2 * sum(not pair.same for pair in found)


def test_an_answer_settles_it_for_rollouts_too_unless_it_cannot_be_read() -> None:
    right = Scripted(lambda request, index: "</think>\n3", name="right")
    lab = bench(right)
    done = [action(lab, "<think>\n3\n</think>\n", text, ends=True) for text in ("3", "4")]
    assert judge(lab, vcrd(rollouts=2), done, False) == [1, 0]
    mute = Problem("mute", "1+2=?", None, verifier="exact")
    last = action(lab, "<think>\n3\n</think>\n", "3", ends=True, problem=mute)
    assert judge(lab, vcrd(validity="const"), [last], False) == [0.5]
    assert judge(lab, vcrd(rollouts=2), [last], False) == [None]


def test_two_judges_are_paid_for_one_question_each() -> None:
    ledger = Ledger()
    lab = bench({"add": [""]}, ledger=ledger)
    for value in (0.2, 0.3):
        assert lab.rewards(Rewards({"q": value}), [("q", ""), ("q", "")]) == [value, value]
    assert ledger.charged["verifier_calls"] == 2


def test_the_token_variant_needs_responses_that_its_loss_can_use() -> None:
    with pytest.raises(ValueError, match="base_loss fkl has nothing for the student's"):
        registry.build("vcrd", {"granularity": "token", "base_loss": "fkl", "prefixes": "student"})
