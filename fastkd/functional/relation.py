"""KL between softmaxed self-relations (MiniLM, MiniLMv2)."""

import torch
from torch import Tensor

from fastkd import checks, reductions
from fastkd.functional.inference_mode import takes_inference_tensors
from fastkd.ops import relation


@takes_inference_tensors
def relation_kl_loss(
    student: list,
    teacher: list,
    *,
    heads: int | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    temperature: float | None = None,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """KL(teacher || student) of softmaxed self-relations (MiniLM, MiniLMv2), summed over the relations.

    Each relation is x [B, H, L, d] (with itself: Q·Qᵀ) or a pair (x, y) (Q·Kᵀ); `heads` re-splits H·d into a common
    number of heads; temperature None divides by sqrt(d). "mean" is over heads and valid query rows of each relation.
    """
    checks.layers("student", student)
    checks.layers("teacher", teacher)
    checks.same_length("student", student, "teacher", teacher)
    checks.one_of("reduction", reduction, reductions.REDUCTIONS)
    if heads is not None:
        checks.count("heads", heads)
    if temperature is not None:
        checks.positive("temperature", temperature)
    checks.flag("causal", causal)
    mask = reductions.as_bool(mask)
    found = [
        _relation_rows(f"[{i}]", s, t, heads, mask, causal, temperature, backend)  # [B, H, L]
        for i, (s, t) in enumerate(zip(student, teacher, strict=True))
    ]
    if reduction == "none":
        for i, rows in enumerate(found):
            checks.same_shape(f"student[{i}]", rows, "student[0]", found[0], "pass heads= to split all relations alike")
        found = [torch.stack(found)]  # [R, B, H, L]
    elif all(rows.shape == found[0].shape for rows in found):
        found = [sum(found[1:], found[0])]  # the sum of their means is the mean of their sum
    counted = [None if mask is None else mask[:, None, :].expand_as(rows) for rows in found]
    losses = [reductions.reduce(rows, of_rows, reduction) for rows, of_rows in zip(found, counted, strict=True)]
    return sum(losses[1:], losses[0])


def _relation_rows(where, student, teacher, heads, mask, causal, temperature, backend):
    sides = []
    for name, x in (("student", student), ("teacher", teacher)):
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
    checks.frozen("teacher" + where, xt, yt)
    names = "student" + where, "teacher" + where
    checks.same_device(**{names[0]: xs, names[0] + "[1]": ys, names[1]: xt, names[1] + "[1]": yt, "mask": mask})
    if xs.shape[:3] != xt.shape[:3]:
        raise ValueError(
            f"student{where} and teacher{where} must agree in batch, heads and length, got {list(xs.shape)} and "
            f"{list(xt.shape)}; different head counts: pass heads= to split both alike"
        )
    scale_s, scale_t = (x.shape[-1] ** -0.5 if temperature is None else 1.0 / temperature for x in (xs, xt))
    return relation.relation(xs, ys, xt, yt, mask, bool(causal), scale_s, scale_t, backend)
