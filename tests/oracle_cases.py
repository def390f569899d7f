"""Random cases of every op: what to call, and the oracle for it. A case follows from its op and number alone."""

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch

import oracles
from fastkd import TopK, functional
from oracles import contrast, losses, probabilities, relations

SIZES = (1, 2, 3, 4, 5, 7, 8, 13, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 257, 513, 1025)
REDUCTIONS = ("mean", "sum", "none")


@dataclass
class Case:
    """call(backend, *leaves) and oracle(*leaves) of leaves in one dtype; what else they take is in them, in any dtype."""

    leaves: list
    call: Callable
    oracle: Callable
    note: dict
    absolute: float = 0.0  # allowed of the value, beside the relative error
    strict: bool = False  # whether eager's error is no excuse
    compared: list | None = None  # per leaf, which entries of its gradient are compared; None: all


class Draw(random.Random):
    """Everything that a case is made of."""

    def normal(self, *shape, scale=1.0):
        generator = torch.Generator().manual_seed(self.getrandbits(60))
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).float()

    def whole(self, high, *shape):
        return torch.randint(high, shape, generator=torch.Generator().manual_seed(self.getrandbits(60)))

    def size(self, most, least=1):
        return self.choice([n for n in SIZES if least <= n <= most])

    def maybe(self, probability=0.5):
        return self.random() < probability

    def mask(self, *shape, probability=0.6):
        if not self.maybe(probability):
            return None
        mask = self.normal(*shape) > self.choice([-2.0, -0.5, 0.5, 5.0])
        return mask if self.maybe() else mask.to(self.choice([torch.int64, torch.float32]))

    def sides(self, *shape):
        """Student, teacher, and how they lie: far apart, of other scales, near each other, equal, with an offset."""
        scale = self.choice([0.01, 1.0, 1.0, 3.0, 10.0])
        teacher = self.normal(*shape, scale=scale)
        how = self.choice(["apart", "apart", "flat student", "flat teacher", "near", "near", "equal", "offset", "spikes"])
        student = self.normal(*shape, scale=scale)
        if how in ("near", "equal"):
            noise = self.choice([1e-1, 1e-2, 1e-3]) if how == "near" else 0.0
            student = teacher + noise * self.normal(*shape)
        elif how == "flat student":
            student = student * 0.05
        elif how == "flat teacher":
            teacher = teacher * 0.05
        elif how == "offset":
            student = student + self.choice([1.0, 30.0, 300.0, -1000.0])
        elif how == "spikes":
            student, teacher = (x + 20 * (self.normal(*shape) > 2) for x in (student, teacher))
        return student, teacher, f"{how} {scale}"


def seen(mask, shape):
    return torch.ones(shape, dtype=torch.bool) if mask is None else mask.bool().expand(shape)


def logits_options(draw, kinds=probabilities.KINDS):
    kind = draw.choice(kinds)
    options = {"kind": kind, "temperature": draw.choice([1.0, 1.0, 0.1, 0.5, 2.0, 4.0, 15.0]), "t_squared": draw.maybe(0.7)}
    beta, alpha = draw.choice([0.5, 0.1, 0.9, 1e-3, 0.999]), draw.choice([0.1, 0.0, 1e-3, 1e-6, 0.5, 0.999])
    return options | {"beta": beta, "alpha": alpha}


def rows_of(draw, shape):
    """mask, labels, reduction as keywords of ours, and which rows they leave."""
    mask, labels = draw.mask(*shape, probability=0.4), None
    if draw.maybe(0.3):
        labels = torch.where(draw.normal(*shape) > 1, -100, 0)
    valid = seen(mask, shape) & (True if labels is None else labels != -100)
    return {"mask": mask, "labels": labels, "reduction": draw.choice(REDUCTIONS)}, valid


def divergence(draw):
    shape = draw.choice([(1,), (3,), (5,), (2, 3)])
    student, teacher, how = draw.sides(*shape, draw.size(1025))
    if draw.maybe(0.1) and student.shape[-1] > 2:
        hidden = draw.normal(student.shape[-1]) > 0.5
        hidden[0], how = False, how + " -inf"
        teacher = teacher.masked_fill(hidden, -torch.inf)
        student = student.masked_fill(hidden, -torch.inf)
    options, (rows, valid) = logits_options(draw), rows_of(draw, shape)
    mixed = options["kind"] != "tvd"
    p, q = ((x.double() / options["temperature"]).softmax(-1) for x in (teacher, student))
    # tvd's gradient jumps where q = p: on which side of it such a word lies is a matter of rounding.
    jumps = not mixed and bool(((p - q).abs() <= 1e-5 * (p + q))[(p + q) > 1e-9].any())
    return Case(
        [student],
        lambda backend, s: functional.divergence(s, teacher.to(s), **options, **rows, backend=backend),
        lambda s: oracles.reduced(probabilities.divergence(s, teacher.to(s), **options), valid, rows["reduction"]),
        {"how": how, "shape": tuple(student.shape), **options, **described(rows)},
        strict=how.split()[0] == "near" and how.split()[1] in ("0.01", "1.0") and options["temperature"] >= 0.5 and mixed,
        compared=[torch.zeros_like(student, dtype=torch.bool)] if jumps else None,
    )


