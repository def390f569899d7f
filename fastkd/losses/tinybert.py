"""TinyBERT (Jiao et al., 2020): student layer l learns from teacher layer l·M/N, the uniform map.

Attention scores and hidden states are compared by mean squared difference, summed over the layers. Counted from 0,
attention i is paired with attention i·k + k - 1, and hidden state i with hidden state i·k, where k = M/N and hidden state 0
is the output of the embeddings.
"""

from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

from fastkd import checks, functional
from fastkd.checks import Backend
from fastkd.deprecation import renamed


class TinyBERTLoss(nn.Module):
    """TinyBERT: (attention loss, hidden loss), each a sum over student layers of mean squared differences.

    Args:
        causal: Scores of later keys do not count.
        heads: "mean" averages attention scores over heads, where student and teacher differ in their number.
        backend: "auto" takes the fastest implementation that runs here; `fastkd doctor` lists them.

    Example:
        >>> loss = fastkd.TinyBERTLoss()
        >>> student_hidden = [torch.randn(2, 8, 16, requires_grad=True) for _ in range(3)]  # embeddings and 2 layers
        >>> teacher_hidden = [torch.randn(2, 8, 16) for _ in range(5)]
        >>> attention_loss, hidden_loss = loss(None, None, student_hidden, teacher_hidden, torch.ones(2, 8))
        >>> hidden_loss.backward()
    """

    def __init__(self, *, causal: bool = False, heads: Literal["mean"] | None = None, backend: Backend = "auto"):
        super().__init__()
        self.causal, self.heads, self.backend = causal, heads, backend

    @renamed(student_attn="student_attention", teacher_attn="teacher_attention")
    def forward(
        self,
        student_attention: list | None,
        teacher_attention: list | None,
        student_hidden: list[Tensor] | None,
        teacher_hidden: list[Tensor] | None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The losses (attention, hidden), two scalars. A kind that is None on both sides has loss 0.

        Args:
            student_attention: N layers of scores before the softmax [B, H, S, S], the additive mask in them; or of pairs
                (q, k) [B, H, S, d]. Attention probabilities are not scores.
            teacher_attention: M layers of the same kinds, M a multiple of N.
            student_hidden: N + 1 hidden states [B, S, D], the embeddings' output first, already projected to the teacher's
                width; see `fastkd.Projection`.
            teacher_hidden: M + 1 hidden states [B, S, D].
            mask: [B, S], 1 = real token.
        """
        attention = hidden = None
        if student_attention is not None or teacher_attention is not None:
            checks.layers("student_attention", student_attention)
            checks.layers("teacher_attention", teacher_attention)
            k = _stride("student_attention", len(student_attention), "teacher_attention", len(teacher_attention))
            options = {"mask": mask, "causal": self.causal, "heads": self.heads, "backend": self.backend}
            pairs = zip(student_attention, teacher_attention[k - 1 :: k], strict=True)
            attention = sum(functional.attention_costs([s], [t], **options) for s, t in pairs).squeeze()
        if student_hidden is not None or teacher_hidden is not None:
            checks.layers("student_hidden", student_hidden)
            checks.layers("teacher_hidden", teacher_hidden)
            k = _stride("student_hidden", len(student_hidden) - 1, "teacher_hidden", len(teacher_hidden) - 1)
            pairs = zip(student_hidden, teacher_hidden[::k], strict=True)
            hidden = sum(functional.layer_costs([s], [t], mask=mask, backend=self.backend) for s, t in pairs).squeeze()
        if attention is None and hidden is None:
            raise ValueError("student_attention, student_hidden: both are None; pass attention, hidden states, or both")
        zero = (attention if hidden is None else hidden).new_zeros(())
        return zero if attention is None else attention, zero if hidden is None else hidden

    if TYPE_CHECKING:
        __call__ = forward


def _stride(student_name: str, n_student: int, teacher_name: str, n_teacher: int) -> int:
    if n_student < 1 or n_teacher < n_student or n_teacher % n_student:
        raise ValueError(
            f"{teacher_name}: the uniform map needs a multiple of the student's layers, got {n_teacher} for "
            f"{n_student} of {student_name} (embeddings not counted); choose teacher layers yourself and pass as many"
        )
    return n_teacher // n_student
