"""The learned map from the student's width to the teacher's, trained beside the student and dropped afterwards."""

from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

from fastkd import checks
from fastkd.deprecation import renamed


class Projection(nn.Module):
    """Linear layers from the student's width to the teacher's, for losses that compare hidden states.

    Args:
        student_dim: Width of the input.
        teacher_dim: Width of the output.
        levels: The number of hidden states, with shared=False.
        shared: One layer for all hidden states, or one for each.
        start: Initialise at random, as nn.Linear, or as the "identity", which needs equal widths.

    Example:
        >>> project = fastkd.Projection(16, 32)
        >>> [x.shape for x in project([torch.randn(2, 8, 16) for _ in range(2)])]
        [torch.Size([2, 8, 32]), torch.Size([2, 8, 32])]
    """

    @renamed(ds="student_dim", dt="teacher_dim")
    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        levels: int = 1,
        shared: bool = True,
        *,
        start: Literal["random", "identity"] = "random",
    ):
        super().__init__()
        for name, number in (("student_dim", student_dim), ("teacher_dim", teacher_dim), ("levels", levels)):
            checks.positive(name, number)
        self.levels, self.shared = levels, shared
        self.linear = nn.ModuleList(nn.Linear(student_dim, teacher_dim) for _ in range(1 if shared else levels))
        checks.one_of("start", start, ("random", "identity"))
        if start == "identity" and student_dim != teacher_dim:
            raise ValueError(
                f"start: 'identity' needs equal widths of student and teacher, got {student_dim} and {teacher_dim}"
            )
        for linear in self.linear if start == "identity" else ():
            nn.init.eye_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, hidden: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        """The projected hidden states, [B, S, teacher_dim], as one tensor or a list of them.

        Args:
            hidden: [B, S, student_dim], or a list of them; with shared=True of any length.
        """
        if isinstance(hidden, Tensor):
            return self([hidden])[0]
        checks.layers("hidden", hidden)
        if self.shared:
            return [self.linear[0](x) for x in hidden]
        checks.layer_count("hidden", hidden, self.levels, "Projection(levels=)")
        return [linear(x) for linear, x in zip(self.linear, hidden, strict=True)]

    if TYPE_CHECKING:
        __call__ = forward
