"""Every student layer against every teacher layer: hidden states and attention scores (BERT-EMD)."""

from torch import Tensor

from fastkd import checks, reductions
from fastkd.functional.inference_mode import takes_inference_tensors
from fastkd.ops import layer_cost


@takes_inference_tensors
def layer_costs(
    students: list[Tensor],
    teachers: list[Tensor],
    *,
    mask: Tensor | None = None,
    clamp: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """[N, M] mean squared differences between N student and M teacher layers [B, S, D], over the valid tokens.

    clamp: values <= clamp count as 0 on either side (BERT-EMD's rule for masked scores has clamp=-100).
    """
    checks.layers("students", students)
    checks.layers("teachers", teachers)
    if clamp is not None and not isinstance(clamp, (int, float)):
        raise ValueError(f"clamp: expected a number, got {checks.describe(clamp)}")
    first = students[0]
    for name, xs in (("students", students), ("teachers", teachers)):
        for i, x in enumerate(xs):
            checks.tensor(f"{name}[{i}]", x, "[B, S, ...]" if isinstance(x, Tensor) and x.dim() < 2 else "[...]")
            checks.same_shape(
                f"{name}[{i}]", x, "students[0]", first, "project the student to the teacher's width first"
            )
            checks.same_device(**{"students[0]": first, f"{name}[{i}]": x, "mask": mask})
    checks.frozen("teachers", *teachers)
    checks.mask("mask", mask, first.shape[:2], "[B, S]")
    return layer_cost.layer_cost(students, teachers, reductions.as_bool(mask), clamp, backend)


@takes_inference_tensors
def attention_costs(
    students: list,
    teachers: list,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    heads: str | None = None,
    backend: str = "auto",
) -> Tensor:
    """[N, M] mean squared differences between pre-softmax attention scores, over all B·H·S·S entries.

    Layers are pairs (q, k) [B, H, S, d] (k may have fewer, grouped heads), scored q·kᵀ·scale with scale None = 1/sqrt(d),
    or materialised scores [B, H, S, S], whose values <= -100 count as 0. Masked keys (and with causal, later keys)
    contribute 0 and stay in the denominator. heads="mean" averages the heads' scores where their numbers differ.
    """
    checks.layers("students", students)
    checks.layers("teachers", teachers)
    if heads is not None:
        checks.one_of("heads", heads, ("mean",))
    if scale is not None:
        checks.positive("scale", scale)
    checks.flag("causal", causal)
    heads_of, first = {}, None
    for name, xs in (("students", students), ("teachers", teachers)):
        for i, x in enumerate(xs):
            query = checks.scores(f"{name}[{i}]", x, mask)
            heads_of[f"{name}[{i}]"] = query.shape[1]
            first = query if first is None else first
            if (query.shape[0], query.shape[2]) != (first.shape[0], first.shape[2]):
                raise ValueError(
                    f"{name}[{i}] and students[0] must be of the same batch and length, got {list(query.shape)} and "
                    f"{list(first.shape)}"
                )
            parts = {f"{name}[{i}]": x} if isinstance(x, Tensor) else {f"{name}[{i}] q": x[0], f"{name}[{i}] k": x[1]}
            checks.same_device(**{"students[0]": first, **parts, "mask": mask})
            if name == "teachers":
                checks.frozen(f"{name}[{i}]", *(x if isinstance(x, (tuple, list)) else (x,)))
    if heads is None and len(set(heads_of.values())) > 1:
        (a, b) = next((a, b) for a in heads_of for b in heads_of if heads_of[a] != heads_of[b])
        raise ValueError(
            f"{a} has {heads_of[a]} heads and {b} has {heads_of[b]}; attention scores can only be compared head by head: "
            "pass heads='mean' to average the scores over the heads first"
        )
    return layer_cost.attention_cost(students, teachers, reductions.as_bool(mask), bool(causal), scale, heads, backend)
