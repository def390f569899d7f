"""Random cases of every op: what to call, and the oracle for it. A case follows from its op and number alone."""

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch

import oracles
from fastkd import TopK, functional
from oracles import contrast, probabilities

SIZES = (1, 2, 3, 4, 5, 7, 8, 13, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 257, 513, 1025)
REDUCTIONS = ("mean", "sum", "none")


@dataclass
class Case:
    """call(backend, *leaves, *teachers) and oracle(*leaves, *teachers), all in one dtype; what else they take is in them."""

    leaves: list
    call: Callable
    oracle: Callable
    note: dict
    absolute: float = 0.0  # allowed of the value, beside the relative error
    floor: float = 1e-10  # times the upstream: what is smaller is not compared
    share: float = 1.25  # of eager's error, which is allowed where it is more
    strict: bool = False  # whether eager's error is no excuse
    compared: list | None = None  # per leaf, which entries of its gradient are compared; None: all
    teachers: tuple = ()  # without a gradient; in `call` and `oracle` instead where no rounding of theirs can matter


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
        """Student, teacher, and how they lie: independent, of other scales, near each other, equal, with an offset."""
        scale = self.choice([0.01, 1.0, 1.0, 3.0, 10.0])
        teacher = self.normal(*shape, scale=scale)
        how = self.choice(
            ["independent", "independent", "flat student", "flat teacher", "near", "near", "equal", "offset", "spikes"]
        )
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


def described(options):
    return {name: f"{x.dtype} {tuple(x.shape)}" if isinstance(x, torch.Tensor) else x for name, x in options.items()}


def seen(mask, shape):
    return torch.ones(shape, dtype=torch.bool) if mask is None else mask.bool().expand(shape)


def logits_options(draw, kinds=probabilities.KINDS):
    kind = draw.choice(kinds)
    options = {
        "kind": kind,
        "temperature": draw.choice([1.0, 1.0, 0.1, 0.5, 2.0, 4.0, 15.0]),
        "t_squared": draw.maybe(0.7),
    }
    beta, alpha = draw.choice([0.5, 0.1, 0.9, 1e-3, 0.999]), draw.choice([0.1, 0.0, 1e-3, 1e-6, 0.5, 0.999])
    return options | {"beta": beta, "alpha": alpha}


def floor_of(options):
    """tvd's slopes are -1/2 and 1/2, whose mean is known as well as the probabilities."""
    of_logits = options["temperature"] ** (1 if options["t_squared"] else -1)
    return 1e-6 * of_logits if options["kind"] == "tvd" else 1e-10 * max(1.0, 1 / options["temperature"])


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
        floor=floor_of(options),
        strict=how.split()[0] == "near"
        and how.split()[1] in ("0.01", "1.0")
        and options["temperature"] >= 0.5
        and mixed,
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
    if bool((log_probs.float().double().exp().sum(-1) >= 1).any()) and options["kind"] == "reverse_kl":
        tail = "given"  # rounded, the k tokens leave nothing over: the divergence is infinite
    left = log_p.scatter(-1, indices, -torch.inf).logsumexp(-1).float() if tail == "given" else tail == "true" or None
    log_probs = log_probs.float()
    jumps = options["kind"] == "tvd" and how.split()[0] in ("near", "equal", "offset")
    sparse = lambda s: (indices, log_probs.to(s), left.to(s) if isinstance(left, torch.Tensor) else left)  # noqa: E731
    return Case(
        [student],
        lambda backend, s: functional.divergence(s, TopK(*sparse(s)), **options, **rows, backend=backend),
        lambda s: oracles.reduced(probabilities.sparse_divergence(s, *sparse(s), **options), valid, rows["reduction"]),
        {"how": how, "shape": tuple(student.shape), "k": k, "tail": tail, **options, **described(rows)},
        floor=10 * floor_of(options),
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
    extra |= {"vocab": kept, "recompute_logits": draw.choice([False, True])}

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
    note = {
        "rows": shape,
        "V, Ds, Dt": (vocab, ds, dt),
        "scale": scale,
        "near": near,
        **options,
        **described(rows | extra),
    }
    none = [torch.zeros_like(x, dtype=torch.bool) for x in leaves]
    return Case(leaves, call, oracle, note, floor=floor_of(options), compared=none if jumps else None)


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
    leaves = [query, positive, temperature] + (
        [bank] if draw.maybe(0.3) and index is scale is None and not in_batch else []
    )

    def arguments(q, p, T, b=None):
        own = b if b is not None else None if bank is None else bank.to(q)
        return (q, p, own, index), {
            "temperature": T,
            "exclude": exclude,
            "scale": None if scale is None else scale.to(q),
        }

    def call(backend, *xs):
        args, options = arguments(*xs)
        return functional.info_nce_loss(*args, **options, reduction=reduction, backend=backend)

    def oracle(*xs):
        args, options = arguments(*xs)
        rows = contrast.info_nce(*args, **options)
        return oracles.reduced(rows, seen(None, rows.shape), reduction)

    note = {"B, K, D": (B, K, D), "index": None if index is None else tuple(index.shape), "in_batch": in_batch}
    note |= {"exclude": exclude is not None, "scale": scale is not None, "T": float(temperature)}
    return Case(leaves, call, oracle, note, share=2.0)  # 1 / T is rounded, once for all scores; eager divides


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
