"""The loop: one denominator, the same loss however a batch is cut, schedules by budget, exact resume."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.config import Budget, Training
from harness.ledger import Ledger
from harness.models.hf import HFModel
from harness.objectives import forward_kl, nll
from harness.trainer import Trainer, denominator, plan
from harness.types import Example, OffPolicy, OnPolicy, Problem, Stage, Tokens
from tests.tiny import tiny_model

TRAINING = Training(batch_size=4, learning_rate=0.01, warmup=0.0, schedule="constant")


def example(name: str, prompt: int, response: int, **fields: Any) -> Example:
    start = sum(map(ord, name))
    return Example(
        name,
        tuple((start + 7 * i) % 250 for i in range(prompt)),
        tuple((start + 3 * i) % 250 for i in range(response)),
        **fields,
    )


EXAMPLES = [
    example("a", 3, 9),
    example("b", 5, 2, weight=0.5),
    example("c", 4, 40, weight=2.0, loss=tuple(i % 3 != 0 for i in range(40))),
    example("d", 20, 30, token_weights=tuple(0.1 * i for i in range(30))),
    example("e", 2, 5, weight=-0.3),
    example("f", 6, 60),
]


def trainer(
    steps: int = 3, seed: int = 0, student: HFModel | None = None, **fields: Any
) -> Trainer:
    training = TRAINING.model_copy(update=fields.pop("training", {}))
    budget = fields.pop("budget", Budget(steps=steps))
    ledger = fields.pop("ledger", Ledger())
    return Trainer(student or tiny_model(), training, budget, seed, ledger, **fields)


def no_teacher() -> Any:
    raise AssertionError("no teacher is needed here")


def losses(run: Trainer) -> list[float]:
    return [row["loss"] for row in run.state.curve]


def weights(model: HFModel) -> Tensor:
    return torch.cat([p.detach().double().flatten() for p in model.model.parameters()])


def dense(model: HFModel, examples: Sequence[Example], mean: str) -> Tensor:
    """The definition, one sequence at a time: sum_i w_i sum_t m_it l_it over D."""
    total, tokens = torch.zeros(()), 0
    for e in examples:
        ids = torch.tensor([(*e.prompt, *e.response)])
        logits = model.model(ids).logits[0, :, : model.vocabulary].float()
        each = -logits.log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[len(e.prompt) - 1 :, 0]
        kept = torch.tensor(e.loss or (True,) * len(e.response))
        each = each * torch.tensor(e.token_weights or (1.0,) * len(e.response))
        count = int(kept.sum())
        total = total + e.weight * each[kept].sum() / (count if mean == "sequence" else 1)
        tokens += count
    return total / (tokens if mean == "token" else len(examples))


@pytest.mark.parametrize("mean", ["token", "sequence", "sum"])
@pytest.mark.parametrize("micro_tokens", [64, 128, 10_000])
def test_the_loss_is_the_definition_however_it_is_cut(mean: Any, micro_tokens: int) -> None:
    expected_model = tiny_model()
    expected = dense(expected_model, EXAMPLES, mean)
    expected.backward()
    norm = math.sqrt(
        sum(float(p.grad.double().square().sum()) for p in expected_model.model.parameters())  # type: ignore[union-attr]
    )
    run = trainer(1, training={"batch_size": 6, "micro_tokens": micro_tokens, "clip": 1e9})
    run.run(0, Stage("s", OffPolicy(EXAMPLES), nll, mean=mean), no_teacher, {})
    assert losses(run)[0] == pytest.approx(expected.item(), rel=2e-5)
    assert run.state.curve[0]["grad_norm"] == pytest.approx(norm, rel=2e-4)


def test_denominators_by_hand() -> None:
    zero = Example.zero(Problem("z", "z"))
    step = [
        example("a", 2, 4, weight=3.0),
        example("b", 2, 10, loss=(True,) * 6 + (False,) * 4),
        zero,
    ]
    stage = Stage("s", OffPolicy(step), nll)
    assert denominator(stage, step) == 10  # 4 + 6 loss tokens
    assert denominator(replace(stage, mean="sequence"), step) == 3  # the zero counts
    assert denominator(replace(stage, normalise="step"), step) == 3 * 4 + 1 * 6
    assert denominator(replace(stage, mean="sum", normalise="step"), step) == 4.0
    signed = [example("a", 2, 4, weight=3.0), example("b", 2, 4, weight=-0.5)]
    assert denominator(replace(stage, mean="sequence", normalise="step"), signed) == 2.5
    with pytest.raises(ValueError, match="positive sum of weights"):
        denominator(replace(stage, normalise="step"), [example("a", 2, 4, weight=-1.0)])


def test_doubling_the_weights_doubles_the_loss_unless_normalised() -> None:
    double = [replace(e, weight=2 * e.weight) for e in EXAMPLES]
    for normalise, factor in (("none", 2.0), ("step", 1.0)):
        one, two = (trainer(1, training={"batch_size": 6}) for _ in range(2))
        for run, data in ((one, EXAMPLES), (two, double)):
            stage = Stage("s", OffPolicy(data), nll, normalise=normalise)  # type: ignore[arg-type]
            run.run(0, stage, no_teacher, {})
        assert losses(two)[0] == pytest.approx(factor * losses(one)[0], rel=1e-5)


def test_weight_zero_is_counted_and_never_run() -> None:
    live = EXAMPLES[:2]
    zeros = [Example.zero(Problem(str(i), "")) for i in range(2)]
    one = trainer(1, training={"batch_size": 2})
    one.run(0, Stage("s", OffPolicy(live), nll, mean="sequence"), no_teacher, {})
    two = trainer(1)
    two.run(0, Stage("s", OffPolicy([*live, *zeros]), nll, mean="sequence"), no_teacher, {})
    assert losses(two)[0] == pytest.approx(losses(one)[0] / 2, rel=1e-5)
    assert one.ledger.charged["trained"] == two.ledger.charged["trained"] == 12 + 7


def test_tokens_that_do_not_count_are_context() -> None:
    masked = replace(EXAMPLES[0], loss=(False,) * 4 + (True,) * 5)
    shifted = replace(
        EXAMPLES[0],
        prompt=EXAMPLES[0].prompt + EXAMPLES[0].response[:4],
        response=EXAMPLES[0].response[4:],
    )
    results = []
    for data in ([masked], [shifted]):
        run = trainer(1, training={"batch_size": 1})
        run.run(0, Stage("s", OffPolicy(data), nll), no_teacher, {})
        results.append(losses(run)[0])
    assert results[0] == pytest.approx(results[1], rel=1e-6)


def test_kl_to_itself_is_zero_and_the_teacher_learns_nothing() -> None:
    teacher = tiny_model(1).freeze()
    before = weights(teacher)
    run = trainer(1, student=tiny_model(1))
    run.run(0, Stage("s", OffPolicy(EXAMPLES[:4]), forward_kl), lambda: teacher, {})
    assert losses(run)[0] == pytest.approx(0.0, abs=1e-6)
    assert torch.equal(before, weights(teacher))
    assert all(p.grad is None for p in teacher.model.parameters())


def test_a_teacher_prompt_moves_the_teacher_only() -> None:
    teacher = tiny_model(1).freeze()
    hinted = [replace(EXAMPLES[0], teacher_prompt=(*EXAMPLES[0].prompt, 9, 8, 7))]
    run = trainer(1, student=tiny_model(1), training={"batch_size": 1})
    run.run(0, Stage("s", OffPolicy(hinted), forward_kl), lambda: teacher, {})
    assert losses(run)[0] > 1e-3
    assert run.ledger.charged["teacher_scored"] == 3 + 3 + 9


class Recorded:
    """An objective that keeps what it is shown."""

    name, needs_teacher = "recorded", False

    def __init__(self) -> None:
        self.seen: list[Tokens] = []

    def __call__(self, student: Tensor, teacher: Tensor | None, tokens: Tokens) -> Tensor:
        self.seen.append(tokens)
        return nll(student, teacher, tokens)


def test_objectives_see_scalars_progress_and_terms() -> None:
    data = [
        replace(EXAMPLES[0], scalars={"v": 0.25}, term="x"),
        replace(EXAMPLES[1], scalars={"v": (0.5, 0.75)}, term="y"),
    ]
    x, y = Recorded(), Recorded()
    run = trainer(2, training={"batch_size": 2})
    run.run(0, Stage("s", OffPolicy(data), {"x": x, "y": y}), no_teacher, {})
    assert x.seen[0].scalars["v"].tolist() == [0.25] * 9
    assert y.seen[0].scalars["v"].tolist() == [0.5, 0.75]
    assert {tokens.progress for tokens in x.seen} == {0.0, 0.5}
    with pytest.raises(ValueError, match="no objective for the term 'y'"):
        trainer(1).run(0, Stage("s", OffPolicy(data), {"x": x}), no_teacher, {})


def test_off_policy_epochs_cover_every_example_once() -> None:
    run = trainer(1)
    names = [run._draw("abcdef", 0, block, 4) for block in range(3)]
    flat = [name for block in names for name in block]
    assert sorted(flat[:6]) == sorted(flat[6:]) == list("abcdef")
    assert flat[:6] != flat[6:] and flat != list("abcdef" * 2)
    assert names == [trainer(1)._draw("abcdef", 0, block, 4) for block in range(3)]
    assert names[0] != trainer(1, seed=1)._draw("abcdef", 0, 0, 4)
    assert names[0] != run._draw("abcdef", 1, 0, 4)


def test_stages_share_one_budget_and_one_schedule() -> None:
    run = trainer(10, training={"schedule": "linear", "warmup": 0.2, "min_lr": 0.0})
    for index, share in enumerate((0.3, 0.7)):
        run.run(index, Stage(f"s{index}", OffPolicy(EXAMPLES), nll, share=share), no_teacher, {})
    rates = [row["lr"] / 0.01 for row in run.state.curve]
    expected = [
        0.05,
        0.5,
        *((8 - i) / 8 for i in range(8)),
    ]  # warm-up over 2 of 10 steps, then down
    assert rates == pytest.approx(expected)
    assert [stage["steps"] for stage in run.state.stages] == [3, 7]
    with pytest.raises(ValueError, match="sum to at most 1"):
        run.run(2, Stage("s2", OffPolicy(EXAMPLES), nll, share=0.1), no_teacher, {})


def test_a_reset_optimizer_is_a_new_one() -> None:
    """The second stage goes as in a run of its own from the same weights; one that is kept remembers the first."""
    stage = Stage("s", OffPolicy(EXAMPLES), nll, share=0.5)
    kept, reset = trainer(6), trainer(6)
    for run, optimizer in ((kept, "keep"), (reset, "reset")):
        run.run(0, stage, no_teacher, {})
        between = weights(run.student)
        run.run(1, replace(stage, optimizer=optimizer), no_teacher, {})  # type: ignore[arg-type]
    fresh = trainer(6)
    fresh.run(0, stage, no_teacher, {})
    assert torch.equal(weights(fresh.student), between)
    alone = trainer(6, student=fresh.student)
    alone._draw, draw = (lambda items, index, *rest: draw(items, 1, *rest)), alone._draw  # type: ignore[method-assign]
    alone.run(0, stage, no_teacher, {})
    assert torch.equal(weights(alone.student), weights(reset.student))
    assert not torch.allclose(weights(kept.student), weights(reset.student), rtol=1e-4)


def test_a_budget_of_tokens_ends_when_they_are_trained() -> None:
    run = trainer(budget=Budget(trained_tokens=400))
    run.run(0, Stage("s", OffPolicy(EXAMPLES), nll), no_teacher, {})
    before_last = sum(row["tokens"] for row in run.state.curve[:-1])
    assert before_last < 400 <= run.ledger.charged["trained"]


def test_a_cap_on_scoring_ends_the_stage_and_says_so() -> None:
    teacher = tiny_model(1).freeze()
    run = trainer(50, ledger=Ledger({"teacher_scored": 300}))
    run.run(0, Stage("s", OffPolicy(EXAMPLES), forward_kl), lambda: teacher, {})
    assert run.state.stages[0]["stopped_by"] == "teacher_scored"
    assert 300 <= run.ledger.charged["teacher_scored"] < 600 and len(run.state.curve) < 10


def test_a_cap_on_what_the_teacher_writes_does_not_stop_training() -> None:
    ledger = Ledger({"teacher_generated": 10})
    ledger.charge("teacher_generated", 12)
    run = trainer(3, ledger=ledger)
    run.run(0, Stage("s", OffPolicy(EXAMPLES), nll), no_teacher, {})
    assert len(run.state.curve) == 3 and run.state.stages[0]["stopped_by"] is None


def test_a_stage_that_was_cut_hands_nothing_on() -> None:
    teacher = tiny_model(1).freeze()
    run = trainer(20, ledger=Ledger({"teacher_scored": 300}))
    run.run(0, Stage("a", OffPolicy(EXAMPLES), forward_kl, share=0.5), lambda: teacher, {})
    run.run(1, Stage("b", OffPolicy(EXAMPLES), nll, share=0.5), no_teacher, {})
    assert run.state.stages[0]["steps"] < 10 and run.state.stages[1]["steps"] == 10


def test_a_stage_that_ends_after_its_passes_leaves_the_rest_of_its_share() -> None:
    """Six examples in fours: two passes are three steps."""
    run = trainer(10)
    twice = Stage("s", OffPolicy(EXAMPLES), nll, share=0.75, epochs=2)
    run.run(0, twice, no_teacher, {})
    assert run.state.step == 0 and run.state.consumed == 3
    assert run.consumed == pytest.approx(0.3)
    assert run.state.stages[0]["stopped_by"] is None
    run.run(1, replace(twice, share=0.75 - run.consumed, epochs=None), no_teacher, {})
    assert run.consumed == pytest.approx(0.75) and run.state.consumed == 8  # 7.5 rounds to even
    run.run(2, replace(twice, share=0.25, epochs=1.5), no_teacher, {})
    assert [s["steps"] for s in run.state.stages] == [
        3,
        5,
        2,
    ]  # its share is over before its passes
    assert run.consumed == pytest.approx(1)


def test_passes_of_an_on_policy_stage_count_problems_and_end_between_blocks() -> None:
    problems = [Problem(str(i), "") for i in range(6)]

    def make(block: Sequence[Problem]) -> list[Example]:
        return [example(problem.id, 3, 4) for problem in block]

    run = trainer(10)
    run.run(0, Stage("s", OnPolicy(problems, make, every=2), nll, epochs=1), no_teacher, {})
    assert run.state.stages[0]["steps"] == 2
    run = trainer(10)
    run.run(0, Stage("s", OnPolicy(problems, make, every=3), nll, epochs=1), no_teacher, {})
    assert run.state.stages[0]["steps"] == 3


def test_what_preparing_cost_counts_in_the_share_of_a_stage_that_ends_early() -> None:
    ledger = Ledger()
    run = trainer(ledger=ledger, budget=Budget(flops=1e9))
    ledger.charge("flops", 2e8)
    run.run(0, Stage("s", OffPolicy(EXAMPLES), nll, epochs=1), no_teacher, {})
    trained = ledger.charged["flops"] - 2e8
    assert 0 < trained < 7e8
    assert run.consumed == pytest.approx(0.2 + trained / 1e9)


def test_a_budget_of_flops_counts_scoring_too() -> None:
    teacher = tiny_model(1).freeze()
    lengths = []
    for objective in (nll, forward_kl):
        run = trainer(budget=Budget(flops=3e8))
        run.run(0, Stage("s", OffPolicy(EXAMPLES), objective), lambda: teacher, {})
        lengths.append(len(run.state.curve))
    assert lengths[0] > lengths[1] > 1


def test_a_budget_of_flops_counts_what_was_paid_before_a_stage() -> None:
    """Samples and verdicts of two stages, 1e8 and 5e7 of 6e8 FLOPs: each comes off its own stage's half."""
    bare, paid = (trainer(budget=Budget(flops=6e8), training={"schedule": "linear"}) for _ in "ab")
    for index, cost in enumerate((1e8, 5e7)):
        paid.ledger.charge("flops", cost)
        for run in (bare, paid):
            run.run(index, Stage(str(index), OffPolicy(EXAMPLES), nll, share=0.5), no_teacher, {})
    assert [stage["length"] for stage in bare.state.stages] == [3e8, 3e8]
    assert [stage["length"] for stage in paid.state.stages] == [2e8, 2.5e8]
    for run in (bare, paid):
        most = max(row["tokens"] for row in run.state.curve) * 6 * run.student.num_parameters
        total = run.ledger.charged["flops"]
        assert 6e8 <= total <= 6e8 + 2 * most  # a stage ends with the step that reaches its end
    # The schedule is that of the training: it starts at its peak, whatever was paid before.
    assert paid.state.curve[0]["lr"] == bare.state.curve[0]["lr"]
    ends = [run.state.curve[-1]["lr"] for run in (bare, paid)]
    assert ends[1] == pytest.approx(ends[0], rel=0.5) and ends[1] < 0.2 * paid.state.curve[0]["lr"]


