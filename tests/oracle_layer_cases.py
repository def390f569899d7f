"""Random cases of what compares layers: self-similarities, relations, costs and the transport between them."""

import torch

import oracles
from fastkd import functional
from oracle_cases import REDUCTIONS, Case, described, seen
from oracles import losses, relations


def features(draw, *shape):
    """Hidden states of two widths: with a common direction or not, with zero tokens, the student near the teacher."""
    B, N, ds, dt = shape
    teacher = draw.normal(B, N, dt) + draw.choice([0.0, 0.0, 1.0, 10.0]) * draw.normal(dt)
    how = draw.choice(["independent", "independent", "near", "equal", "outlier"])
    student = draw.normal(B, N, ds) + draw.choice([0.0, 0.0, 1.0, 10.0]) * draw.normal(ds)
    if how in ("near", "equal"):
        student = teacher + (draw.choice([1e-1, 1e-2, 1e-3]) if how == "near" else 0) * draw.normal(B, N, dt)
    elif how == "outlier":
        student[..., 0] *= 100
    zeros = draw.normal(B, N, 1) > (1.5 if draw.maybe(0.2) else 9)
    student = student.masked_fill(zeros, 0) if draw.maybe() else student
    teacher = teacher.masked_fill(zeros, 0) if draw.maybe() else teacher
    scale = draw.choice([1.0, 1.0, 1e-2, 50.0])
    return scale * student, teacher, how + (" with zero tokens" if zeros.any() else "")


def gram(draw):
    B, N = draw.choice([(draw.size(5), draw.size(33)), (draw.size(33), draw.size(5)), (1, draw.size(129)), (3, 7)])
    student, teacher, how = features(draw, B, N, draw.size(33), draw.size(65))
    level = draw.choice(["token", "sequence", {"token": 1.0, "sequence": 0.5}])
    official, by_row = draw.maybe(0.25), draw.maybe(0.3)
    mask = (torch.ones(B, N) if draw.maybe(0.3) else None) if official else draw.mask(B, N)
    reduction = draw.choice(REDUCTIONS if isinstance(level, str) else REDUCTIONS[:2])
    grouping, normalize = "official" if official else "position", draw.maybe(0.8)
    student = student if normalize else student / student.abs().max().clamp_min(1e-3)
    options = {"grouping": grouping, "normalize": normalize, "mask": mask, "eps": draw.choice([1e-6, 1e-6, 1e-3])}

    def oracle(s, t):
        found = 0
        for name, weight in ({level: 1.0} if isinstance(level, str) else level).items():
            values, valid = relations.gram(s, t, name, by_row=by_row, **options)
            found = found + weight * oracles.reduced(values, valid, reduction)
        return found

    def call(backend, s, t):
        pearson = "row" if by_row else "matrix"
        return functional.gram_correlation_loss(
            s, t, level=level, pearson=pearson, reduction=reduction, **options, backend=backend
        )

    # The gradient of x / |x| at 0, of no use, is 1e12 times what comes; the others' is what must be right.
    compared = (student.abs().amax(-1, keepdim=True) > 0).expand_as(student)
    note = {
        "how": how,
        "B, N": (B, N),
        "Ds, Dt": (student.shape[2], teacher.shape[2]),
        "level": level,
        "by_row": by_row,
    }
    note |= {"reduction": reduction, **described(options)}
    absolute = 1.5e-6 * (2 * student.shape[0] * student.shape[1] if reduction == "sum" else 1)
    floor = 1e-8 / max(float(student.square().mean().sqrt()), 1e-3)
    bounds = {"absolute": absolute, "floor": floor}
    return Case([student], call, oracle, note, **bounds, compared=[compared], teachers=(teacher,))


