"""TinyBERT (Jiao et al., 2020): student layer l learns from teacher layer l·M/N, the uniform map.

Attention scores and hidden states are matched by mean squared difference, summed over the layers. Counted from 0,
attention i is matched to attention i·k + k - 1, and level i of the hidden states to level i·k, with k = M/N; level 0 is
the embedding output.
"""

from torch import Tensor, nn

from fastkd import checks, functional


class TinyBERTLoss(nn.Module):
    """(attention_loss, hidden_loss). The student's hidden states must be projected already; see Projection."""

    def __init__(self, *, causal: bool = False, heads: str | None = None, backend: str = "auto"):
        super().__init__()
        self.causal, self.heads, self.backend = causal, heads, backend

    def forward(
        self,
        student_attn: list | None,
        teacher_attn: list | None,
        student_hidden: list[Tensor] | None,
        teacher_hidden: list[Tensor] | None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """attn: N and M layers, scores [B,H,S,S] or pairs (q, k); hidden: N + 1 and M + 1 levels [B,S,D], embeddings
        first; mask [B,S], 1 = real token. A kind that is None on both sides has loss 0."""
        attention = hidden = None
        if student_attn is not None or teacher_attn is not None:
            checks.layers("student_attn", student_attn)
            checks.layers("teacher_attn", teacher_attn)
            k = _stride("student_attn", len(student_attn), "teacher_attn", len(teacher_attn))
            options = {"mask": mask, "causal": self.causal, "heads": self.heads, "backend": self.backend}
            pairs = zip(student_attn, teacher_attn[k - 1 :: k], strict=True)
            attention = sum(functional.attention_costs([s], [t], **options) for s, t in pairs).squeeze()
        if student_hidden is not None or teacher_hidden is not None:
            checks.layers("student_hidden", student_hidden)
            checks.layers("teacher_hidden", teacher_hidden)
            k = _stride("student_hidden", len(student_hidden) - 1, "teacher_hidden", len(teacher_hidden) - 1)
            pairs = zip(student_hidden, teacher_hidden[::k], strict=True)
            hidden = sum(functional.layer_costs([s], [t], mask=mask, backend=self.backend) for s, t in pairs).squeeze()
        if attention is None and hidden is None:
            raise ValueError("student_attn and student_hidden: both are None; pass attention, hidden states, or both")
        zero = (attention if hidden is None else hidden).new_zeros(())
        return zero if attention is None else attention, zero if hidden is None else hidden


def _stride(student_name: str, n_student: int, teacher_name: str, n_teacher: int) -> int:
    if n_student < 1 or n_teacher < n_student or n_teacher % n_student:
        raise ValueError(
            f"{teacher_name}: the uniform map needs a multiple of the student's layers, got {n_teacher} for "
            f"{n_student} of {student_name} (embeddings not counted); choose teacher layers yourself and pass as many"
        )
    return n_teacher // n_student