def topk(draw):
    shape, vocab = draw.choice([(1,), (4,), (2, 3)]), draw.size(513, least=2)
    student, teacher, how = draw.sides(*shape, vocab)
    tail = draw.choice(["none", "true", "given"])
    kinds = [k for k in probabilities.KINDS if k != "mse" and (k != "reverse_kl" or tail != "none")]
    options, (rows, valid) = logits_options(draw, kinds), rows_of(draw, shape)
    k = draw.choice([n for n in (1, 2, 5, 16, 64, 200, vocab) if n < vocab or (n == vocab and tail == "none")])
    log_p = torch.log_softmax(teacher.double() / options["temperature"], -1)
    log_probs, indices = log_p.topk(k, -1)
    left = log_p.scatter(-1, indices, -torch.inf).logsumexp(-1).float() if tail == "given" else tail == "true" or None
    log_probs = log_probs.float()
    jumps = options["kind"] == "tvd" and how.split()[0] in ("near", "equal", "offset")
    sparse = lambda s: (indices, log_probs.to(s), left.to(s) if isinstance(left, torch.Tensor) else left)  # noqa: E731
    return Case(
        [student],
        lambda backend, s: functional.divergence(s, TopK(*sparse(s)), **options, **rows, backend=backend),
        lambda s: oracles.reduced(probabilities.sparse_divergence(s, *sparse(s), **options), valid, rows["reduction"]),
        {"how": how, "shape": tuple(student.shape), "k": k, "tail": tail, **options, **described(rows)},
        compared=[torch.zeros_like(student, dtype=torch.bool)] if jumps else None,
    )


def linear(draw):
    shape, vocab, ds, dt = draw.choice([(1,), (5,), (2, 3)]), draw.size(257), draw.size(33), draw.size(33)
    kept = draw.whole(vocab + 20, 2 * vocab + 20).unique()[:vocab] if draw.maybe(0.25) else None
    kept = kept if kept is not None and len(kept) == vocab else None
    size_t = vocab if kept is None else vocab + 20
    scale = draw.choice([0.3, 1.0, 1.0, 3.0])
    leaves = [draw.normal(*shape, ds), draw.normal(vocab, ds, scale=scale / ds**0.5)]
    hidden, head = draw.normal(*shape, dt), draw.normal(size_t, dt, scale=scale / dt**0.5)
    near = draw.maybe(0.3) and kept is None
    if near:
        leaves, hidden = [hidden + 1e-2 * draw.normal(*hidden.shape), head.clone()], hidden
    leaves += [draw.normal(vocab)] if draw.maybe() else []
    bias_t = draw.normal(size_t) if draw.maybe() else None
    options, (rows, valid) = logits_options(draw), rows_of(draw, shape)
    weights = draw.normal(*shape).abs() if draw.maybe(0.2) and rows["reduction"] != "none" else None
    cap, hard = (draw.choice([3.0, 30.0]) if draw.maybe(0.3) else None), 0.0
    logit_scale = draw.choice([1.0, 1.0, 0.5])
    if draw.maybe(0.3):
        rows["labels"], hard = torch.where(valid, draw.whole(vocab, *shape), -100), 0.7
    extra = {"weights": weights, "hard_weight": hard, "logit_softcap": cap, "logit_scale": logit_scale}
    extra |= {"vocab": kept, "memory": draw.choice(["speed", "low"])}

    def call(backend, h, w, *b):
        bias = {"student_bias": b[0] if b else None, "teacher_bias": None if bias_t is None else bias_t.to(h)}
        more = extra | {"weights": None if weights is None else weights.to(h)}
        return functional.linear_divergence(
            h, w, hidden.to(h), head.to(h), **bias, **options, **rows, **more, backend=backend
        )

    def oracle(h, w, *b):
        s = probabilities.logits(h, w, b[0] if b else None, logit_scale, cap)
        t = probabilities.logits(hidden.to(h), head.to(h), None if bias_t is None else bias_t.to(h), logit_scale, cap)
        found = probabilities.divergence(s, t if kept is None else t[..., kept], **options)
        if hard:
            found = found + hard * probabilities.cross_entropy(s, rows["labels"].clamp_min(0))
        return oracles.reduced(found, valid, rows["reduction"], weights)

    jumps = options["kind"] == "tvd" and near
    note = {"rows": shape, "V, Ds, Dt": (vocab, ds, dt), "scale": scale, "near": near, **options, **described(rows | extra)}
    none = [torch.zeros_like(x, dtype=torch.bool) for x in leaves]
    return Case(leaves, call, oracle, note, compared=none if jumps else None)


