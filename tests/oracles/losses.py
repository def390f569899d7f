"""The papers' losses from the oracles of their parts, and exact transport by SciPy's linear programming."""

import numpy as np
import torch
from scipy.optimize import linprog

from oracles import contrast, reduced
from oracles.probabilities import divergence
from oracles.relations import gram


def optimal_flow(cost, a, b):
    """argmin <flow, cost> with row sums a and column sums b; [N, M], [N], [M] arrays of float64."""
    n, m = cost.shape
    sums = np.vstack([np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m))])
    b = b * (a.sum() / b.sum())
    tight = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}
    size = np.abs(cost).max() or 1.0  # tolerances are absolute
    found = linprog(cost.ravel() / size, A_eq=sums, b_eq=np.concatenate([a, b]), method="highs-ds", options=tight)
    assert found.status == 0, found.message
    return found.x.reshape(n, m)


def transport(cost, a, b):
    """value and flow; the flow is a constant of the gradient."""
    flow = torch.tensor(optimal_flow(*(x.detach().double().numpy() for x in (cost, a, b))))
    return (flow * cost).sum(), flow


def fcd(students, teachers, alpha, beta, gamma, grouping, mask=None):
    """gamma: the random relation, whose K rows are here all B N tokens, so that their order says nothing."""
    normalize, found = alpha > 0 or grouping == "position", []
    for s, t in zip(students, teachers, strict=True):
        levels = (
            (alpha, s, t, "token", False), (beta, s, t, "sequence", False),
            (gamma, s.flatten(0, 1)[None], t.flatten(0, 1)[None], "token", True),
        )  # fmt: skip
        for weight, x, y, level, by_row in levels:
            if weight:
                where = None if mask is None else mask.reshape(x.shape[:2])
                found.append(weight * reduced(*gram(x, y, level, grouping, by_row, normalize, where, 1e-6), "mean"))
    return sum(found) / len(students)


def cost_attention(flows, costs, a, b, rule, temperature, double_softmax, separate):
    """BERT-EMD: what the weights a, b (a list over the kinds of cost) become after the transport between them."""
    new = []
    for weights, axis in ((a, 1), (b, 0)):
        moved = []
        for flow, cost, weight in zip(flows, costs, weights, strict=True):
            unit = (flow * cost).sum(axis) / weight
            ratio = unit.sum() / unit
            moved.append(ratio / ratio.sum() if rule == "inverse_cost" else torch.softmax(ratio / temperature, 0))
        moved = moved if separate else [sum(moved) / len(moved)] * len(moved)
        new.append([torch.softmax(x, 0) for x in moved] if double_softmax else moved)
    return new


def codir(v_s, v_t, banks, index, n_data, temperature, z):
    """The released loss: both anchors, each against the other side's bank."""
    sides = ((v_s, banks[1], z[0]), (v_t, banks[0], z[1]))
    return sum(contrast.nce(v, bank, index, n_data, temperature, of).mean() for v, bank, of in sides) / 2


def glmd(student, teacher, mask, temperature, top_n=None, teacher_min=False):
    """T² KL(teacher || student), over all B S positions; top_n of the teacher's tokens, and what the others exceed them by."""
    excess = 0
    if top_n is not None:
        top, tokens = teacher.topk(top_n, -1)
        if teacher_min:
            teacher = torch.where(teacher < top[..., -1:], teacher.amin(-1, keepdim=True), teacher)
        else:
            chosen = student.gather(-1, tokens)
            over = student.scatter(-1, tokens, -torch.inf) - chosen.amin(-1, keepdim=True)
            over = over[mask.bool()]
            excess = over[over > 0].mean() if (over > 0).any() else 0
            student, teacher = chosen, top
    rows = divergence(student, teacher, "forward_kl", temperature, True, 0.5, 0.1)
    return (rows * mask).sum() / mask.numel() + excess
