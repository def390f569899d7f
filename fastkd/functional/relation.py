"""KL between softmaxed self-relations (MiniLM, MiniLMv2)."""

import torch
from torch import Tensor

from fastkd import checks, reductions
from fastkd.checks import Backend, Reduction
from fastkd.deprecation import renamed
from fastkd.functional.inference_mode import takes_inference_tensors
from fastkd.ops import relation


@renamed(student="student_relations", teacher="teacher_relations")
@takes_inference_tensors
def relation_kl_loss(
    student_relations: list,
    teacher_relations: list,
    *,
    heads: int | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    temperature: float | None = None,
    reduction: Reduction = "mean",
    backend: Backend = "auto",
) -> Tensor:
    """KL(teacher ‖ student) between softmaxed relations of tokens, as in MiniLM; summed over the relations.

    A relation is softmax(x yᵀ / temperature), a distribution over the L keys for each head and query.

    Args:
        student_relations: A list; each entry is x [B, H, L, d], related to itself (Q·Qᵀ), or a pair (x, y) (Q·Kᵀ).
        teacher_relations: A list of as many entries. Its widths may differ, its head counts only with `heads`.
        heads: Split the H·d features of both sides into this many heads first, as in MiniLMv2.
        mask: [B, L], 1 = real token, for queries and keys.
        causal: Later keys are masked, too.
        temperature: The divisor of the scores. None: sqrt(d) of either side.
        reduction: "mean" over heads and real queries of each relation, "sum", or "none".
        backend: "auto" takes the fastest implementation that runs here; `fastkd doctor` lists them.

    Returns:
        A scalar, or [relations, B, H, L] for reduction="none".

    Example:
        >>> queries, values = (torch.randn(2, 4, 8, 16, requires_grad=True) for _ in range(2))
        >>> teacher_relations = [torch.randn(2, 4, 8, 32) for _ in range(2)]
        >>> loss = fastkd.relation_kl_loss([queries, values], teacher_relations, mask=torch.ones(2, 8))
        >>> loss.backward()
        >>> queries.grad.shape
        torch.Size([2, 4, 8, 16])
    """
    checks.layers("student_relations", student_relations)
    checks.layers("teacher_relations", teacher_relations)
    checks.same_length("student_relations", student_relations, "teacher_relations", teacher_relations)
    checks.one_of("reduction", reduction, reductions.REDUCTIONS)
    if heads is not None:
        checks.count("heads", heads)
    if temperature is not None:
        checks.positive("temperature", temperature)
    checks.flag("causal", causal)
    mask = reductions.as_bool(mask)
    rows = [
        _relation_rows(f"[{i}]", s, t, heads, mask, causal, temperature, backend)  # [B, H, L]
        for i, (s, t) in enumerate(zip(student_relations, teacher_relations, strict=True))
    ]
    if reduction == "none":
        for i, values in enumerate(rows):
            checks.same_shape(
                f"student_relations[{i}]",
                values,
                "student_relations[0]",
                rows[0],
                "pass heads= to split all relations alike",
            )
        rows = [torch.stack(rows)]  # [R, B, H, L]
    elif all(values.shape == rows[0].shape for values in rows):
        rows = [sum(rows[1:], rows[0])]  # the sum of their means is the mean of their sum
    counted = [None if mask is None else mask[:, None, :].expand_as(values) for values in rows]
    losses = [reductions.reduce(values, of_rows, reduction) for values, of_rows in zip(rows, counted, strict=True)]
    return sum(losses[1:], losses[0])


def _relation_rows(where, student, teacher, heads, mask, causal, temperature, backend):
    sides = []
    for name, x in (("student_relations", student), ("teacher_relations", teacher)):
        pair = x if isinstance(x, (tuple, list)) else (x, x)
        if len(pair) != 2:
            raise ValueError(f"{name}{where}: expected a tensor or a pair (x, y), got {checks.describe(x)}")
        for part in pair:
            checks.tensor(name + where, part, "[B, H, L, d]")
            if part.shape[1] == 0:
                raise ValueError(f"{name}{where}: expected at least one head, got {checks.describe(part)}")
        checks.same_shape(name + where + "[0]", pair[0], name + where + "[1]", pair[1])
        checks.mask("mask", mask, (pair[0].shape[0], pair[0].shape[2]), "[B, L]")
        first = relation.resplit(name + where, pair[0], heads)
        sides.append((first, first if pair[0] is pair[1] else relation.resplit(name + where, pair[1], heads)))
    (xs, ys), (xt, yt) = sides
    checks.frozen("teacher_relations" + where, xt, yt)
    names = "student_relations" + where, "teacher_relations" + where
    checks.same_device(**{names[0]: xs, names[0] + "[1]": ys, names[1]: xt, names[1] + "[1]": yt, "mask": mask})
    if xs.shape[:3] != xt.shape[:3]:
        raise ValueError(
            f"{names[0]} and {names[1]} must agree in batch, heads and length, got {list(xs.shape)} and "
            f"{list(xt.shape)}; different head counts: pass heads= to split both alike"
        )
    scale_s, scale_t = (x.shape[-1] ** -0.5 if temperature is None else 1.0 / temperature for x in (xs, xt))
    return relation.relation(xs, ys, xt, yt, mask, bool(causal), scale_s, scale_t, backend)
