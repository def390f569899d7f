"""MiniLM (Wang et al., 2020) and MiniLMv2 (2021): a student layer learns how a layer of the teacher relates tokens.

Which layers is the caller's choice: the last of both; for a large teacher MiniLMv2 takes one above its middle. Queries,
keys and values are [B, H, L, d], as attention holds them; keys and values may have fewer, grouped heads.
"""

from torch import Tensor, nn

from fastkd import checks, functional

QKV = tuple[Tensor, Tensor, Tensor]


class MiniLMLoss(nn.Module):
    """KL of the attention distributions softmax(Q·Kᵀ/√d) plus KL of the value relations softmax(V·Vᵀ/√d).

    The head counts of student and teacher must agree; widths may differ.
    """

    def __init__(self, *, causal: bool = False, backend: str = "auto"):
        super().__init__()
        self.causal, self.backend = causal, backend

    def forward(self, student: QKV, teacher: QKV, mask: Tensor | None = None) -> Tensor:
        """student, teacher: (q, k, v) of one layer; mask [B, L], 1 = real token."""
        relations = []
        for name, (q, k, v) in (("student", _qkv("student", student)), ("teacher", _qkv("teacher", teacher))):
            relations.append([(q, _one_key_per_query(name, q, k)), _one_key_per_query(name, q, v)])
        return functional.relation_kl_loss(*relations, mask=mask, causal=self.causal, backend=self.backend)


class MiniLMv2Loss(nn.Module):
    """KL of the query, key and value self-relations, each re-split into `relation_heads` heads on both sides, so that
    neither the head counts nor the widths of student and teacher need to agree."""

    def __init__(self, relation_heads: int = 48, *, causal: bool = False, backend: str = "auto"):
        super().__init__()
        checks.positive("relation_heads", relation_heads)
        self.relation_heads, self.causal, self.backend = relation_heads, causal, backend

    def forward(self, student: QKV, teacher: QKV, mask: Tensor | None = None) -> Tensor:
        """student, teacher: (q, k, v) of one layer; mask [B, L], 1 = real token."""
        return functional.relation_kl_loss(
            _qkv("student", student), _qkv("teacher", teacher),
            heads=self.relation_heads, mask=mask, causal=self.causal, backend=self.backend,
        )  # fmt: skip

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
