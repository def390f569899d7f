"""The losses of `liger_kernel.chunked_loss`, for fastkd/compat/liger.py.

The JSD is `linear_divergence`. The cosine is PyTorch, a chunk of rows at a time.
"""

import inspect

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastkd import compat, functional
from fastkd.losses.kd import hard_cross_entropy_from_hidden


class _ChunkedLoss(nn.Module):
    """The arguments of Liger's chunked losses, whose subclasses define `of_sides` of (hidden, head, bias) of either side."""

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int = 1024,
        return_soft_hard_loss: bool = False,
    ):
        super().__init__()
        self.weight_hard_loss = weight_hard_loss
        self.weight_soft_loss = weight_soft_loss
        self.ignore_index = ignore_index
        self.temperature = temperature
        self.compiled = compiled
        self.beta = beta
        self.chunk_size = chunk_size
        self.return_soft_hard_loss = return_soft_hard_loss

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        true_labels: Tensor,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        student, teacher = (student_input, student_weight, student_bias), (teacher_input, teacher_weight, teacher_bias)
        return self.of_sides(student, teacher, true_labels)


class LigerFusedLinearJSDLoss(_ChunkedLoss):
    """weight_hard_loss · cross-entropy with the labels + weight_soft_loss · generalized JSD, from hidden states and heads.

    A teacher with more tokens than the student goes to Liger's own loss.

    Args:
        weight_hard_loss, weight_soft_loss: Weights of the two terms; both are means over the rows that count.
        beta: The teacher's weight in the mixture, in [0, 1]; 0 is forward KL and 1 reverse KL.
        ignore_index: Rows with this label do not count.
        temperature: Of the JSD; the loss is not multiplied by T².
        compiled, chunk_size: Accepted; the chunks are chosen by the kernels.
        return_soft_hard_loss: Returns (loss, soft, hard), of which only the first has a gradient; this takes longer.
    """

    def of_sides(self, student, teacher, true_labels: Tensor) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        teacher = [None if x is None else x.detach() for x in teacher]
        if len(teacher[1]) > len(student[1]):
            return self._original(*student[:2], *teacher[:2], true_labels, student[2], teacher[2])
        if self.return_soft_hard_loss:
            soft, hard = self._soft(student, teacher, true_labels), self._hard(student, true_labels)
            loss = self.weight_hard_loss * hard + self.weight_soft_loss * soft
            return loss, soft.detach(), hard.detach()
        if self.weight_soft_loss == 0:
            return self.weight_hard_loss * self._hard(student, true_labels)
        relative = self.weight_hard_loss / self.weight_soft_loss
        return self.weight_soft_loss * self._soft(student, teacher, true_labels, hard_weight=relative)

    def _soft(self, student, teacher, labels: Tensor, hard_weight: float = 0.0) -> Tensor:
        return functional.linear_divergence(
            *student[:2], *teacher[:2], student_bias=student[2], teacher_bias=teacher[2], kind="jsd", beta=self.beta,
            temperature=self.temperature, t_squared=False, labels=labels, hard_weight=hard_weight,
            ignore_index=self.ignore_index,
        )  # fmt: skip

    def _hard(self, student, labels: Tensor) -> Tensor:
        hidden, head, bias = student
        return hard_cross_entropy_from_hidden(hidden, head, labels, None, self.ignore_index, student_bias=bias)

    def _original(self, *args) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        kind = compat.original("liger_kernel.chunked_loss.jsd_loss", "LigerFusedLinearJSDLoss")
        return kind(**{name: getattr(self, name) for name in inspect.signature(kind).parameters})(*args)


