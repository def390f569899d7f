"""MiniLM (Wang et al., 2020) and MiniLMv2 (2021): a student layer learns the relations between tokens of a teacher layer.

The caller chooses the layers: the last of both; for a large teacher MiniLMv2 takes one above its middle. Queries, keys and
values are [B, H, L, d]; keys and values may have fewer (grouped) heads.
"""

from typing import TYPE_CHECKING

from torch import Tensor, nn

from fastkd import checks, functional
from fastkd.checks import Backend
from fastkd.deprecation import renamed

QKV = tuple[Tensor, Tensor, Tensor]


class MiniLMLoss(nn.Module):
    """MiniLM: KL of the attention distributions softmax(Q·Kᵀ/√d) plus KL of the value relations softmax(V·Vᵀ/√d).

    Student and teacher must have as many heads; their widths may differ.

    Args:
        causal: Later keys are masked.
        backend: "auto" takes the fastest implementation that runs here; `fastkd doctor` lists them.

    Example:
        >>> loss = fastkd.MiniLMLoss()
        >>> student_qkv = tuple(torch.randn(2, 4, 8, 16, requires_grad=True) for _ in "qkv")
        >>> teacher_qkv = tuple(torch.randn(2, 4, 8, 32) for _ in "qkv")
        >>> loss(student_qkv, teacher_qkv, torch.ones(2, 8)).backward()
    """

    def __init__(self, *, causal: bool = False, backend: Backend = "auto"):
        super().__init__()
        self.causal, self.backend = causal, backend

    @renamed(student="student_qkv", teacher="teacher_qkv")
    def forward(self, student_qkv: QKV, teacher_qkv: QKV, mask: Tensor | None = None) -> Tensor:
        """KL(teacher ‖ student), a scalar: the mean over heads and real queries, summed over the relations.

        Args:
            student_qkv: (q, k, v) of a layer, each [B, H, L, d].
            teacher_qkv: (q, k, v) of a layer.
            mask: [B, L], 1 = real token.
        """
        relations = []
        for name, qkv in (("student_qkv", student_qkv), ("teacher_qkv", teacher_qkv)):
            q, k, v = _qkv(name, qkv)
            relations.append([(q, _one_key_per_query(name, q, k)), _one_key_per_query(name, q, v)])
        return functional.relation_kl_loss(*relations, mask=mask, causal=self.causal, backend=self.backend)

    if TYPE_CHECKING:
        __call__ = forward


class MiniLMv2Loss(nn.Module):
    """MiniLMv2: KL of the query, key and value relations softmax(X·Xᵀ/√d), with the features split into relation heads.

    Student and teacher may differ in heads and width.

    Args:
        relation_heads: The number of heads into which the features of both sides are split; it must divide either width.
        causal: Later keys are masked.
        backend: "auto" takes the fastest implementation that runs here; `fastkd doctor` lists them.

    Example:
        >>> loss = fastkd.MiniLMv2Loss(relation_heads=8)
        >>> student_qkv = tuple(torch.randn(2, 4, 8, 16, requires_grad=True) for _ in "qkv")
        >>> teacher_qkv = tuple(torch.randn(2, 2, 8, 64) for _ in "qkv")
        >>> loss(student_qkv, teacher_qkv, torch.ones(2, 8)).backward()
    """

    def __init__(self, relation_heads: int = 48, *, causal: bool = False, backend: Backend = "auto"):
        super().__init__()
        checks.positive("relation_heads", relation_heads)
        self.relation_heads, self.causal, self.backend = relation_heads, causal, backend

    @renamed(student="student_qkv", teacher="teacher_qkv")
    def forward(self, student_qkv: QKV, teacher_qkv: QKV, mask: Tensor | None = None) -> Tensor:
        """KL(teacher ‖ student), a scalar: the mean over heads and real queries, summed over the relations.

        Args:
            student_qkv: (q, k, v) of a layer, each [B, H, L, d].
            teacher_qkv: (q, k, v) of a layer.
            mask: [B, L], 1 = real token.
        """
        return functional.relation_kl_loss(
            _qkv("student_qkv", student_qkv), _qkv("teacher_qkv", teacher_qkv),
            heads=self.relation_heads, mask=mask, causal=self.causal, backend=self.backend,
        )  # fmt: skip

    if TYPE_CHECKING:
        __call__ = forward

    def extra_repr(self) -> str:
        return f"relation_heads={self.relation_heads}, causal={self.causal}"


def _qkv(name: str, states) -> list[Tensor]:
    if not isinstance(states, (tuple, list)) or len(states) != 3:
        raise ValueError(f"{name}: expected (q, k, v), each [B, H, L, d], got {checks.describe(states)}")
    for part, x in zip("qkv", states, strict=True):
        checks.tensor(f"{name} {part}", x, "[B, H, L, d]")
    return list(states)


def _one_key_per_query(name: str, q: Tensor, grouped: Tensor) -> Tensor:
    """Grouped-query attention: repeat each key (value) head for the query heads that share it."""
    heads, groups = q.shape[1], grouped.shape[1]
    if groups == 0 or heads % groups:
        raise ValueError(f"{name}: {heads} query heads must be a multiple of {groups} key or value heads")
    return grouped if groups == heads else grouped.repeat_interleave(heads // groups, 1)
