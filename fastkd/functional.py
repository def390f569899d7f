"""The public functions, one per hot path: check once, let the op choose its implementation, reduce. One file, although a long
one, so that the whole surface is read in one place.

Everywhere: a mask has 1 where something counts; student and teacher dtypes may differ; losses come back in float32
(float64 for float64 inputs), gradients in the student's dtype; no gradient flows to the teacher.
reduction="mean" is over what counts. backend="auto" takes the fastest implementation that runs here; see `fastkd doctor`.
"""

import torch
from torch import Tensor

from fastkd import checks, reduce
from fastkd.ops import contrast, gram, layer_cost, relation
from fastkd.ops import divergence as divergence_op
from fastkd.ops import linear_divergence as linear_divergence_op
from fastkd.ops import transport as transport_op
from fastkd.ops.divergence import TopK
from fastkd.ops.transport import CostAttention, TransportPlan

__all__ = [
    "CostAttention",
    "TopK",
    "TransportPlan",
    "attention_costs",
    "divergence",
    "gram_correlation_loss",
    "info_nce_loss",
    "layer_costs",
    "linear_divergence",
    "nce_loss",
    "nce_pair_loss",
    "nce_partition",
    "relation_kl_loss",
    "sample_negatives",
    "transport",
    "transport_with_cost_attention",
    "unit_linear",
    "update_bank",
]


def gram_correlation_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    level: str = "token",
    grouping: str = "position",
    pearson: str = "matrix",
    normalize: bool = True,
    mask: Tensor | None = None,
    eps: float = 1e-6,
    process_group=None,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """1 - Pearson correlation of the student's and the teacher's self-similarities (FCD). [B, N, Ds], [B, N, Dt].

    level="token": one N x N matrix per sequence; "sequence": one B x B matrix per position (with `process_group`, B is
    the batch of all ranks). pearson="row" correlates row by row (DIST) instead of whole matrices. grouping="official"
    groups the sequence level as the released code does. With a mask only valid pairs count, and a group of fewer than
    2 (token) or 3 (sequence) valid rows leaves the mean.
    """
    checks.tensor("student", student, "[B, N, D]")
    checks.tensor("teacher", teacher, "[B, N, D]")
    checks.same_leading("student", student, "teacher", teacher, 2)
    checks.same_device(student=student, teacher=teacher, mask=mask)
    checks.frozen("teacher", teacher)
    checks.mask("mask", mask, student.shape[:2], "[B, N]")
    checks.one_of("level", level, ("token", "sequence"))
    checks.one_of("grouping", grouping, ("position", "official"))
    checks.one_of("pearson", pearson, ("matrix", "row"))
    checks.one_of("reduction", reduction, reduce.REDUCTIONS)
    checks.positive("eps", eps)
    mask = reduce.as_bool(mask)
    if grouping == "official" and mask is not None:
        checks.values(
            "mask", mask, mask.all, "grouping='official' has no defined meaning under a mask that hides tokens"
        )
    if level == "sequence":
        student, teacher, mask = (reduce.gather_rows(x, process_group) for x in (student, teacher, mask))
    values, valid = gram.gram(student, teacher, mask, level, grouping, pearson, normalize, float(eps), backend)
    return reduce.reduce(values, valid, reduction)


