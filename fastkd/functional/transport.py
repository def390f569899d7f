"""Exact optimal transport, and BERT-EMD's update of the layer weights."""

import torch
from torch import Tensor

from fastkd import checks
from fastkd.checks import Backend
from fastkd.functional.inference_mode import takes_inference_tensors
from fastkd.ops import transport as transport_op
from fastkd.ops.transport import CostAttention, TransportPlan


@takes_inference_tensors
def transport(
    cost: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    warm_start: TransportPlan | None = None,
    backend: Backend = "auto",
) -> TransportPlan:
    """Exact optimal transport (the earth mover's distance), batched and differentiable.

    min over F >= 0 of Σ F_ij cost_ij, with row sums Σ_j F_ij = a_i and column sums Σ_i F_ij = b_j.

    Args:
        cost: [..., N, M]. On a GPU, problems of more than 64 rows or columns are copied to the host and solved there.
        a: [..., N], the mass of each row. None: 1 / N.
        b: [..., M], the mass of each column, with the same total as `a`. None: 1 / M.
        warm_start: The plan of a similar problem, where the solver starts. It changes the time, not the optimum.
        backend: "auto" takes the fastest implementation that runs here; `fastkd doctor` lists them.

    Returns:
        TransportPlan(value [...], flow [..., N, M], u [..., N], v [..., M], status [...]), where status 0 means optimal.
        The gradient of value is the flow (to `cost`) and the centred duals (to `a` and `b`).

    Example:
        >>> cost = torch.rand(3, 4, 6, requires_grad=True)
        >>> plan = fastkd.transport(cost)
        >>> plan.value.sum().backward()
        >>> torch.allclose(plan.flow.sum(-1), torch.full((3, 4), 0.25, dtype=plan.flow.dtype))
        True
    """
    checks.tensor("cost", cost, "[..., N, M]")
    lead, (n, m) = cost.shape[:-2], cost.shape[-2:]
    if n == 0:
        raise ValueError(f"cost: expected at least one row and one column, got {checks.describe(cost)}")
    masses = torch.float64 if cost.dtype == torch.float64 else torch.float32  # 1/n in bfloat16 does not sum to 1
    a = cost.new_full((*lead, n), 1.0 / n, dtype=masses) if a is None else a
    b = cost.new_full((*lead, m), 1.0 / m, dtype=masses) if b is None else b
    checks.tensor("a", a, "[..., N]")
    checks.tensor("b", b, "[..., M]")
    checks.same_device(cost=cost, a=a, b=b)
    for name, x, extent, axis in (("a", a, n, "rows"), ("b", b, m, "columns")):
        if not _expands(x, (*lead, extent)):
            raise ValueError(
                f"{name}: expected one mass per {axis[:-1]} of cost {list(cost.shape)}, got {list(x.shape)}"
            )
    if warm_start is not None:
        _check_warm_start(warm_start, cost)
    a, b = a.expand(*lead, n), b.expand(*lead, m)
    plan = transport_op.transport(cost, a, b, warm_start, backend)
    checks.solved(plan.status, cost, a, b)
    return plan


@takes_inference_tensors
def transport_with_cost_attention(
    cost: Tensor, a: Tensor, b: Tensor, attention: CostAttention | None = None, *, backend: Backend = "auto"
) -> tuple[TransportPlan, Tensor, Tensor]:
    """`transport` between N and M layers, and BERT-EMD's new layer weights, in one launch.

    Args:
        cost: [P, N, M], P kinds of cost (attention, hidden states).
        a: [P, N], the student layers' weights.
        b: [P, M], the teacher layers' weights.
        attention: The rule of the update, CostAttention(...): a layer's weight grows as its cost of matching falls.
        backend: "auto" takes the fastest implementation that runs here; `fastkd doctor` lists them.

    Returns:
        (plan, new a [P, N], new b [P, M]).

    Example:
        >>> cost, a, b = torch.rand(2, 4, 12), torch.full((2, 4), 1 / 4), torch.full((2, 12), 1 / 12)
        >>> plan, a, b = fastkd.functional.transport_with_cost_attention(cost, a, b)
        >>> torch.allclose(a.sum(1), torch.ones(2, dtype=a.dtype))
        True
    """
    checks.tensor("cost", cost, "[P, N, M]")
    if cost.shape[1] == 0:
        raise ValueError(f"cost: expected at least one layer on either side, got {checks.describe(cost)}")
    for name, x, shape in (("a", a, cost.shape[:2]), ("b", b, cost.shape[::2])):
        checks.tensor(name, x, "[P, layers]")
        if x.shape != shape:
            raise ValueError(f"{name}: expected one weight per layer, {list(shape)}, got {list(x.shape)}")
    checks.same_device(cost=cost, a=a, b=b)
    _check_attention(attention or CostAttention())
    plan, new_a, new_b = transport_op.transport_and_weights(cost, a, b, attention or CostAttention(), backend)
    checks.solved(plan.status, cost, a, b)
    return plan, new_a, new_b


def _expands(x: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether x [..., last] can be expanded to `shape`."""
    own = x.shape
    ends = zip(own[::-1], shape[::-1], strict=False)
    return len(own) <= len(shape) and own[-1] == shape[-1] and all(a in (1, b) for a, b in ends)


def _check_warm_start(plan: TransportPlan, cost: Tensor) -> None:
    if not isinstance(plan, TransportPlan):
        raise ValueError(f"warm_start: expected the TransportPlan of a similar problem, got {checks.describe(plan)}")
    for name, x, shape in (("flow", plan.flow, cost.shape), ("v", plan.v, (*cost.shape[:-2], cost.shape[-1]))):
        checks.tensor(f"warm_start.{name}", x, "[...]")
        if not x.dim() or not _expands(x, tuple(shape)):
            raise ValueError(f"warm_start.{name}: expected shape {list(shape)}, as of cost, got {list(x.shape)}")
    checks.same_device(**{"cost": cost, "warm_start.flow": plan.flow, "warm_start.v": plan.v})


def _check_attention(rule: CostAttention) -> None:
    if not isinstance(rule, CostAttention):
        raise ValueError(f"attention: expected a CostAttention, got {checks.describe(rule)}")
    checks.positive("attention.temperature", rule.temperature)
    for name in ("inverse_cost", "product_of_sums", "joint", "double_softmax"):
        checks.flag(f"attention.{name}", getattr(rule, name))