class LigerFusedLinearCosineSimilarityLoss(_ChunkedLoss):
    """weight_hard_loss · cross-entropy with the labels + weight_soft_loss · beta · (1 - cosine of the two sides' logits).

    The logits are computed from hidden states and heads, `chunk_size` rows at a time. Where the teacher has more tokens than
    the student, the student's logits of the others are 0. The cosine of a row of zeros is 0, and has no gradient.

    Args:
        weight_hard_loss, weight_soft_loss: Weights of the two terms; both are means over the rows that count.
        beta: Multiplies the soft term.
        ignore_index: Rows with this label do not count.
        temperature: Accepted; a cosine does not depend on it.
        compiled: Accepted; nothing is compiled.
        chunk_size: The most rows of which logits are in memory at a time.
        return_soft_hard_loss: Returns (loss, soft, hard), of which only the first has a gradient.
    """

    def of_sides(self, student, teacher, true_labels: Tensor) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        if len(teacher[1]) < len(student[1]):
            raise ValueError(
                f"teacher_weight: expected at least the student's {len(student[1])} tokens, got "
                f"{len(teacher[1])}; pass the rows of student_weight that the teacher has, too"
            )
        wanted = tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in student)
        losses = _CosineInChunks.apply(self, wanted, *student, *teacher, true_labels)
        return losses if self.return_soft_hard_loss else losses[0]

    def of_rows(self, hidden, head, bias, teacher_hidden, teacher_head, teacher_bias, labels):
        """The sums of the soft and of the hard term."""
        ignored = (labels == self.ignore_index)[:, None]
        logits = F.linear(hidden.masked_fill(ignored, 0), head, bias)
        with torch.no_grad():
            teacher = F.linear(teacher_hidden.masked_fill(ignored, 0), teacher_head, teacher_bias)
        logits, more = _widened(logits), teacher.shape[1] - logits.shape[1]
        cosines = _one_minus_cosine(F.pad(logits, (0, more)) if more else logits, teacher.to(logits.dtype))
        soft = self.beta * cosines.masked_fill(ignored, 0).sum()
        if self.weight_hard_loss == 0 and not self.return_soft_hard_loss:
            return soft, torch.zeros_like(soft)
        return soft, F.cross_entropy(logits, labels, ignore_index=self.ignore_index, reduction="sum")


class _CosineInChunks(torch.autograd.Function):
    """(loss, soft, hard). The gradient of a chunk is made while its logits are in memory."""

    @staticmethod
    def forward(ctx, options, wanted, hidden, head, bias, teacher_hidden, teacher_head, teacher_bias, labels):
        leaf = lambda x, wanted: x if x is None else x.detach().requires_grad_(wanted)  # noqa: E731
        shared = leaf(head, wanted[1]), leaf(bias, wanted[2])
        sums = [_widened(torch.zeros_like(x)) if y else None for x, y in zip((hidden, head, bias), wanted, strict=True)]
        totals, count = _widened(hidden.new_zeros(3)), (labels != options.ignore_index).sum().clamp_min(1)
        for start in range(0, len(hidden), options.chunk_size):
            rows = slice(start, start + options.chunk_size)
            inputs = leaf(hidden[rows], wanted[0]), *shared
            with torch.enable_grad():
                terms = options.of_rows(*inputs, teacher_hidden[rows], teacher_head, teacher_bias, labels[rows])
                soft, hard = (x / count for x in terms)
                loss = options.weight_soft_loss * soft + options.weight_hard_loss * hard
            if any(wanted):
                found = torch.autograd.grad(loss, [x for x, y in zip(inputs, wanted, strict=True) if y])
                into = [sums[0][rows] if wanted[0] else None, *sums[1:]]
                for total, gradient in zip([x for x in into if x is not None], found, strict=True):
                    total += gradient
            totals += torch.stack((loss, soft, hard)).detach()
        gradients = zip(sums, (hidden, head, bias), strict=True)
        ctx.save_for_backward(*(x if x is None else x.to(like.dtype) for x, like in gradients))
        losses = tuple(x.clone() for x in totals)
        ctx.mark_non_differentiable(*losses[1:])
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        return None, None, *(x if x is None else (grad * x).to(x.dtype) for x in ctx.saved_tensors), *[None] * 4


def _one_minus_cosine(x: Tensor, y: Tensor) -> Tensor:
    """Of each row [N, V], as half the squared distance of unit vectors, which loses no digits where they agree: [N, 1]. The
    gradient by x is written over y."""
    with torch.no_grad():
        x_norm, y_norm = (z.norm(dim=-1, keepdim=True) for z in (x, y))
        directed = (x_norm != 0) & (y_norm != 0)
        per_x, per_y = (torch.where(directed, 1 / norm, 0) for norm in (x_norm, y_norm))
        gap = y.mul_(-per_y).addcmul_(x, per_x)
        rows = torch.where(directed, gap.norm(dim=-1, keepdim=True).square() / 2, 1)
        gradient = gap.mul_(per_x).addcmul_(x, -rows * per_x.square())
    return Known.apply(x, rows, gradient)


def _widened(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Known(torch.autograd.Function):
    """`value` as a function of x, of which the derivative is known."""

    @staticmethod
    def forward(ctx, x, value, gradient):
        ctx.save_for_backward(gradient)
        return value.view_as(value)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (gradient,) = ctx.saved_tensors
        return (grad * gradient).to(gradient.dtype), None, None
