"""Any objective in bounded memory: hidden states in, loss and gradient out, no [N, V] tensor for either model.

With a vocabulary of 150k one fp32 logits tensor of 16k tokens takes 10 GB, and a divergence holds several. Here
the rows are taken in chunks: project both models, take the loss, push its gradient through the head, go on. All of
that happens in the forward pass, so nothing is projected twice and the backward pass only scales what is there.

N loss tokens, n of them at a time; H and H_t hidden widths of student and teacher; V vocabulary, V' rows of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from harness.types import Objective, Tokens

Head = tuple[Tensor, Tensor | None]  # weight [V', H_t], bias [V']
TeacherHead = Head | Callable[[Tensor], Tensor]  # or hidden [n, H_t] -> logits [n, V']

# A chunk is what is projected at once: larger ones multiply faster and take more memory. A block is what the
# objective sees at once: on a CPU it should stay in cache, elsewhere it is the whole chunk.
CHUNK_BYTES = {"cpu": 40 * 2**20}
BLOCK_BYTES = {"cpu": 2 * 2**20}
ACCELERATOR_BYTES = 2**28


@runtime_checkable
class ClosedForm(Protocol):
    """An objective that states its own gradient with respect to the student's logits."""

    def gradient(
        self, student: Tensor, teacher: Tensor | None, tokens: Tokens
    ) -> tuple[Tensor, Tensor]: ...


def chunked_loss(
    hidden: Tensor,  # [N, H], the student's
    head_weight: Tensor,  # [V', H]
    head_bias: Tensor | None,  # [V']
    tokens: Tokens,
    objective: Objective,
    coefficients: Tensor,  # [N], constants: what each token's loss counts
    teacher_hidden: Tensor | None,  # [N, H_t]
    teacher_head: TeacherHead | None,
    vocabulary: int,  # tokenizer length; logits beyond it are padding
    chunk: int | None = None,  # rows projected at once; by default what CHUNK_BYTES holds
) -> tuple[Tensor, Tensor]:
    """The weighted loss sum_i c_i D_i, which carries the gradient, and every D_i, detached [N].

    Logits of both models are cut to `vocabulary` before the softmax, so heads padded to different widths compare.
    The objective gets logits in fp32 (or wider); products run in the student's own type, or in autocast's, and are
    summed in fp32. The teacher gets no gradient. One backward pass is possible, and no second derivative.
    """
    if objective.needs_teacher and (teacher_hidden is None or teacher_head is None):
        raise ValueError(
            f"{objective.name} compares with the teacher's distribution and got no teacher: pass teacher_hidden "
            "and teacher_head, or take an objective of the written tokens alone, such as nll"
        )
    if len(head_weight) < vocabulary:
        raise ValueError(
            f"the student's head has {len(head_weight)} rows for a vocabulary of {vocabulary}: pass the "
            "tokenizer's length, which a head may exceed but not fall short of"
        )
    teacher = None
    if objective.needs_teacher:
        assert teacher_hidden is not None and teacher_head is not None
        teacher = _teacher_logits(teacher_hidden, teacher_head, vocabulary)
    inputs = (hidden, head_weight, head_bias)
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs]
    total, losses = _ChunkedLoss.apply(
        *inputs, tokens, objective, coefficients, teacher, vocabulary, chunk, wanted
    )
    return total, losses


