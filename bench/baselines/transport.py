"""Exact transport BERT-EMD's way. PyTorch has no solver, so there is nothing eager."""

import torch
from fastkd.bench.baselines import layer_cost

from fastkd.functional import CostAttention, TransportPlan
from fastkd.reference.cost_attention import cost_attention


def authors(cost, a=None, b=None, *, warm_start=None, emd=None):
    """Every problem [..., N, M] copied to the host, solved there in float64 by POT or another `emd`, and its flow copied
    back."""
    if emd is None:
        from ot import emd
    *lead, n, m = cost.shape
    a = cost.new_full((*lead, n), 1.0 / n, dtype=torch.float64) if a is None else a
    b = cost.new_full((*lead, m), 1.0 / m, dtype=torch.float64) if b is None else b
    problems = zip(a.reshape(-1, n), b.reshape(-1, m), cost.reshape(-1, n, m), strict=True)
    flows = [torch.from_numpy(emd(*(x.detach().cpu().numpy().astype("float64") for x in each))) for each in problems]
    flow = torch.stack(flows).to(cost).view_as(cost)
    return TransportPlan((flow * cost).sum((-2, -1)), flow, None, None, None)


def authors_with_cost_attention(cost, a, b, attention=None):
    plan = authors(cost, a, b)
    return plan, *cost_attention(plan.flow, cost.detach(), a, b, *(attention or CostAttention()))


def authors_case(x: dict, options: dict):
    return authors(x["cost"], x["a"], x["b"]).value.sum()


def authors_step_case(x: dict, options: dict):
    """A loop of means into one matrix, its copy to the host, a solver there, and the flow's way back."""
    return authors(layer_cost.authors(x["students"], x["teachers"])).value
