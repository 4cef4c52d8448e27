"""The chunked evaluation against the dense form, and what it keeps in memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import harness.objectives.chunked as chunked
from harness.objectives import forward_kl, jsd, nll, reverse_kl, skew_kl, skew_reverse_kl
from harness.objectives.chunked import chunked_loss
from harness.types import Objective, Tokens

ROWS, VOCABULARY, STUDENT_HEAD, TEACHER_HEAD = 11, 37, 40, 45
STOCK = [nll, forward_kl, reverse_kl, jsd(0.3), skew_kl(0.2), skew_reverse_kl(0.3)]


@dataclass
class Case:
    """A student and a teacher with heads of different padded widths, and the tokens between them."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    tokens: Tokens
    coefficients: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    teacher_bias: Tensor | None

    @property
    def student(self) -> list[Tensor]:
        return [x for x in (self.hidden, self.weight, self.bias) if x is not None]

    def run(
        self, objective: Objective, chunk: int | None = None, call: bool = False
    ) -> tuple[Tensor, Tensor]:
        head: Any = (self.teacher_weight, self.teacher_bias)
        if call:
            head = lambda states: functional.linear(states, self.teacher_weight, self.teacher_bias)  # noqa: E731
        return chunked_loss(
            self.hidden,
            self.weight,
            self.bias,
            self.tokens,
            objective,
            self.coefficients,
            self.teacher_hidden,
            head,
            VOCABULARY,
            chunk,
        )

    def dense(self, objective: Objective) -> tuple[Tensor, Tensor]:
        student = functional.linear(self.hidden, self.weight, self.bias)
        teacher = functional.linear(self.teacher_hidden, self.teacher_weight, self.teacher_bias)
        losses = objective(student[:, :VOCABULARY], teacher[:, :VOCABULARY].detach(), self.tokens)
        return (self.coefficients * losses).sum(), losses

    def to(self, dtype: torch.dtype) -> Case:
        """The same numbers in another type."""
        return replace(
            self,
            **{
                name: value.detach().to(dtype).requires_grad_("teacher" not in name)
                for name, value in vars(self).items()
                if isinstance(value, Tensor) and name != "coefficients"
            },
        )

    def rows(self, part: slice) -> Case:
        return replace(
            self,
            hidden=self.hidden[part],
            tokens=self.tokens.rows(part),
            coefficients=self.coefficients[part],
            teacher_hidden=self.teacher_hidden[part],
        )


def case(rows: int = ROWS, bias: bool = True, width: int = 5) -> Case:
    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64).requires_grad_()

    coefficients = torch.rand(rows, dtype=torch.float64) + 0.1
    coefficients[1:2], coefficients[2:3] = 0.0, -0.7
    return Case(
        leaf(rows, width),
        leaf(STUDENT_HEAD, width),
        leaf(STUDENT_HEAD) if bias else None,
        Tokens(
            torch.randint(VOCABULARY, (rows,)),
            torch.rand(rows),
            {"gate": torch.rand(rows, dtype=torch.float64)},
            progress=0.25,
        ),
        coefficients,
        leaf(rows, width + 2),
        leaf(TEACHER_HEAD, width + 2),
        leaf(TEACHER_HEAD) if bias else None,
    )


@dataclass(frozen=True)
class Stripped:
    """An objective without its closed form."""

    inner: Objective

    @property
    def name(self) -> str:
        return f"stripped {self.inner.name}"

    @property
    def needs_teacher(self) -> bool:
        return self.inner.needs_teacher

    def __call__(self, student: Tensor, teacher: Tensor | None, tokens: Tokens) -> Tensor:
        return self.inner(student, teacher, tokens)