class _ChunkedLoss(torch.autograd.Function):
    """sum_i c_i D_i, with its gradient taken on the way."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tokens: Tokens,
        objective: Objective,
        coefficients: Tensor,
        teacher: Callable[[slice], Tensor] | None,
        vocabulary: int,
        chunk: int | None,
        wanted: list[bool],
    ) -> tuple[Tensor, Tensor]:
        count, device = len(hidden), hidden.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else hidden.dtype
        sums = torch.promote_types(hidden.dtype, torch.float32)
        coefficients = coefficients.detach().to(sums)
        losses = torch.empty(count, dtype=sums, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if wanted[0] else None
        grad_weight = torch.zeros_like(weight, dtype=sums) if wanted[1] else None
        grad_bias = weight.new_zeros(len(weight), dtype=sums) if wanted[2] else None
        head = weight[:vocabulary].to(dtype)
        head_bias = None if bias is None else bias[:vocabulary].to(dtype)

        with torch.autocast(device, enabled=False):
            for rows in _slices(count, chunk or _chunk_rows(device, vocabulary)):
                states, scale = hidden[rows].to(dtype), coefficients[rows, None]
                student = _wide(functional.linear(states, head, head_bias))
                losses[rows] = _evaluate(
                    objective,
                    student,
                    None if teacher is None else teacher(rows),
                    tokens.rows(rows),
                    any(wanted),
                )
                slope = student.to(dtype)  # of each token's own loss, in place of its logits
                if grad_hidden is not None:
                    grad_hidden[rows] = (slope @ head) * scale
                if grad_weight is not None:
                    _add_product(grad_weight[:vocabulary], slope.t(), (states * scale).to(dtype))
                if grad_bias is not None:
                    grad_bias[:vocabulary] += scale[:, 0] @ student
                del student, slope  # before the next chunk's are made
        ctx.gradients = [
            None if x is None or gradient is None else gradient.to(x.dtype)
            for x, gradient in ((hidden, grad_hidden), (weight, grad_weight), (bias, grad_bias))
        ]
        ctx.mark_non_differentiable(losses)
        return (coefficients * losses).sum(), losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None  # scaled in place, hence good for one pass
        if gradients is None:
            raise RuntimeError(
                "chunked_loss allows one backward pass: evaluate it again for another"
            )
        scaled = (None if gradient is None else gradient.mul_(grad_total) for gradient in gradients)
        return (*scaled, *(None,) * 7)


def _evaluate(
    objective: Objective, student: Tensor, teacher: Tensor | None, tokens: Tokens, wanted: bool
) -> Tensor:
    """Loss per token, a block at a time; if wanted, its gradient takes the place of the student's logits."""
    losses = student.new_empty(len(student))
    for rows in _slices(len(student), _block_rows(student)):
        logits, target = student[rows], None if teacher is None else teacher[rows]
        here = tokens.rows(rows)
        if not wanted:
            loss = objective(logits, target, here)
        elif isinstance(objective, ClosedForm):
            loss, slope = objective.gradient(logits, target, here)
            logits.copy_(slope)
        else:
            loss, slope = _differentiate(objective, logits, target, here)
            logits.copy_(slope)
        if loss.shape != logits.shape[:1]:
            raise ValueError(
                f"{objective.name} gave a loss of shape {tuple(loss.shape)} for {len(logits)} tokens: an "
                "objective returns one loss per token and leaves the mean to the stage"
            )
        losses[rows] = loss
    return losses


def _differentiate(
    objective: Objective, student: Tensor, teacher: Tensor | None, tokens: Tokens
) -> tuple[Tensor, Tensor]:
    """What `gradient` of a closed form gives, by autograd."""
    leaf = student.detach().requires_grad_()
    with torch.enable_grad():
        loss = objective(leaf, teacher, tokens)
    (slope,) = torch.autograd.grad(loss, leaf, torch.ones_like(loss))
    return loss.detach(), slope


def _teacher_logits(
    hidden: Tensor, head: TeacherHead, vocabulary: int
) -> Callable[[slice], Tensor]:
    """A function from rows to the teacher's logits there, cut to the vocabulary."""
    if callable(head):
        project = head
    else:
        weight, bias = head

        def project(states: Tensor) -> Tensor:
            return functional.linear(states.to(weight.dtype), weight, bias)

    def logits(rows: slice) -> Tensor:
        found = project(hidden[rows])
        if found.shape[-1] < vocabulary:
            raise ValueError(
                f"the teacher's head gives {found.shape[-1]} logits for a vocabulary of {vocabulary}: the models "
                "do not share a tokenizer; methods that need only written traces work across tokenizers"
            )
        return _wide(found[:, :vocabulary])

    return logits


def _wide(logits: Tensor) -> Tensor:
    """At least fp32."""
    return logits if logits.dtype.itemsize >= 4 else logits.float()


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, summed in the total's type."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _chunk_rows(device: str, vocabulary: int) -> int:
    """Rows of fp32 logits that fill a chunk, in sixteens: odd counts multiply slower."""
    rows = CHUNK_BYTES.get(device, ACCELERATOR_BYTES) // (4 * vocabulary)
    return rows // 16 * 16 or max(1, rows)


def _block_rows(logits: Tensor) -> int:
    return max(1, BLOCK_BYTES.get(logits.device.type, ACCELERATOR_BYTES) // (4 * logits.shape[-1]))


def _slices(count: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, count, size)]
