"""Cost attention (BERT-EMD): the new weights of layers, from the transport between them.

The less a layer's unit of mass cost to match, the larger its weight becomes.
"""

import torch

SMALLEST_WEIGHT = 1e-8  # a weight of 0 would give 0/0 in the next step; training gives far larger ones
SMALLEST_UNIT = torch.finfo(torch.float64).tiny ** 0.5  # keeps the ratios finite and changes nothing else


def cost_attention(flow, cost, a, b, inverse_cost, temperature, product_of_sums, joint, double_softmax):
    """flow, cost [P, N, M] of P kinds of cost, a [P, N], b [P, M] -> the new a and b, in float64. joint: all kinds get
    their mean. Weights that would not be finite stay as they were."""
    flow, cost = flow.double(), cost.double()
    new = []
    for weight, axis in ((a.double(), 2), (b.double(), 1)):  # [P, N], then [P, M]
        spent = flow.sum(axis) * cost.sum(axis) if product_of_sums else (flow * cost).sum(axis)
        unit = spent / weight
        ratio = torch.where(unit == 0, 0, unit.sum(1, keepdim=True) / unit.clamp_min(SMALLEST_UNIT))
        if inverse_cost:
            moved = ratio / ratio.sum(1, keepdim=True).clamp_min(SMALLEST_UNIT)
        else:
            moved = torch.softmax(ratio / temperature, 1)
        if joint:
            moved = moved.mean(0, keepdim=True).expand_as(moved)
        if double_softmax:
            moved = moved.softmax(1)
        moved = torch.where(moved.isfinite().all(1, keepdim=True), moved, weight).clamp_min(SMALLEST_WEIGHT)
        new.append(moved / moved.sum(1, keepdim=True))
    return new
