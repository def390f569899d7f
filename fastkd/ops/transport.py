"""Exact optimal transport: the autograd Function, and which implementation runs."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastkd import backends
from fastkd.reference import cost_attention as attention_reference
from fastkd.reference import transport as reference


class TransportPlan(NamedTuple):
    """An optimal flow with its certificate: u_i + v_j <= cost_ij, with equality where flow_ij > 0."""

    value: Tensor  # [...]
    flow: Tensor  # [..., N, M], no gradient
    u: Tensor  # [..., N], no gradient
    v: Tensor  # [..., M], no gradient
    status: Tensor  # [...] int32, 0 = optimal


LARGEST = 64  # rows and columns that the CUDA kernel takes, since it holds a subtree of its basis in two 64-bit sets


def _plan_fake(cost, a, b, start_flow, start_v):
    problems, n, m = cost.shape
    new = lambda *shape, dtype=torch.float64: cost.new_empty(shape, dtype=dtype)  # noqa: E731
    return new(problems, n, m), new(problems, n), new(problems, m), new(problems, dtype=torch.int32)


backends.fake("transport", _plan_fake)
backends.fake("transport_emulated", _plan_fake)


def _moved_fake(cost, a, b, *_):
    return (
        *_plan_fake(cost, a, b, None, None),
        a.new_empty(a.shape, dtype=torch.float64),
        b.new_empty(b.shape, dtype=torch.float64),
    )


backends.fake("cost_attention", _moved_fake)
backends.fake("cost_attention_emulated", _moved_fake)


class CostAttention(NamedTuple):
    """How the weights of layers follow from the transport between them; see BertEMDLoss."""

    inverse_cost: bool = True
    temperature: float = 1.0
    product_of_sums: bool = False
    joint: bool = True
    double_softmax: bool = False


class Transport(backends.Function):
    """value = <flow, cost>. Its gradient is the flow (to the cost) and the duals (to the marginals), by the envelope
    theorem; u and v are defined up to u + c, v - c only, so each is centred."""

    function = "transport or transport_with_cost_attention"
    gradient_in_forward = True

    @staticmethod
    def forward(ctx, cost, a, b, start_flow, start_v, attention=None):
        moved = ()
        if attention is None:
            flow, u, v, status = _solve(cost, a, b, start_flow, start_v)
        else:
            flow, u, v, status, *moved = _solve_and_move(cost, a, b, attention)
        value = (flow * cost.to(flow.dtype)).sum((-2, -1))
        ctx.save_for_backward(flow, u, v)
        ctx.dtypes = cost.dtype, a.dtype, b.dtype
        out = tuple(x.to(_result_dtype(cost)) for x in (value, flow, u, v))
        ctx.mark_non_differentiable(*out[1:], status, *moved)
        return *out, status, *moved

    @staticmethod
    def backward(ctx, grad, *_):
        flow, u, v = ctx.saved_tensors
        grad = grad.to(flow.dtype)
        to_cost = grad[..., None, None] * flow
        to_a, to_b = (grad[..., None] * (x - x.mean(-1, keepdim=True)) for x in (u, v))
        cost_dtype, a_dtype, b_dtype = ctx.dtypes
        return to_cost.to(cost_dtype), to_a.to(a_dtype), to_b.to(b_dtype), None, None, None


def _result_dtype(cost: Tensor) -> torch.dtype:
    return torch.float64 if cost.dtype == torch.float64 else torch.float32


def _solve(cost, a, b, start_flow=None, start_v=None, by_reference=False):
    """flow, u, v in float64 and status, with the leading shape of cost."""
    *lead, n, m = cost.shape
    dtype = torch.promote_types(torch.promote_types(cost.dtype, a.dtype), torch.promote_types(b.dtype, torch.float32))
    problems = cost.reshape(-1, n, m).to(dtype), a.reshape(-1, n).to(dtype), b.reshape(-1, m).to(dtype)
    if by_reference:
        flow, u, v = reference.transport(*problems)
        status = torch.where(flow.isfinite().all((-2, -1)), 0, 1).to(torch.int32)  # [P]
    else:
        if start_flow is not None:
            start_flow = start_flow.detach().expand(cost.shape).reshape(-1, n, m).double()
            start_v = start_v.detach().expand(*lead, m).reshape(-1, m).double()
        start = start_flow, start_v
        if _on_the_host(cost):
            problems, start = ([x if x is None else x.to("cpu") for x in group] for group in (problems, start))
        plan = torch.ops.fastkd.transport(*problems, *start)
        flow, u, v, status = (x.to(cost.device) for x in plan)
    return flow.reshape(cost.shape), u.reshape(*lead, n), v.reshape(*lead, m), status.reshape(lead)


def _solve_and_move(cost, a, b, attention: CostAttention):
    """The same for cost [P, N, M], and the new weights [P, N] and [P, M], in one launch."""
    dtype = torch.promote_types(torch.promote_types(cost.dtype, a.dtype), torch.promote_types(b.dtype, torch.float32))
    device = "cpu" if _on_the_host(cost) else cost.device
    problems = (x.to(device, dtype) for x in (cost, a, b))
    return tuple(x.to(cost.device) for x in torch.ops.fastkd.cost_attention(*problems, *attention))


def _on_the_host(cost: Tensor) -> bool:
    """Whether a problem on a GPU is too large for its kernel; the host then solves it, and the GPU waits."""
    return cost.device.type != "cpu" and max(cost.shape[-2:]) > LARGEST


def _by_reference(cost, a, b, attention=None):
    """What `Transport` returns, in PyTorch operations, which can be differentiated twice and in forward mode."""
    if any(map(torch._C._functorch.is_batchedtensor, (cost, a, b))):
        raise RuntimeError("transport: the solver cannot run inside vmap; pass a batch of costs [..., N, M] instead")
    flow, u, v, status = _solve(cost, a, b, by_reference=True)
    out = tuple(x.to(_result_dtype(cost)) for x in (reference.value(flow, u, v, cost, a, b), flow, u, v))
    if attention is None:
        return *out, status
    return *out, status, *attention_reference.cost_attention(flow, cost.detach(), a.detach(), b.detach(), *attention)


def transport(cost, a, b, warm_start, backend) -> TransportPlan:
    """Solves every problem of the batch exactly, in float64. A warm start gives the first basis and its duals."""
    if _chosen(cost, backend) == "reference":
        return TransportPlan(*_by_reference(cost, a, b))
    start = (None, None) if warm_start is None else (warm_start.flow, warm_start.v)
    return TransportPlan(*Transport.apply(cost, a, b, *start))


def transport_and_weights(cost, a, b, attention: CostAttention, backend) -> tuple[TransportPlan, Tensor, Tensor]:
    """The plans of cost [P, N, M], of P kinds, and the new weights a [P, N] and b [P, M] by cost attention."""
    if _chosen(cost, backend) == "reference":
        *plan, new_a, new_b = _by_reference(cost, a, b, attention)
    else:
        *plan, new_a, new_b = Transport.apply(cost, a, b, None, None, attention)
    return TransportPlan(*plan), new_a, new_b


def _chosen(cost: Tensor, backend: str) -> str:
    large = _on_the_host(cost)
    if large and backend == "auto":
        return "reference" if backends.UNAVAILABLE["cpu"] else "cpu"
    backend = backends.choose("transport", backend, cost)
    if large and backend == "cuda":
        raise ValueError(f"cost: the CUDA kernel takes up to {LARGEST} rows and columns, got {list(cost.shape)}")
    return backend
