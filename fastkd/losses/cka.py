"""CKA (Kornblith et al., 2019), centred kernel alignment: the similarity of two sets of states, whatever their widths.

linear CKA = ⟨K_s, K_t⟩ / (‖K_s‖ ‖K_t‖) with K = H X Xᵀ H the Gram matrix of states less their mean. The entries of such a K
sum to 0, so CKA is the Pearson correlation of the two Gram matrices, which `gram` computes without writing them.
"""

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from fastkd import checks, functional, reductions
from fastkd.checks import Backend


class CKALoss(nn.Module):
    """1 - the linear CKA of the student's and the teacher's states, the mean over groups.

    1 - ⟨K_s, K_t⟩ / (‖K_s‖ ‖K_t‖), K = X Xᵀ with X the states of a group less their mean. A group needs at least three
    states: of two, CKA is 1 whatever they are.

    Args:
        level: "token": the states of one sequence are a group. "sequence": those of one position are, across the batch.
            "all": all states of the batch are one group.
        backend: "auto" takes the fastest implementation that runs here; `fastkd doctor` lists them.

    Example:
        >>> loss = fastkd.CKALoss()
        >>> student_hidden = torch.randn(4, 16, 32, requires_grad=True)
        >>> loss(student_hidden, torch.randn(4, 16, 64), torch.ones(4, 16)).backward()
    """

    def __init__(self, level: Literal["token", "sequence", "all"] = "token", *, backend: Backend = "auto"):
        super().__init__()
        checks.one_of("level", level, ("token", "sequence", "all"))
        self.level, self.backend = level, backend

    def forward(self, student_hidden: Tensor, teacher_hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss, a scalar.

        Args:
            student_hidden: [B, N, Ds].
            teacher_hidden: [B, N, Dt].
            mask: [B, N], 1 = real token. Only pairs of real tokens count; a group with fewer than 2 (for "sequence" 3) of
                them leaves the mean.
        """
        for name, x in (("student_hidden", student_hidden), ("teacher_hidden", teacher_hidden)):
            checks.tensor(name, x, "[B, N, D]")
        checks.same_leading("student_hidden", student_hidden, "teacher_hidden", teacher_hidden, 2)
        checks.mask("mask", mask, student_hidden.shape[:2], "[B, N]")
        mask = reductions.as_bool(mask)
        if self.level == "all":
            student_hidden, teacher_hidden = (x.flatten(0, 1)[None] for x in (student_hidden, teacher_hidden))
            mask = None if mask is None else mask.flatten()[None]
        axis = 0 if self.level == "sequence" else 1
        return functional.gram_correlation_loss(
            _centred(student_hidden, mask, axis),
            _centred(teacher_hidden, mask, axis),
            level="sequence" if self.level == "sequence" else "token",
            normalize=False, mask=mask, eps=1e-30, backend=self.backend,
        )  # fmt: skip

    if TYPE_CHECKING:
        __call__ = forward


def _centred(hidden: Tensor, mask: Tensor | None, axis: int) -> Tensor:
    """The states of each group less their mean; padding is 0."""
    x = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    if mask is None:
        return x - x.mean(axis, keepdim=True)
    padding, count = ~mask[..., None], mask.sum(axis, keepdim=True)[..., None]
    x = x.masked_fill(padding, 0)
    return (x - x.sum(axis, keepdim=True) / count.clamp_min(1)).masked_fill(padding, 0)
