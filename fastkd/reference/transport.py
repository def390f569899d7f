"""Exact optimal transport: min sum f_ij c_ij over f >= 0 with row sums a and column sums b.

A transportation simplex in integers. Floats are dyadic rationals, so costs and masses become Python integers exactly, and no
tolerance is needed at any scale. Masses are perturbed in bits below their lowest, so that no basis is degenerate: every pivot
lowers the cost, and none can cycle. The basis is a spanning tree over rows and columns; the duals are its potentials.
An invalid problem (not finite, a negative mass, sums that differ) gives NaN for itself only.
"""

import math
from itertools import pairwise

import torch


def transport(cost, a, b):
    solved = [_solve(*problem) for problem in zip(*(x.detach().double().tolist() for x in (cost, a, b)), strict=True)]
    flow, u, v = ([problem[k] for problem in solved] for k in range(3))
    pairs = zip((flow, u, v), (cost, a, b), strict=True)  # [P, N, M], [P, N], [P, M]
    return tuple(like.new_tensor(x, dtype=torch.float64).reshape(like.shape) for x, like in pairs)


def value(flow, u, v, cost, a, b):
    """<flow, cost> [..., N, M]. Its first derivatives are the flow and the duals, each less its mean; the second is that of
    the basis, in which flow_ij = y_i + z_j on the arcs that carry mass, (y, z) linear in the masses."""
    N, cost, a, b = cost.shape[-2], *(x.to(flow.dtype) for x in (cost, a, b))
    change = [x - x.detach() for x in (a, b)]  # 0
    change = torch.cat([x - x.mean(-1, keepdim=True) for x in change], -1)  # [..., N + M]
    arcs = (flow > 0).to(flow.dtype)
    rows = torch.cat([arcs.sum(-1).diag_embed(), arcs], -1)
    columns = torch.cat([arcs.mT, arcs.sum(-2).diag_embed()], -1)
    inverse = torch.linalg.pinv(torch.cat([rows, columns], -2), hermitian=True)  # [..., N + M, N + M]
    y = (inverse @ change[..., None]).squeeze(-1)
    moved = arcs * (y[..., :N, None] + y[..., None, N:])
    first = (flow * cost).sum((-2, -1)) + (torch.cat([u, v], -1) * change).sum(-1)
    return first + (moved * (cost - cost.detach())).sum((-2, -1))


def _solve(cost, a, b):
    N, M = len(a), len(b)
    if not math.isfinite(sum(map(sum, cost))) or not min(a + b) >= 0 or not abs(sum(a) - sum(b)) <= 1e-5 * sum(a):
        return [[math.nan] * M] * N, [math.nan] * N, [math.nan] * M
    c, cost_unit = _integers([x for row in cost for x in row])
    mass, mass_unit = _integers(a + b)
    a, b = mass[:N], mass[N:]
    b = [y * sum(a) // max(sum(b), 1) for y in b]  # sums agree up to rounding; make them agree exactly
    b[b.index(max(b))] += sum(a) - sum(b)
    bits = (N * (M + 1)).bit_length() + 1
    a = [(x << bits) + M + 1 for x in a]  # no proper subset of rows weighs as much as a subset of columns
    b = [(y << bits) + 1 for y in b]
    b[-1] += sum(a) - sum(b)
    flow = {}  # the basis, started greedily from the cheapest cell: (row, N + column) -> mass
    for k in sorted(range(N * M), key=c.__getitem__):
        i, j = divmod(k, M)
        if x := min(a[i], b[j]):
            flow[i, N + j] = x
            a[i], b[j] = a[i] - x, b[j] - x
    while True:
        to_root, dual = _tree(flow, c, N, M)
        reduced = [x - y for x, y in zip(c, [p + q for p in dual[:N] for q in dual[N:]], strict=True)]
        enter = reduced.index(min(reduced))
        if reduced[enter] >= 0:
            break
        i, j = enter // M, N + enter % M
        up, down = list(to_root[i]), list(to_root[j])
        while len(up) > 1 and len(down) > 1 and up[-2] == down[-2]:
            up.pop(), down.pop()
        path = up + down[-2::-1]  # row i, column, row, …, column j, through the tree
        edges = [(min(x), max(x)) for x in pairwise(path)]
        leave = min(edges[::2], key=flow.__getitem__)
        flow[i, j] = theta = flow[leave]
        for sign, edge in zip([-1, 1] * M, edges, strict=False):
            flow[edge] += sign * theta
        del flow[leave]
    plan = [[((flow.get((i, N + j), 0) + (1 << bits - 1)) >> bits) / mass_unit for j in range(M)] for i in range(N)]
    dual = [x / cost_unit for x in dual]
    return plan, dual[:N], dual[N:]


def _integers(values):
    ratios = [x.as_integer_ratio() for x in values]
    unit = max(d for _, d in ratios)  # every denominator is a power of two
    return [n * (unit // d) for n, d in ratios], unit


def _tree(flow, c, N, M):
    near = [[] for _ in range(N + M)]
    for i, j in flow:
        near[i].append((j, c[i * M + j - N]))
        near[j].append((i, c[i * M + j - N]))
    to_root, dual, order = [[0]] * (N + M), [0] * (N + M), [0]
    for node in order:
        for other, x in near[node]:
            if other not in to_root[node][1:2]:  # not back to the parent
                to_root[other], dual[other] = [other, *to_root[node]], x - dual[node]
                order.append(other)
    return to_root, dual
