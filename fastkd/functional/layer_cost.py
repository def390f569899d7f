"""Every student layer against every teacher layer: hidden states and attention scores (BERT-EMD)."""

from typing import Literal

from torch import Tensor

from fastkd import checks, reductions
from fastkd.checks import Backend
from fastkd.deprecation import renamed
from fastkd.functional.inference_mode import takes_inference_tensors
from fastkd.ops import layer_cost


@renamed(students="student_hidden", teachers="teacher_hidden")
@takes_inference_tensors
def layer_costs(
    student_hidden: list[Tensor],
    teacher_hidden: list[Tensor],
    *,
    mask: Tensor | None = None,
    clamp: float | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Mean squared difference between each student layer and each teacher layer.

    cost[n, m] = mean((student_hidden[n] - teacher_hidden[m])²) over the real tokens and the width.

    Args:
        student_hidden: N layers [B, S, D], already projected to the teacher's width.
        teacher_hidden: M layers [B, S, D].
        mask: [B, S], 1 = real token. Only real tokens count, also in the denominator.
        clamp: Values <= clamp count as 0 on either side. BERT-EMD's rule for masked scores is clamp=-100.
        backend: "auto" takes the fastest implementation that runs here; `fastkd doctor` lists them.

    Returns:
        [N, M].

    Example:
        >>> student_hidden = [torch.randn(2, 8, 16, requires_grad=True) for _ in range(2)]
        >>> teacher_hidden = [torch.randn(2, 8, 16) for _ in range(4)]
        >>> costs = fastkd.layer_costs(student_hidden, teacher_hidden, mask=torch.ones(2, 8))
        >>> costs.shape
        torch.Size([2, 4])
        >>> costs.mean().backward()
    """
    checks.layers("student_hidden", student_hidden)
    checks.layers("teacher_hidden", teacher_hidden)
    if clamp is not None and not isinstance(clamp, (int, float)):
        raise ValueError(f"clamp: expected a number, got {checks.describe(clamp)}")
    first = student_hidden[0]
    for name, xs in (("student_hidden", student_hidden), ("teacher_hidden", teacher_hidden)):
        for i, x in enumerate(xs):
            checks.tensor(f"{name}[{i}]", x, "[B, S, ...]" if isinstance(x, Tensor) and x.dim() < 2 else "[...]")
            checks.same_shape(
                f"{name}[{i}]", x, "student_hidden[0]", first, "project the student to the teacher's width first"
            )
            checks.same_device(**{"student_hidden[0]": first, f"{name}[{i}]": x, "mask": mask})
    checks.frozen("teacher_hidden", *teacher_hidden)
    checks.mask("mask", mask, first.shape[:2], "[B, S]")
    return layer_cost.layer_cost(student_hidden, teacher_hidden, reductions.as_bool(mask), clamp, backend)


@renamed(students="student_attention", teachers="teacher_attention")
@takes_inference_tensors
def attention_costs(
    student_attention: list,
    teacher_attention: list,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    heads: Literal["mean"] | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Mean squared difference between the attention scores of each student layer and each teacher layer.

    cost[n, m] = mean((A_n - A_m)²) over all B·H·S·S entries, with A = q kᵀ · scale the scores before the softmax.

    Args:
        student_attention: N layers, each a pair (q, k) of [B, H, S, d], where k may have fewer (grouped) heads; or a
            tensor of scores [B, H, S, S], whose values <= -100 count as 0. Probabilities are not scores.
        teacher_attention: M layers of the same kinds.
        mask: [B, S], 1 = real token. Scores of masked keys count as 0 and stay in the denominator.
        causal: Scores of later keys count as 0, too.
        scale: Factor of q kᵀ. None: 1 / sqrt(d).
        heads: "mean" averages the scores over the heads first, where student and teacher differ in their number.
        backend: "auto" takes the fastest implementation that runs here; `fastkd doctor` lists them.

    Returns:
        [N, M].

    Example:
        >>> q, k = (torch.randn(2, 4, 8, 16, requires_grad=True) for _ in "qk")
        >>> teacher_attention = [(torch.randn(2, 4, 8, 32), torch.randn(2, 4, 8, 32)) for _ in range(3)]
        >>> costs = fastkd.attention_costs([(q, k)], teacher_attention)
        >>> costs.shape
        torch.Size([1, 3])
        >>> costs.mean().backward()
    """
    checks.layers("student_attention", student_attention)
    checks.layers("teacher_attention", teacher_attention)
    if heads is not None:
        checks.one_of("heads", heads, ("mean",))
    if scale is not None:
        checks.positive("scale", scale)
    checks.flag("causal", causal)
    heads_of, first = {}, None
    for name, xs in (("student_attention", student_attention), ("teacher_attention", teacher_attention)):
        for i, x in enumerate(xs):
            query = checks.scores(f"{name}[{i}]", x, mask)
            heads_of[f"{name}[{i}]"] = query.shape[1]
            first = query if first is None else first
            if (query.shape[0], query.shape[2]) != (first.shape[0], first.shape[2]):
                raise ValueError(
                    f"{name}[{i}] and student_attention[0] must be of the same batch and length, got {list(query.shape)} and "
                    f"{list(first.shape)}"
                )
            parts = {f"{name}[{i}]": x} if isinstance(x, Tensor) else {f"{name}[{i}] q": x[0], f"{name}[{i}] k": x[1]}
            checks.same_device(**{"student_attention[0]": first, **parts, "mask": mask})
            if name == "teacher_attention":
                checks.frozen(f"{name}[{i}]", *(x if isinstance(x, (tuple, list)) else (x,)))
    if heads is None and len(set(heads_of.values())) > 1:
        (a, b) = next((a, b) for a in heads_of for b in heads_of if heads_of[a] != heads_of[b])
        raise ValueError(
            f"{a} has {heads_of[a]} heads and {b} has {heads_of[b]}; attention scores can only be compared head by head: "
            "pass heads='mean' to average the scores over the heads first"
        )
    return layer_cost.attention_cost(
        student_attention, teacher_attention, reductions.as_bool(mask), bool(causal), scale, heads, backend
    )