def relation(draw):
    B, H, L = draw.size(3), draw.size(3), draw.choice([draw.size(65), draw.size(17), 129])
    ds, dt = draw.size(17), draw.size(33)
    heads = draw.choice([None, None, 1, H])
    count, scale = draw.size(2), draw.choice([0.3, 1.0, 1.0, 3.0])
    near = draw.choice([0, 0, 0, 1e-1, 1e-2, 1e-3])
    teachers = [draw.normal(B, H, L, dt, scale=scale) for _ in range(2 * count)]
    leaves = [draw.normal(B, H, L, ds, scale=draw.choice([scale, scale, 0.05])) for _ in range(2 * count)]
    if near:
        leaves = [x + near * draw.normal(*x.shape) for x in teachers]
    pairs = [draw.maybe(0.4) for _ in range(count)]
    mask, reduction = draw.mask(B, L), draw.choice(REDUCTIONS)
    options = {
        "heads": heads,
        "mask": mask,
        "causal": draw.maybe(0.3),
        "temperature": draw.choice([None, None, 0.1, 1.0, 9.0]),
    }

    def arranged(xs):
        return [(xs[2 * i], xs[2 * i + 1]) if pair else xs[2 * i] for i, pair in enumerate(pairs)]

    def oracle(*xs):
        found = []
        for s, t in zip(arranged(xs[: 2 * count]), arranged(xs[2 * count :]), strict=True):
            rows = relations.relation(s, t, **options)
            valid = seen(None if mask is None else mask.bool()[:, None], rows.shape)
            found.append(oracles.reduced(rows, valid, reduction))
        return torch.stack(found) if reduction == "none" else sum(found)

    def call(backend, *xs):
        sides = arranged(xs[: 2 * count]), arranged(xs[2 * count :])
        return functional.relation_kl_loss(*sides, **options, reduction=reduction, backend=backend)

    used = [torch.full_like(x, pairs[i // 2] or i % 2 == 0, dtype=torch.bool) for i, x in enumerate(leaves)]
    note = {
        "B, H, L": (B, H, L),
        "ds, dt": (ds, dt),
        "pairs": pairs,
        "scale": scale,
        "near": near,
        "reduction": reduction,
    }
    return Case(leaves, call, oracle, note | described(options), compared=used, teachers=tuple(teachers))


def layer_costs(draw):
    n, m, B, S, D = draw.size(5), draw.size(13), draw.size(3), draw.size(17), draw.size(33)
    scale, near = draw.choice([1.0, 1.0, 100.0]), draw.maybe(0.3)
    teachers = [draw.normal(B, S, D, scale=scale) for _ in range(m)]
    leaves = [teachers[i % m] + 1e-3 * draw.normal(B, S, D) if near else draw.normal(B, S, D) for i in range(n)]
    options = {"mask": draw.mask(B, S), "clamp": draw.choice([None, None, -1.0])}
    return Case(
        leaves,
        lambda backend, *xs: functional.layer_costs(list(xs[:n]), list(xs[n:]), **options, backend=backend),
        lambda *xs: relations.layer_costs(xs[:n], xs[n:], **options),
        {"N, M": (n, m), "B, S, D": (B, S, D), "scale": scale, "near": near, **described(options)},
        teachers=tuple(teachers),
    )


def attention_costs(draw):
    n, m, B, S = draw.size(3), draw.size(5), draw.size(2), draw.choice([draw.size(33), draw.size(8), 65])
    H, heads = draw.choice([1, 2, 4]), draw.choice([None, None, "mean"])
    ht = H if heads is None else draw.choice([1, 2, 4])
    grouped, (ds, dt), near = draw.choice([1, 1, H]), (draw.size(17), draw.size(33)), draw.maybe(0.3)
    scores = draw.maybe(0.4)
    if scores:
        teachers = [draw.normal(B, ht, S, S) for _ in range(m)]
        leaves = [draw.normal(B, H, S, S) for _ in range(n)]
        if near and ht == H:
            leaves = [teachers[i % m] + 1e-3 * draw.normal(B, H, S, S) for i in range(n)]
        if draw.maybe():
            hidden = draw.normal(B, 1, 1, S) > 0.5
            teachers, leaves = ([x - 1e4 * hidden for x in xs] for xs in (teachers, leaves))
    else:
        teachers = [draw.normal(B, ht, S, dt) for _ in range(2 * m)]
        leaves = [draw.normal(B, h, S, ds) for _ in range(n) for h in (H, H // grouped)]
        if near and ht == H and grouped == 1:
            leaves = [x + 1e-3 * draw.normal(*x.shape) for _ in range(n) for x in teachers[:2]]
    options = {
        "mask": draw.mask(B, S),
        "causal": draw.maybe(0.3),
        "scale": draw.choice([None, None, 1.0]),
        "heads": heads,
    }
    arranged = (lambda xs: list(xs)) if scores else (lambda xs: list(zip(xs[::2], xs[1::2], strict=True)))
    sides = lambda xs: (arranged(xs[: len(leaves)]), arranged(xs[len(leaves) :]))  # noqa: E731
    return Case(
        leaves,
        lambda backend, *xs: functional.attention_costs(*sides(xs), **options, backend=backend),
        lambda *xs: relations.attention_costs(*sides(xs), **options),
        {
            "N, M": (n, m),
            "B, H, S": (B, H, S),
            "ds, dt": (ds, dt),
            "scores": scores,
            "near": near,
            **described(options),
        },
        teachers=tuple(teachers),
    )


def transport(draw):
    n, m = draw.size(13), draw.size(17)
    a, b = (draw.normal(k).abs() + draw.choice([0.01, 1.0]) for k in (n, m))
    leaves = [draw.normal(n, m, scale=draw.choice([1.0, 1.0, 1e-4, 1e3]))]
    leaves[0] = leaves[0].abs() if draw.maybe() else leaves[0]
    a, b = (x.double() / x.double().sum() for x in (a, b))

    def call(backend, cost):
        plan = functional.transport(cost, a, b, backend=backend)
        reduced = cost.detach().double() - plan.u.double()[:, None] - plan.v.double()[None]
        size = float(cost.detach().abs().max()) * (1e-12 if cost.dtype == torch.float64 else 1e-6)
        assert (reduced >= -size).all() and abs(
            float((a * plan.u).sum() + (b * plan.v).sum() - plan.value.detach())
        ) <= 4 * size
        return plan.value

    return Case(leaves, call, lambda cost: losses.transport(cost, a, b)[0], {"N, M": (n, m)})