def relation_kl_loss(
    student: list,
    teacher: list,
    *,
    heads: int | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    temperature: float | None = None,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """KL(teacher || student) of softmaxed self-relations (MiniLM, MiniLMv2), summed over the relations.

    Each relation is x [B, H, L, d] (with itself: Q·Qᵀ) or a pair (x, y) (Q·Kᵀ); `heads` re-splits H·d into a common
    number of heads; temperature None divides by sqrt(d). "mean" is over heads and valid query rows of each relation.
    """
    checks.layers("student", student)
    checks.layers("teacher", teacher)
    checks.same_length("student", student, "teacher", teacher)
    checks.one_of("reduction", reduction, reduce.REDUCTIONS)
    if temperature is not None:
        checks.positive("temperature", temperature)
    mask = reduce.as_bool(mask)
    total = []
    for i, (s, t) in enumerate(zip(student, teacher, strict=True)):
        rows = _relation_rows(f"[{i}]", s, t, heads, mask, causal, temperature, backend)  # [B, H, L]
        counted = None if mask is None else mask[:, None, :].expand_as(rows)
        total.append(reduce.reduce(rows, counted, reduction))
    if reduction == "none":
        for i, rows in enumerate(total):
            checks.same_shape(f"student[{i}]", rows, "student[0]", total[0], "pass heads= to split all relations alike")
        return torch.stack(total)  # [R, B, H, L]
    return sum(total)


def _relation_rows(where, student, teacher, heads, mask, causal, temperature, backend):
    sides = []
    for name, x in (("student", student), ("teacher", teacher)):
        pair = x if isinstance(x, (tuple, list)) else (x, x)
        if len(pair) != 2:
            raise ValueError(f"{name}{where}: expected a tensor or a pair (x, y), got {checks.describe(x)}")
        for part in pair:
            checks.tensor(name + where, part, "[B, H, L, d]")
        checks.same_shape(name + where + "[0]", pair[0], name + where + "[1]", pair[1])
        checks.mask("mask", mask, (pair[0].shape[0], pair[0].shape[2]), "[B, L]")
        first = relation.resplit(name + where, pair[0], heads)
        sides.append((first, first if pair[0] is pair[1] else relation.resplit(name + where, pair[1], heads)))
    (xs, ys), (xt, yt) = sides
    checks.frozen("teacher" + where, xt, yt)
    checks.same_device(**{"student" + where: xs, "teacher" + where: xt, "mask": mask})
    if xs.shape[:3] != xt.shape[:3]:
        raise ValueError(
            f"student{where} and teacher{where} must agree in batch, heads and length, got {list(xs.shape)} and "
            f"{list(xt.shape)}; different head counts: pass heads= to split both alike"
        )
    scale_s, scale_t = (x.shape[-1] ** -0.5 if temperature is None else 1.0 / temperature for x in (xs, xt))
    return relation.relation(xs, ys, xt, yt, mask, bool(causal), scale_s, scale_t, backend)


def layer_costs(
    students: list[Tensor],
    teachers: list[Tensor],
    *,
    mask: Tensor | None = None,
    clamp: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """[N, M] mean squared differences between N student and M teacher layers [B, S, D], over the valid tokens.

    clamp: values <= clamp count as 0 on either side (BERT-EMD's rule for masked scores has clamp=-100).
    """
    checks.layers("students", students)
    checks.layers("teachers", teachers)
    first = students[0]
    for name, xs in (("students", students), ("teachers", teachers)):
        for i, x in enumerate(xs):
            checks.tensor(f"{name}[{i}]", x, "[B, S, ...]" if isinstance(x, Tensor) and x.dim() < 2 else "[...]")
            checks.same_shape(
                f"{name}[{i}]", x, "students[0]", first, "project the student to the teacher's width first"
            )
            checks.same_device(**{"students[0]": first, f"{name}[{i}]": x, "mask": mask})
    checks.frozen("teachers", *teachers)
    checks.mask("mask", mask, first.shape[:2], "[B, S]")
    return layer_cost.layer_cost(students, teachers, reduce.as_bool(mask), clamp, backend)


def attention_costs(
    students: list,
    teachers: list,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    heads: str | None = None,
    backend: str = "auto",
) -> Tensor:
    """[N, M] mean squared differences between pre-softmax attention scores, over all B·H·S·S entries.

    Layers are pairs (q, k) [B, H, S, d] (k may have fewer, grouped heads), scored q·kᵀ·scale with scale None = 1/sqrt(d),
    or materialised scores [B, H, S, S], whose values <= -100 count as 0. Masked keys (and with causal, later keys)
    contribute 0 and stay in the denominator. heads="mean" averages the heads' scores where their numbers differ.
    """
    checks.layers("students", students)
    checks.layers("teachers", teachers)
    if heads is not None:
        checks.one_of("heads", heads, ("mean",))
    if scale is not None:
        checks.positive("scale", scale)
    heads_of = {}
    for name, xs in (("students", students), ("teachers", teachers)):
        for i, x in enumerate(xs):
            query = checks.scores(f"{name}[{i}]", x, mask)
            heads_of[f"{name}[{i}]"] = query.shape[1]
            if name == "teachers":
                checks.frozen(f"{name}[{i}]", *(x if isinstance(x, (tuple, list)) else (x,)))
    if heads is None and len(set(heads_of.values())) > 1:
        (a, b) = next((a, b) for a in heads_of for b in heads_of if heads_of[a] != heads_of[b])
        raise ValueError(
            f"{a} has {heads_of[a]} heads and {b} has {heads_of[b]}; attention scores can only be compared head by head: "
            "pass heads='mean' to average the scores over the heads first"
        )
    return layer_cost.attention_cost(students, teachers, reduce.as_bool(mask), bool(causal), scale, heads, backend)


def transport(
    cost: Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    *,
    warm_start: TransportPlan | None = None,
    backend: str = "auto",
) -> TransportPlan:
    """Exact optimal transport, batched: min <flow, cost> with row sums a and column sums b (uniform when None).

    cost [..., N, M], a [..., N], b [..., M] -> TransportPlan(value [...], flow [..., N, M], u [..., N], v [..., M],
    status [...], 0 = optimal). Gradients: to the cost the flow, to the marginals the centred duals. warm_start is a hint.
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
        if x.shape[-1] != extent or x.dim() > cost.dim() - 1:
            raise ValueError(
                f"{name}: expected one mass per {axis[:-1]} of cost {list(cost.shape)}, got {list(x.shape)}"
            )
    a, b = a.expand(*lead, n), b.expand(*lead, m)
    plan = transport_op.transport(cost, a, b, warm_start, backend)
    checks.solved(plan.status, cost, a, b)
    return plan


def transport_with_cost_attention(
    cost: Tensor, a: Tensor, b: Tensor, attention: CostAttention | None = None, *, backend: str = "auto"
) -> tuple[TransportPlan, Tensor, Tensor]:
    """`transport` of P kinds of cost [P, N, M] between N and M layers, and in the same launch the weights that a [P, N] and
    b [P, M] move to (BERT-EMD): the cheaper a layer is to match, the heavier. `attention` says by which rule.
    """
    checks.tensor("cost", cost, "[P, N, M]")
    for name, x, shape in (("a", a, cost.shape[:2]), ("b", b, cost.shape[::2])):
        if x.shape != shape:
            raise ValueError(f"{name}: expected one weight per layer, {list(shape)}, got {list(x.shape)}")
    checks.same_device(cost=cost, a=a, b=b)
    plan, new_a, new_b = transport_op.transport_and_weights(cost, a, b, attention or CostAttention(), backend)
    checks.solved(plan.status, cost, a, b)
    return plan, new_a, new_b


def info_nce_loss(
    query: Tensor,
    positive: Tensor,
    bank: Tensor | None,
    index: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.07,
    exclude: tuple[Tensor, Tensor] | None = None,
    scale: Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """-log( e^<q,p>/T / (e^<q,p>/T + sum_k e^<q,n_k>/T) ): query and positive [B, D], negatives from the bank [K, D].

    All of the bank for every query, or per query the rows index [B, K]. bank None: the other positives of the batch,
    with gradients on both sides. exclude = (query_ids [B], bank_ids [K]) drops bank rows whose id equals the query's
    (in the batch: both are the examples' ids). scale [K] multiplies each bank row (fp8 banks). temperature may be
    learnable, and so may the bank.
    """
    if bank is None and not (index is None and scale is None):
        raise ValueError("bank: None means the batch's own positives, which take no index and no scale")
    tensors = (("query", query, "[B, D]"), ("positive", positive, "[B, D]"), ("bank", bank, "[K, D]"))
    for name, x, layout in tensors[: 2 if bank is None else 3]:
        checks.tensor(name, x, layout)
        if x.shape[-1] != query.shape[-1]:
            raise ValueError(f"{name}: expected the width of query, {query.shape[-1]}, got {checks.describe(x)}")
    checks.same_shape("positive", positive, "query", query)
    checks.same_device(query=query, positive=positive, bank=bank, index=index, scale=scale)
    checks.positive("temperature", temperature)
    checks.one_of("reduction", reduction, reduce.REDUCTIONS)
    if index is not None:
        checks.integers("index", index, "[B, K]")
        checks.same_leading("index", index, "query", query, 1)
        checks.indices_in_range("index", index, bank.shape[0], "rows of bank")
    if scale is not None:
        checks.mask("scale", scale, bank.shape[:1], "[K]")
    elif bank is not None and bank.dtype.itemsize == 1:
        raise ValueError(f"scale: rows in {bank.dtype} need one each, [K]; NegativeQueue(dtype=...) keeps them")
    if exclude is not None:
        if not isinstance(exclude, (tuple, list)) or len(exclude) != 2:
            raise ValueError(f"exclude: expected a pair (query_ids [B], bank_ids [K]), got {checks.describe(exclude)}")
        checks.mask("exclude[0]", exclude[0], query.shape[:1], "[B]")
        checks.mask("exclude[1]", exclude[1], (query if bank is None else bank).shape[:1], "[K]")
        if bank is None:
            same = lambda: (exclude[0] == exclude[1]).all()  # noqa: E731 (looked at only where a look is free)
            checks.values("exclude", exclude[0], same, "in the batch, both are the ids of the same examples")
    rows = contrast.info_nce(query, positive, bank, index, 1.0 / temperature, exclude, scale, backend)
    return reduce.reduce(rows, None, reduction)


def nce_loss(
    query: Tensor,
    bank: Tensor,
    index: Tensor,
    *,
    n_data: int,
    temperature: float,
    z: float | Tensor,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Noise-contrastive estimation as CRD and CoDIR release it: query [B, D] against bank[index], index [B, K + 1] with
    the positive in column 0. p = e^<q,n>/T / z, noise c = K / n_data; -log p0/(p0+c) - sum_k log c/(pk+c) per query."""
    checks.tensor("query", query, "[B, D]")
    checks.tensor("bank", bank, "[K, D]")
    checks.integers("index", index, "[B, K]")
    checks.same_leading("index", index, "query", query, 1)
    checks.same_device(query=query, bank=bank, index=index)
    if bank.shape[1] != query.shape[1]:
        raise ValueError(f"bank: expected the width of query, {query.shape[1]}, got {checks.describe(bank)}")
    if index.shape[1] < 2:
        raise ValueError(
            f"index: expected the positive and at least one negative per row, got {checks.describe(index)}"
        )
    checks.indices_in_range("index", index, bank.shape[0], "rows of bank")
    checks.positive("n_data", n_data)
    checks.positive("temperature", temperature)
    checks.positive("z", z)
    checks.one_of("reduction", reduction, reduce.REDUCTIONS)
    rows = contrast.nce(query, bank, index, n_data, float(temperature), z, backend)
    return reduce.reduce(rows, None, reduction)


def nce_pair_loss(
    queries: tuple[Tensor, Tensor],
    banks: tuple[Tensor, Tensor],
    index: Tensor,
    *,
    n_data: int,
    temperature: float,
    z: tuple[Tensor, Tensor],
    reduction: str = "mean",
    backend: str = "auto",
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """CoDIR's two anchors at once: half the sum of `nce_loss` of either query against its bank, the same index for both.

    z [] of either side is frozen where it is > 0, else set from this batch as `nce_partition` does; both come back.
    """
    checks.integers("index", index, "[B, K]")
    if index.shape[1] < 2:
        raise ValueError(
            f"index: expected the positive and at least one negative per row, got {checks.describe(index)}"
        )
    for side in (0, 1):
        query, bank, names = queries[side], banks[side], (f"queries[{side}]", f"banks[{side}]")
        checks.tensor(names[0], query, "[B, D]")
        checks.tensor(names[1], bank, "[K, D]")
        checks.same_leading("index", index, names[0], query, 1)
        checks.same_device(**{names[0]: query, names[1]: bank, "index": index, f"z[{side}]": z[side]})
        if bank.shape[1] != queries[0].shape[1] or query.shape[1] != queries[0].shape[1]:
            raise ValueError(f"{names[1]}: expected the width of queries[0], {queries[0].shape[1]}")
    checks.indices_in_range("index", index, min(len(bank) for bank in banks), "rows of both banks")
    checks.positive("n_data", n_data)
    checks.positive("temperature", temperature)
    checks.one_of("reduction", reduction, reduce.REDUCTIONS)
    rows, z = contrast.nce_pair(queries, banks, index, n_data, float(temperature), z, backend)
    return reduce.reduce(rows, None, reduction), z


def nce_partition(
    query: Tensor,
    bank: Tensor,
    index: Tensor,
    *,
    n_data: int,
    temperature: float,
    z: Tensor,
    backend: str = "auto",
) -> Tensor:
    """nce_loss's z as it is frozen after the first batch: `z` where it is > 0, else n_data · mean e^<q,n>/T of this
    batch (over its finite scores; 0 if there are none). Without a gradient and without a look at z."""
    checks.tensor("query", query, "[B, D]")
    checks.tensor("bank", bank, "[K, D]")
    checks.integers("index", index, "[B, K]")
    checks.same_leading("index", index, "query", query, 1)
    checks.same_device(query=query, bank=bank, index=index, z=z)
    checks.indices_in_range("index", index, bank.shape[0], "rows of bank")
    checks.positive("n_data", n_data)
    checks.positive("temperature", temperature)
    return contrast.partition(query, bank, index, n_data, float(temperature), z, backend)


def sample_negatives(
    index: Tensor,
    count: int,
    state: Tensor,
    *,
    n_data: int,
    labels: tuple[Tensor, Tensor, Tensor] | None = None,
    replacement: bool = False,
    window: int = 0,
    backend: str = "auto",
) -> Tensor:
    """[B, count] negatives for the examples index [B], drawn on the device, uniform over what has another label.

    labels = (classes 0..C-1 [n_data], ids sorted by class [n_data], where each class starts in them [C + 1]); None: all
    other examples, or with a window > 0 the 2 window nearest by. state int64 [2] is (seed, step): equal states give
    equal draws on every device. Where fewer than `count` ids remain they are drawn with replacement.
    """
    if not isinstance(window, int) or window < 0:
        raise ValueError(f"window: expected how many ids on either side, or 0 for all of them, got {window!r}")
    if window and labels is not None:
        raise ValueError("window: negatives are drawn by label or from a window, not both; leave one of them out")
    checks.integers("index", index, "[B]")
    checks.positive("count", count)
    checks.mask("state", state, (2,), "[2]")
    checks.integers("state", state, "[2]")
    checks.indices_in_range("index", index, n_data, "n_data examples")
    classes, order, bounds = (None, None, None) if labels is None else labels
    for name, x in (("labels[0]", classes), ("labels[1]", order)):
        checks.mask(name, x, (n_data,), "[n_data]")
    checks.same_device(index=index, state=state, classes=classes, order=order, bounds=bounds)
    return contrast.sample_negatives(index, count, n_data, classes, order, bounds, state, replacement, window, backend)


def unit_linear(x: Tensor, weight: Tensor, bias: Tensor, *, backend: str = "auto") -> Tensor:
    """x [B, S] by weight [D, S] and bias [D] onto the unit sphere, [B, D] in float32; a zero vector stays zero."""
    checks.tensor("x", x, "[B, S]")
    checks.same_device(x=x, weight=weight, bias=bias)
    if x.shape[1] != weight.shape[1]:
        raise ValueError(f"x: expected the width of weight, {weight.shape[1]}, got {checks.describe(x)}")
    return contrast.unit_linear(x, weight, bias, backend)


def update_bank(bank: Tensor, index: Tensor, rows: Tensor, *, momentum: float, backend: str = "auto") -> None:
    """bank[index] = normalise(momentum · bank[index] + (1 - momentum) · rows), in place. bank [K, D], index [B],
    rows [B, D]. Of equal ids the last counts, on every device; a row that is not finite is not written."""
    checks.tensor("bank", bank, "[K, D]")
    checks.tensor("rows", rows, "[B, D]")
    checks.integers("index", index, "[B]")
    checks.same_leading("rows", rows, "index", index, 1)
    checks.same_device(bank=bank, rows=rows, index=index)
    checks.indices_in_range("index", index, bank.shape[0], "rows of bank")
    if rows.shape[1] != bank.shape[1]:
        raise ValueError(f"rows: expected the width of bank, {bank.shape[1]}, got {checks.describe(rows)}")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum: must lie in [0, 1), got {momentum!r}")
    contrast.update_bank(bank, index, rows, float(momentum), backend)


def divergence(
    student_logits: Tensor,
    teacher: Tensor | TopK,
    *,
    kind: str = "forward_kl",
    temperature: float = 1.0,
    t_squared: bool = True,
    beta: float = 0.5,
    alpha: float = 0.1,
    mask: Tensor | None = None,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Row-wise divergence between softmax(student / T) = q and softmax(teacher / T) = p; logits [..., V].

    forward_kl KL(p||q) · reverse_kl KL(q||p) · skew_kl KL(p||alpha p + (1-alpha) q) · jsd with m = beta p + (1-beta) q ·
    tvd sum|p-q|/2 · soft_ce -sum p log q · mse sum (s-t)^2 on the raw logits. t_squared multiplies all but mse by T².
    A row counts where mask is 1 and its label is not ignore_index. teacher may be TopK(indices, log_probs, tail).
    """
    checks.tensor("student_logits", student_logits, "[..., V]")
    checks.divergence_options(kind, temperature, beta, alpha)
    checks.one_of("reduction", reduction, reduce.REDUCTIONS)
    shape, vocab = student_logits.shape[:-1], student_logits.shape[-1]
    if isinstance(teacher, TopK):
        checks.topk(teacher, student_logits, kind)
        teacher = teacher.flattened()
    else:
        checks.tensor("teacher", teacher, "[..., V]")
        hint = "a subset vocabulary: slice the teacher's columns; TopK(indices, log_probs) takes a sparse teacher"
        checks.same_shape("teacher", teacher, "student_logits", student_logits, hint)
        checks.same_device(student_logits=student_logits, teacher=teacher)
        checks.frozen("teacher", teacher)
        teacher = teacher.reshape(-1, vocab)  # [N, V]
    checks.same_device(student_logits=student_logits, mask=mask, labels=labels)
    counted = reduce.counted_rows(mask, labels, ignore_index, shape)
    flat = None if counted is None else counted.reshape(-1)
    args = (kind, float(temperature), float(beta), float(alpha))
    factor = float(temperature) ** 2 if t_squared and kind != "mse" else 1.0
    likely = (reduction == "mean", factor)
    rows = divergence_op.divergence(student_logits.reshape(-1, vocab), teacher, flat, *args, backend, likely)  # [N]
    if factor != 1.0:
        rows = rows * factor
    return reduce.reduce(rows.reshape(shape), counted, reduction)


def linear_divergence(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor | TopK,
    teacher_head: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    vocab=None,
    weights: Tensor | None = None,
    memory: str = "speed",
    kind: str = "forward_kl",
    temperature: float = 1.0,
    t_squared: bool = True,
    beta: float = 0.5,
    alpha: float = 0.1,
    mask: Tensor | None = None,
    num_valid: int | None = None,
    labels: Tensor | None = None,
    hard_weight: float = 0.0,
    ignore_index: int = -100,
    logit_scale: float | tuple[float, float] = 1.0,
    logit_softcap: float | tuple[float | None, float | None] | None = None,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """`divergence` between hidden @ head.T + bias of both sides. Hidden [..., D], heads [V, D], biases [V].

    In place of the teacher's hidden states a TopK may stand (no head is needed then). vocab (a VocabMap, or kept ids [Vs]):
    the student's vocabulary is that subset of the teacher's, in that order, and the teacher is renormalised over it.
    weights [...]: per row; "mean" is then sum(w row) / sum(w). hard_weight adds so much of the cross-entropy with `labels`.
    Logits are softcap · tanh(scale · x / softcap), one number for both sides or (student, teacher).
    memory: "speed" forms the gradient in the forward; "low" keeps eight numbers per row and makes the logits again; so
    does reduction="none". num_valid: how many rows count at most, if known; a GPU then leaves the others out of its
    products.
    """
    shape = student_hidden.shape[:-1]
    checks.tensor("student_hidden", student_hidden, "[..., D]")
    _check_side("student", student_hidden, student_head, student_bias)
    sparse = isinstance(teacher_hidden, TopK)
    if sparse:
        checks.topk(teacher_hidden, student_hidden, kind, size=student_head.shape[0])
        teacher = teacher_hidden.flattened()
    else:
        checks.tensor("teacher_hidden", teacher_hidden, "[..., D]")
        _check_side("teacher", teacher_hidden, teacher_head, teacher_bias)
        checks.same_leading("teacher_hidden", teacher_hidden, "student_hidden", student_hidden, len(shape))
        checks.frozen("teacher_hidden", teacher_hidden)
        checks.frozen("teacher_head", teacher_head, teacher_bias)
        checks.same_device(student_hidden=student_hidden, teacher_hidden=teacher_hidden, teacher_head=teacher_head,
                           teacher_bias=teacher_bias)  # fmt: skip
        teacher_head, teacher_bias = _kept_rows(vocab, teacher_head, teacher_bias)
        teacher = (teacher_hidden.reshape(-1, teacher_hidden.shape[-1]), teacher_head, teacher_bias)
        _check_vocabularies(student_head, teacher_head)
    checks.same_device(
        student_hidden=student_hidden, student_head=student_head, student_bias=student_bias, mask=mask, labels=labels,
        weights=weights,
    )  # fmt: skip
    checks.one_of("memory", memory, ("speed", "low"))
    checks.mask("weights", weights, shape, "[...]")
    checks.divergence_options(kind, temperature, beta, alpha)
    checks.one_of("reduction", reduction, reduce.REDUCTIONS)
    if hard_weight and labels is None:
        raise ValueError("hard_weight: a cross-entropy needs labels [...]; pass labels=")
    counted = reduce.counted_rows(mask, labels, ignore_index, shape)
    if num_valid is not None and not (isinstance(num_valid, int) and 0 <= num_valid <= student_hidden.numel()):
        raise ValueError(
            f"num_valid: expected how many rows of mask are 1, as an int, got {checks.describe(num_valid)}"
        )
    if num_valid is not None and counted is not None:
        checks.values(
            "num_valid", counted, lambda: counted.sum() <= num_valid, f"at most {num_valid} rows should count"
        )
    options = linear_divergence_op.Options(
        kind, float(temperature), float(beta), float(alpha),
        float(temperature) ** 2 if t_squared and kind != "mse" else 1.0, float(hard_weight),
        _both_sides("logit_scale", logit_scale, 1.0), _both_sides("logit_softcap", logit_softcap, 0.0),
    )  # fmt: skip
    rows = linear_divergence_op.linear_divergence(
        (student_hidden.reshape(-1, student_hidden.shape[-1]), student_head, student_bias), teacher,
        *(None if x is None else x.reshape(-1) for x in (counted, labels)), options, memory,
        reduce.row_weights(counted, reduction, weights, student_hidden), num_valid, backend,
    )  # [N], or their weighted sum []  # fmt: skip
    return rows if reduction != "none" else reduce.reduce(rows.reshape(shape), counted, reduction, weights)


def _check_side(side: str, hidden: Tensor, head: Tensor | None, bias: Tensor | None) -> None:
    checks.tensor(f"{side}_head", head, "[V, D]")
    if hidden.shape[-1] != head.shape[1]:
        raise ValueError(
            f"{side}_hidden {list(hidden.shape)} and {side}_head {list(head.shape)} must share their last axis; "
            "a head is [V, D], as nn.Linear.weight"
        )
    if bias is not None:
        checks.mask(f"{side}_bias", bias, head.shape[:1], "[V]")


def _check_vocabularies(student_head: Tensor, teacher_head: Tensor) -> None:
    ours, theirs = student_head.shape[0], teacher_head.shape[0]
    if ours != theirs:
        low, high = sorted((ours, theirs))
        raise ValueError(
            f"student_head has {ours} words and the teacher's {theirs}: ids {low} to {high - 1} are on one side only; if "
            f"the student's vocabulary is a subset, pass vocab=; if they are padding, slice both heads to [:{low}]"
        )


def _both_sides(name: str, x, none: float) -> tuple[float, float]:
    """(student's, teacher's); None is `none`."""
    pair = tuple(x) if isinstance(x, (tuple, list)) else (x, x)
    if len(pair) != 2:
        raise ValueError(f"{name}: expected a number, or (student, teacher), got {checks.describe(x)}")
    for part in pair:
        if part is not None:
            checks.positive(name, part)
    return tuple(none if part is None else float(part) for part in pair)


def _kept_rows(vocab, head: Tensor, bias: Tensor | None):
    if vocab is None:
        return head, bias
    if not isinstance(vocab, Tensor):
        return vocab.slice_head(head, bias)
    checks.integers("vocab", vocab, "[K]")
    checks.indices_in_range("vocab", vocab, head.shape[0], "rows of teacher_head")
    return head[vocab], None if bias is None else bias[vocab]