def features(draw, *shape):
    """Hidden states of two widths: with a common direction or not, with zero tokens, the student near the teacher."""
    B, N, ds, dt = shape
    teacher = draw.normal(B, N, dt) + draw.choice([0.0, 0.0, 1.0, 10.0]) * draw.normal(dt)
    how = draw.choice(["apart", "apart", "near", "equal", "outlier"])
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

    def oracle(s):
        found = 0
        for name, weight in ({level: 1.0} if isinstance(level, str) else level).items():
            values, valid = relations.gram(s, teacher.to(s), name, by_row=by_row, **options)
            found = found + weight * oracles.reduced(values, valid, reduction)
        return found

    def call(backend, s):
        pearson = "row" if by_row else "matrix"
        return functional.gram_correlation_loss(
            s, teacher.to(s), level=level, pearson=pearson, reduction=reduction, **options, backend=backend
        )

    # The gradient of x / |x| at 0, of no use, is 1e12 times what comes; the others' is what must be right.
    compared = (student.abs().amax(-1, keepdim=True) > 0).expand_as(student)
    note = {"how": how, "B, N": (B, N), "Ds, Dt": (student.shape[2], teacher.shape[2]), "level": level, "by_row": by_row}
    note |= {"reduction": reduction, **described(options)}
    absolute = 1.5e-6 * (2 * student.shape[0] * student.shape[1] if reduction == "sum" else 1)
    return Case([student], call, oracle, note, absolute=absolute, compared=[compared])


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
    options = {"heads": heads, "mask": mask, "causal": draw.maybe(0.3), "temperature": draw.choice([None, None, 0.1, 1.0, 9.0])}

    def arranged(xs):
        return [(xs[2 * i], xs[2 * i + 1]) if pair else xs[2 * i] for i, pair in enumerate(pairs)]

    def oracle(*xs):
        found = []
        for s, t in zip(arranged(xs), arranged([x.to(xs[0]) for x in teachers]), strict=True):
            rows = relations.relation(s, t, **options)
            valid = seen(None if mask is None else mask.bool()[:, None], rows.shape)
            found.append(oracles.reduced(rows, valid, reduction))
        return torch.stack(found) if reduction == "none" else sum(found)

    def call(backend, *xs):
        sides = arranged(xs), arranged([x.to(xs[0]) for x in teachers])
        return functional.relation_kl_loss(*sides, **options, reduction=reduction, backend=backend)

    used = [torch.full_like(x, pairs[i // 2] or i % 2 == 0, dtype=torch.bool) for i, x in enumerate(leaves)]
    note = {"B, H, L": (B, H, L), "ds, dt": (ds, dt), "pairs": pairs, "scale": scale, "near": near, "reduction": reduction}
    return Case(leaves, call, oracle, note | described(options), compared=used)


def layer_costs(draw):
    n, m, B, S, D = draw.size(5), draw.size(13), draw.size(3), draw.size(17), draw.size(33)
    scale, near = draw.choice([1.0, 1.0, 100.0]), draw.maybe(0.3)
    teachers = [draw.normal(B, S, D, scale=scale) for _ in range(m)]
    leaves = [teachers[i % m] + 1e-3 * draw.normal(B, S, D) if near else draw.normal(B, S, D) for i in range(n)]
    options = {"mask": draw.mask(B, S), "clamp": draw.choice([None, None, -1.0])}
    return Case(
        leaves,
        lambda backend, *xs: functional.layer_costs(list(xs), [t.to(xs[0]) for t in teachers], **options, backend=backend),
        lambda *xs: relations.layer_costs(xs, [t.to(xs[0]) for t in teachers], **options),
        {"N, M": (n, m), "B, S, D": (B, S, D), "scale": scale, "near": near, **described(options)},
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
        if near and H == ht:
            leaves = [teachers[i % m] + 1e-3 * draw.normal(B, H, S, S) for i in range(n)]
        if draw.maybe():
            hidden = draw.normal(B, 1, 1, S) > 0.5
            teachers, leaves = ([x - 1e4 * hidden for x in xs] for xs in (teachers, leaves))
    else:
        teachers = [draw.normal(B, ht, S, dt) for _ in range(2 * m)]
        leaves = [draw.normal(B, h, S, ds) for _ in range(n) for h in (H, H // grouped)]
        if near and H == ht and grouped == 1:
            leaves = [x + 1e-3 * draw.normal(*x.shape) for _ in range(n) for x in teachers[:2]]
    options = {"mask": draw.mask(B, S), "causal": draw.maybe(0.3), "scale": draw.choice([None, None, 1.0]), "heads": heads}
    arranged = (lambda xs: list(xs)) if scores else (lambda xs: list(zip(xs[::2], xs[1::2], strict=True)))
    sides = lambda xs: (arranged(xs), arranged([t.to(xs[0]) for t in teachers]))  # noqa: E731
    return Case(
        leaves,
        lambda backend, *xs: functional.attention_costs(*sides(xs), **options, backend=backend),
        lambda *xs: relations.attention_costs(*sides(xs), **options),
        {"N, M": (n, m), "B, H, S": (B, H, S), "ds, dt": (ds, dt), "scores": scores, "near": near, **described(options)},
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
        assert (reduced >= -size).all() and abs(float((a * plan.u).sum() + (b * plan.v).sum() - plan.value.detach())) <= 4 * size
        return plan.value

    return Case(leaves, call, lambda cost: losses.transport(cost, a, b)[0], {"N, M": (n, m)})


def info_nce(draw):
    B, K, D = draw.choice([1, 3, 5, 17]), draw.size(129), draw.size(65)
    gathered, in_batch = draw.maybe(0.4), draw.maybe(0.2)
    unit = lambda x: x / x.norm(dim=-1, keepdim=True).clamp_min(1e-3)  # noqa: E731
    positive = unit(draw.normal(B, D))
    query = unit(positive + draw.choice([0.01, 0.5, 3.0]) * unit(draw.normal(B, D)))
    bank = None if in_batch else unit(draw.normal(K, D))
    index = draw.whole(K, B, draw.size(33)) if gathered and not in_batch else None
    ids = draw.whole(7, B)
    exclude = (ids, ids if in_batch else draw.whole(7, K)) if draw.maybe(0.4) else None
    scale = draw.normal(K).abs() + 0.5 if draw.maybe(0.2) and not in_batch else None
    temperature, reduction = torch.tensor(draw.choice([0.07, 0.07, 0.02, 1.0])), draw.choice(REDUCTIONS)
    leaves = [query, positive, temperature] + ([bank] if draw.maybe(0.3) and index is scale is None and not in_batch else [])

    def arguments(q, p, T, b=None):
        own = b if b is not None else None if bank is None else bank.to(q)
        return (q, p, own, index), {"temperature": T, "exclude": exclude, "scale": None if scale is None else scale.to(q)}

    def call(backend, *xs):
        args, options = arguments(*xs)
        return functional.info_nce_loss(*args, **options, reduction=reduction, backend=backend)

    def oracle(*xs):
        args, options = arguments(*xs)
        rows = contrast.info_nce(*args, **options)
        return oracles.reduced(rows, seen(None, rows.shape), reduction)

    note = {"B, K, D": (B, K, D), "index": None if index is None else tuple(index.shape), "in_batch": in_batch}
    return Case(leaves, call, oracle, note | {"exclude": exclude is not None, "scale": scale is not None, "T": temperature})


def nce(draw):
    B, n_data, D, K = draw.choice([1, 3, 17]), draw.size(129, least=2), draw.size(65), draw.size(65)
    bank = draw.normal(n_data, D)
    bank = bank / bank.norm(dim=1, keepdim=True)
    index = draw.whole(n_data, B, K + 1)
    query = bank[index[:, 0]] + draw.choice([0.01, 0.5, 3.0]) * draw.normal(B, D)
    query = query / query.norm(dim=1, keepdim=True)
    scale = draw.normal(n_data).abs() + 0.5 if draw.maybe(0.2) else None
    options = {"n_data": n_data, "temperature": draw.choice([0.07, 0.1, 1.0]), "z": draw.choice([1.0, 50.0, 1e6])}
    reduction = draw.choice(REDUCTIONS)
    of = lambda q: options | {"scale": None if scale is None else scale.to(q)}  # noqa: E731
    return Case(
        [query],
        lambda backend, q: functional.nce_loss(q, bank.to(q), index, **of(q), reduction=reduction, backend=backend),
        lambda q: oracles.reduced(contrast.nce(q, bank.to(q), index, **of(q)), seen(None, (B,)), reduction),
        {"B, K, D": (B, K, D), **options, "scale": scale is not None, "reduction": reduction},
    )


def described(options):
    return {name: f"{x.dtype} {tuple(x.shape)}" if isinstance(x, torch.Tensor) else x for name, x in options.items()}
