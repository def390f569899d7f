"""Exact optimal transport: the autograd Function, and which implementation runs."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastkd import backends
from fastkd.reference import transport as reference


class TransportPlan(NamedTuple):
    """An optimal flow with its certificate: u_i + v_j <= cost_ij, with equality where flow_ij > 0."""

    value: Tensor  # [...]
    flow: Tensor  # [..., N, M], no gradient
    u: Tensor  # [..., N], no gradient
    v: Tensor  # [..., M], no gradient
    status: Tensor  # [...] int32, 0 = optimal


class Transport(torch.autograd.Function):
    """value = <flow, cost>. Its gradient is the flow (to the cost) and the duals (to the marginals), by the envelope
    theorem; u and v are only defined up to u + c, v - c, so each is centred."""

    @staticmethod
    def forward(ctx, cost, a, b, solve):
        flow, u, v, status = solve(cost, a, b)
        value = (flow * cost.to(flow.dtype)).sum((-2, -1))
        ctx.save_for_backward(flow, u, v)
        ctx.dtypes = cost.dtype, a.dtype, b.dtype
        out = tuple(x.to(_result_dtype(cost)) for x in (value, flow, u, v))
        ctx.mark_non_differentiable(*out[1:], status)
        return *out, status

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, *_):
        flow, u, v = ctx.saved_tensors
        grad = grad.to(flow.dtype)
        to_cost = grad[..., None, None] * flow
        to_a, to_b = (grad[..., None] * (x - x.mean(-1, keepdim=True)) for x in (u, v))
        cost_dtype, a_dtype, b_dtype = ctx.dtypes
        return to_cost.to(cost_dtype), to_a.to(a_dtype), to_b.to(b_dtype), None


def _result_dtype(cost: Tensor) -> torch.dtype:
    return torch.float64 if cost.dtype == torch.float64 else torch.float32


def _solve_reference(cost, a, b):
    *lead, n, m = cost.shape
    flow, u, v = reference.transport(cost.reshape(-1, n, m), a.reshape(-1, n), b.reshape(-1, m))
    status = torch.zeros(lead, dtype=torch.int32, device=cost.device)
    return flow.reshape(*lead, n, m), u.reshape(*lead, n), v.reshape(*lead, m), status


def transport(cost, a, b, warm_start, backend) -> TransportPlan:
    """Solve every problem of the batch exactly, in float64."""
    backends.choose("transport", backend, cost)
    return TransportPlan(*Transport.apply(cost, a, b, _solve_reference))