@pytest.fixture(params=[2, 10**6], ids=["blocks of two", "one block"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "BLOCK_BYTES", {"cpu": request.param * 4 * VOCABULARY})


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("chunk", [1, 4, ROWS, 100, None])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("strip", [False, True], ids=["closed form", "autograd"])
@pytest.mark.parametrize("objective", STOCK, ids=lambda o: o.name)
def test_equals_the_dense_form(
    objective: Objective, strip: bool, bias: bool, chunk: int | None
) -> None:
    made = case(bias=bias)
    expected, expected_losses = made.dense(objective)
    expected_slopes = torch.autograd.grad(2.5 * expected, made.student)
    total, losses = made.run(Stripped(objective) if strip else objective, chunk)
    (2.5 * total).backward()
    torch.testing.assert_close(total, expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(losses, expected_losses.detach(), rtol=0, atol=1e-11)
    assert not losses.requires_grad
    for x, slope in zip(made.student, expected_slopes, strict=True):
        assert x.grad is not None
        torch.testing.assert_close(x.grad, slope, rtol=0, atol=1e-11)
    assert made.teacher_hidden.grad is None and made.teacher_weight.grad is None
    assert not made.weight.grad[VOCABULARY:].any()


def test_padding_is_cut_before_the_softmax() -> None:
    made = case()
    total, losses = made.run(forward_kl)
    with torch.no_grad():
        made.weight[VOCABULARY:] += 5.0
        made.teacher_weight[VOCABULARY:] -= 3.0
    padded, padded_losses = made.run(forward_kl)
    assert torch.equal(losses, padded_losses)
    assert torch.equal(total, padded)


def test_a_teacher_that_is_a_function() -> None:
    made = case()
    expected, _ = made.run(reverse_kl, 4)
    found, _ = made.run(reverse_kl, 4, call=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    found.backward()
    assert made.teacher_hidden.grad is None and made.teacher_weight.grad is None


def test_a_plain_function_sees_the_rows_of_its_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "BLOCK_BYTES", {"cpu": 2 * 4 * VOCABULARY})

    seen: list[int] = []

    def gated(student: Tensor, teacher: Tensor | None, tokens: Tokens) -> Tensor:
        seen.append(len(student))
        gate = tokens.scalars["gate"] * tokens.progress
        return gate * forward_kl(student, teacher, tokens) + (1 - gate) * nll(student, None, tokens)

    gated.name, gated.needs_teacher = "gated", True
    made = case()
    expected, _ = made.dense(gated)
    slopes = torch.autograd.grad(expected, made.student)
    seen.clear()
    total, _ = made.run(gated, 5)
    assert seen == [2, 2, 1, 2, 2, 1, 1], "chunks of five in blocks of two"
    torch.testing.assert_close(total, expected, rtol=0, atol=1e-11)
    for found, slope in zip(torch.autograd.grad(total, made.student), slopes, strict=True):
        torch.testing.assert_close(found, slope, rtol=0, atol=1e-11)


def test_a_closed_form_is_used_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the gradient gives the loss too")

    monkeypatch.setattr(type(forward_kl), "__call__", refuse)
    case().run(forward_kl)[0].backward()


def test_parts_add_up_to_the_whole() -> None:
    made = case()
    whole = torch.autograd.grad(made.run(jsd(0.3))[0], made.student)
    halves = made.rows(slice(0, 3)).run(jsd(0.3))[0] + made.rows(slice(3, None)).run(jsd(0.3))[0]
    for part, all_at_once in zip(torch.autograd.grad(halves, made.student), whole, strict=True):
        torch.testing.assert_close(part, all_at_once, rtol=0, atol=1e-11)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for x in made if isinstance(made, tuple | list) else [made]:
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.numel())
        return made


@pytest.mark.parametrize("call", [False, True], ids=["weights", "function"])
@pytest.mark.parametrize("strip", [False, True], ids=["closed form", "autograd"])
def test_never_all_logits_at_once(strip: bool, call: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made = case(rows=200)
    monkeypatch.setattr(chunked, "CHUNK_BYTES", {"cpu": 16 * 4 * VOCABULARY})
    objective = Stripped(forward_kl) if strip else forward_kl
    with Largest() as largest:
        made.run(objective, call=call)[0].backward()
    assert (
        16 * VOCABULARY <= largest.elements <= 200 * 7
    )  # a head or all hidden states; not 200 x 37
    with Largest() as largest:
        made.dense(objective)[0].backward()
    assert largest.elements >= 200 * VOCABULARY


def test_default_chunks_hold_a_bounded_share_of_the_vocabulary() -> None:
    assert chunked._chunk_rows("cpu", 151_936) == 64
    assert chunked._chunk_rows("cpu", 10**9) == 1
    assert chunked._chunk_rows("cuda", 151_936) * 4 * 151_936 <= chunked.ACCELERATOR_BYTES


@pytest.mark.parametrize("objective", [nll, forward_kl], ids=lambda o: o.name)
def test_no_tokens_give_a_zero_on_the_graph(objective: Objective) -> None:
    made = case(rows=0)
    total, losses = made.run(objective)
    assert total.item() == 0.0 and losses.shape == (0,)
    total.backward()
    for x in made.student:
        assert x.grad is not None and not x.grad.any()


def test_without_gradient_only_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    made = case()
    expected = made.run(reverse_kl)

    def refuse(*_: Any) -> None:
        raise AssertionError("no gradient is wanted")

    monkeypatch.setattr(type(reverse_kl), "gradient", refuse)
    with torch.no_grad():
        total, losses = made.run(reverse_kl, 4)
    assert not total.requires_grad
    torch.testing.assert_close(total, expected[0].detach())
    torch.testing.assert_close(losses, expected[1])


def test_a_frozen_head_gets_no_gradient() -> None:
    made = case()
    expected = torch.autograd.grad(made.run(forward_kl)[0], made.hidden)
    made.weight.requires_grad_(False)
    made.bias.requires_grad_(False)
    made.run(forward_kl)[0].backward()
    assert made.weight.grad is None
    torch.testing.assert_close(made.hidden.grad, expected[0])


def test_a_second_backward_pass_is_refused() -> None:
    total, _ = case().run(forward_kl)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        total.backward()


def test_narrow_products_are_summed_in_fp32() -> None:
    """One row a chunk: sums kept in bf16 would stop growing after some 256 of these."""
    wide = case(rows=1500).to(torch.float32)
    wide.coefficients = wide.coefficients.abs().float()
    narrow = wide.to(torch.bfloat16)
    expected = torch.autograd.grad(wide.run(nll)[0], wide.student)
    total, losses = narrow.run(nll, chunk=1)
    assert total.dtype == losses.dtype == torch.float32
    for found, slope in zip(torch.autograd.grad(total, narrow.student), expected, strict=True):
        assert found.dtype == torch.bfloat16
        assert (found.float() - slope).norm() / slope.norm() < 0.01


@pytest.mark.parametrize("strip", [False, True], ids=["closed form", "autograd"])
def test_autocast_runs_products_narrow_and_the_softmax_wide(strip: bool) -> None:
    made = case(rows=60).to(torch.float32)
    made.coefficients = made.coefficients.float()
    seen: list[torch.dtype] = []

    def spy(states: Tensor) -> Tensor:
        seen.append(states.dtype)
        return functional.linear(states, made.teacher_weight, made.teacher_bias)

    expected = torch.autograd.grad(made.run(reverse_kl)[0], made.student)
    objective = Stripped(reverse_kl) if strip else reverse_kl
    with torch.autocast("cpu", torch.bfloat16):
        total, losses = chunked_loss(
            made.hidden,
            made.weight,
            made.bias,
            made.tokens,
            objective,
            made.coefficients,
            made.teacher_hidden,
            spy,
            VOCABULARY,
        )
    assert losses.dtype == torch.float32 and seen == [torch.float32]
    found = torch.autograd.grad(total, made.student)
    for narrow, slope in zip(found, expected, strict=True):
        assert narrow.dtype == torch.float32
        assert 0 < (narrow - slope).norm() / slope.norm() < 0.03


def test_mistakes_are_explained() -> None:
    made = case()
    arguments = (made.hidden, made.weight, made.bias, made.tokens)
    with pytest.raises(ValueError, match="got no teacher"):
        chunked_loss(*arguments, forward_kl, made.coefficients, None, None, VOCABULARY)
    with pytest.raises(ValueError, match="40 rows for a vocabulary of 41"):
        chunked_loss(*arguments, nll, made.coefficients, None, None, 41)
    short = (made.teacher_weight[:30], None)
    with pytest.raises(ValueError, match="30 logits for a vocabulary of 37"):
        chunked_loss(
            *arguments, forward_kl, made.coefficients, made.teacher_hidden, short, VOCABULARY
        )

    def reduced(student: Tensor, teacher: Tensor | None, tokens: Tokens) -> Tensor:
        return nll(student, teacher, tokens).mean()

    reduced.name, reduced.needs_teacher = "reduced", False
    with pytest.raises(ValueError, match="one loss per token"):
        made.run(reduced)