def test_a_stage_whose_preparation_cost_all_its_flops_is_refused() -> None:
    run = trainer(budget=Budget(flops=3e8))
    run.ledger.charge("flops", 4e8)
    with pytest.raises(
        ValueError, match=r"sampled and scored before it cost 4e\+08 of its 3e\+08 FLOPs"
    ):
        run.run(0, Stage("s", OffPolicy(EXAMPLES), nll), no_teacher, {})


def test_checkpoints_fall_between_blocks_and_as_often_as_asked(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    run = trainer(10, checkpoint=path, training={"checkpoint_every": 4})
    saved: list[int] = []
    write = run.save
    run.save = lambda *a, **k: (saved.append(run.state.step), write(*a, **k))  # type: ignore[method-assign, assignment]
    run.run(0, Stage("s", on_policy(3, []), nll), no_teacher, {})
    assert saved == [6, 0]  # after the second block of 3, and at the end


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    one = trainer(2, checkpoint=path, key="one")
    one.run(0, Stage("s", OffPolicy(EXAMPLES), nll), no_teacher, {})
    with pytest.raises(ValueError, match="another configuration"):
        trainer(2, checkpoint=path, key="two").resume()
    assert trainer(2, checkpoint=path, key="one").resume() is not None
    one.clear()
    assert not list(tmp_path.iterdir())


def test_a_stage_without_a_step_is_refused() -> None:
    with pytest.raises(ValueError, match="gets no step"):
        run = trainer(1)
        run.run(0, Stage("s", OffPolicy(EXAMPLES), nll, share=0.4), no_teacher, {})


def test_an_empty_stage_names_the_filter_and_its_counts() -> None:
    for data in ([], [Example.zero(Problem("z", "z"))]):
        with pytest.raises(ValueError, match=r"stage 's' is empty .*kept: 0"):
            trainer(1).run(0, Stage("s", OffPolicy(data), nll), no_teacher, {"kept": 0})
    with pytest.raises(ValueError, match="1 too long"):
        run = trainer(1, training={"max_length": 10})
        run.run(0, Stage("s", OffPolicy(EXAMPLES[:1]), nll), no_teacher, {})


def test_longer_examples_are_dropped_and_counted() -> None:
    notes: dict[str, Any] = {}
    run = trainer(1, training={"max_length": 20})
    run.run(0, Stage("s", OffPolicy(EXAMPLES), nll), no_teacher, notes)
    assert notes == {"s: longer than 20 tokens": 3}


def test_what_the_teacher_reads_counts_in_lengths() -> None:
    long = example("a", 3, 4, teacher_prompt=tuple(range(90)))
    assert len(plan([long, example("b", 3, 4)], 128)) == 2  # 96 beside 32
    assert len(plan([example("a", 3, 4), example("b", 3, 4)], 128)) == 1
    run, notes = trainer(1, training={"max_length": 60}), {}
    run.run(0, Stage("s", OffPolicy([long, example("b", 3, 4)]), nll), no_teacher, notes)
    assert notes["s: longer than 60 tokens"] == 1


def test_micro_batches_keep_terms_apart_and_bound_their_size() -> None:
    data = [
        example("a", 3, 9),
        example("b", 3, 9, term="x"),
        *(example("c", 9, 50) for _ in range(5)),
    ]
    names = [[e.problem for e in part] for part in plan(data, 128)]
    assert names == [["a", "c"], ["c", "c"], ["c", "c"], ["b"]]
    far = [example("a", 3, 9), example("d", 9, 80)]  # 32 and 96 wide: padding would cost too much
    assert len(plan(far, 10_000)) == 2


def on_policy(every: int, calls: list[Any]) -> OnPolicy:
    problems = [Problem(name, name) for name in "abcdefgh"]

    def make(block: Sequence[Problem]) -> list[Example]:
        calls.append([problem.id for problem in block])
        return [example(problem.id, 4, 8) for problem in block]

    return OnPolicy(problems, make, every)


def test_on_policy_examples_are_made_for_every_step_just_before_it() -> None:
    one: list[Any] = []
    two: list[Any] = []
    for every, calls in ((1, one), (2, two)):
        run = trainer(4)
        run.run(0, Stage("s", on_policy(every, calls), nll), no_teacher, {})
        assert len(run.state.curve) == 4
    assert [len(block) for block in one] == [4] * 4 and [len(block) for block in two] == [8] * 2
    assert [*one[0], *one[1]] == two[0]


def test_on_policy_steps_name_the_weights_without_hashing_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from harness.models import hf
    from harness.types import Request, Sampling

    hashed: list[int] = []
    real = hf.identity
    monkeypatch.setattr(hf, "identity", lambda *given: hashed.append(1) or real(*given))
    run = trainer(4)
    authors = []

    def make(block: Sequence[Problem]) -> list[Example]:
        traces = run.student.generate([Request(p.id, p) for p in block], Sampling(max_new_tokens=3))
        authors.append(traces[0][0].author)
        return [Example(t.problem.id, (1, 2), t.tokens) for (t,) in traces]

    source = OnPolicy([Problem(name, name) for name in "abcd"], make)
    run.run(0, Stage("s", source, nll), no_teacher, {})
    start = run.state.boundaries[0]
    assert authors == [f"{start}+{step}" for step in range(4)]
    assert len(hashed) == 1
    assert run.student.version is None and run.student.identity != start


class Killed(Exception):
    pass


@pytest.mark.parametrize("at", [1, 3, 4, 5, 7, 8])
def test_a_run_that_was_cut_ends_in_the_same_bits(tmp_path: Path, at: int) -> None:
    """Two stages, one of them on-policy, with dropout and checkpoints every 2 steps, cut at any step."""
    teacher = tiny_model(1).freeze()

    seen: list[list[str]] = []

    def stages(run: Trainer) -> Iterator[Stage]:
        """A method that looks at the student before, between and after its stages."""
        seen.append([run.student.identity])
        yield Stage("off", OffPolicy(EXAMPLES), nll, share=0.5, mean="sequence")
        seen[-1].append(run.student.identity)
        yield Stage("on", on_policy(2, []), forward_kl, share=0.5, optimizer="reset")
        seen[-1].append(run.student.identity)

    def go(run: Trainer, notes: dict[str, Any]) -> Trainer:
        for index, stage in enumerate(stages(run)):
            run.run(index, stage, lambda: teacher, notes)
        return run

    def student() -> HFModel:
        model = tiny_model()
        for layer in model.model.model.layers:
            layer.self_attn.attention_dropout = 0.1
        return model

    torch.manual_seed(5)
    whole = go(trainer(8, student=student()), {})

    def cut(phase: str, done: int, total: int) -> None:
        if done == at:
            raise Killed

    options = {"training": {"checkpoint_every": 2}, "checkpoint": tmp_path / "checkpoint.pt"}
    torch.manual_seed(5)
    with pytest.raises(Killed):
        go(trainer(8, student=student(), report=cut, **dict(options)), {})
    options = {"training": {"checkpoint_every": 2}, "checkpoint": tmp_path / "checkpoint.pt"}
    if at == 1:
        torch.manual_seed(5)  # nothing was saved yet: it starts again
    again = trainer(8, student=student(), **options)
    notes = dict(again.resume() or {})
    assert bool(again.state.curve) == (at > 1)
    go(again, notes)
    assert seen[-1] == seen[0] and len(set(seen[0])) == 3
    assert losses(again) == losses(whole)
    assert torch.equal(weights(again.student), weights(whole.student))
    assert again.ledger.charged == whole.ledger.charged
    assert again.state.boundaries == whole.state.boundaries
    assert again.student.identity == whole.student.identity
