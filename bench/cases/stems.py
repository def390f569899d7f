"""What is measured, stem by stem, and the fewest FLOPs and bytes of each case beside it.

A new stem is one function that yields `Case`s, under `@stem("name")`. The floors count work that nobody can avoid:
every input read once, every result written once, `both` without a recompute; `backward` alone re-reads its inputs.
"""

from collections.abc import Iterator

import torch
from fastkd.bench.cases.case import Case, Gemm, Inputs, Work, functional, normal, stem
from fastkd.bench.cases.contrast import (  # noqa: F401  (others say stems.x)
    batch_case,
    contrast_cases,
    gather_case,
    queue_case,
    step_case,
)

# divergence -------------------------------------------------------------------------------------------------------

KINDS = ("forward_kl", "reverse_kl", "skew_kl", "jsd", "tvd", "soft_ce", "mse")


def make_logits(case: Case, generator) -> dict:
    rows, vocabulary = case.shape["N"], case.shape["V"]
    teacher = normal(rows, vocabulary, generator=generator, scale=2.0)
    return {"student": teacher + normal(rows, vocabulary, generator=generator), "teacher": teacher}


def make_top_k(case: Case, generator) -> dict:
    """A peaked teacher, as language models are: without a tail, a flat one's rows are a sum that cancels."""
    full = {name: 3.0 * logits for name, logits in make_logits(case, generator).items()}
    log_probs, indices = torch.log_softmax(full["teacher"] / case.options["temperature"], -1).topk(case.shape["K"])
    return {"student": full["student"], "indices": indices, "log_probs": log_probs}


def ours_divergence(inputs: Inputs, backend: str) -> torch.Tensor:
    return functional().divergence(inputs["student"], inputs["teacher"], backend=backend, **inputs.options)


def ours_top_k(inputs: Inputs, backend: str) -> torch.Tensor:
    public, options = functional(), dict(inputs.options)
    teacher = public.TopK(inputs["indices"], inputs["log_probs"], tail=options.pop("tail"))
    return public.divergence(inputs["student"], teacher, backend=backend, **options)


def divergence_case(kind: str, rows: int, vocabulary: int, dtype: torch.dtype, **more) -> Case:
    elements, width = rows * vocabulary, dtype.itemsize
    return Case(
        "divergence", kind, {"N": rows, "V": vocabulary}, dtype, make_logits, ours_divergence, ("student",),
        flops=Work(8.0 * elements, 6.0 * elements, 12.0 * elements),
        bytes=Work(2.0 * elements * width, 3.0 * elements * width, 3.0 * elements * width),
        options={"kind": kind, "temperature": 2.0}, **more,
    )  # fmt: skip


def top_k_case(rows: int, vocabulary: int, k: int, dtype: torch.dtype, tail: bool | None, **more) -> Case:
    elements, width = rows * vocabulary, dtype.itemsize
    return Case(
        "divergence", "top_k_tail" if tail else "top_k", {"N": rows, "V": vocabulary, "K": k}, dtype,
        make_top_k, ours_top_k, ("student",),
        flops=Work(4.0 * elements, 3.0 * elements, 6.0 * elements),
        bytes=Work(elements * width + rows * k * 12.0, 2.0 * elements * width, 2.0 * elements * width),
        options={"kind": "forward_kl", "temperature": 2.0, "tail": tail}, keep=("log_probs",), **more,
    )  # fmt: skip


@stem("divergence")
def divergence_cases() -> Iterator[Case]:
    fp32, bf16 = torch.float32, torch.bfloat16
    for kind in KINDS:
        goal = "7x eager, 2.5x compile" if kind == "forward_kl" else "3x eager"
        yield divergence_case(kind, 512, 30522, fp32, quick=kind in ("forward_kl", "jsd"), goal=goal)
    yield divergence_case("forward_kl", 512, 30522, bf16)
    for rows, vocabulary in ((32, 3), (8, 1000), (64, 4096), (16, 30522)):
        yield divergence_case("forward_kl", rows, vocabulary, fp32, quick=rows == 64)
    for vocabulary in (1024, 4096, 16384, 65536, 262144):
        yield divergence_case("forward_kl", 256, vocabulary, fp32, sweep="V")
    yield top_k_case(512, 30522, 64, fp32, None)
    yield top_k_case(512, 30522, 64, fp32, True)


# gram (FCD) -------------------------------------------------------------------------------------------------------


def make_states(case: Case, generator) -> dict:
    batch, length = case.shape["B"], case.shape["N"]
    return {
        "student": normal(batch, length, case.shape["Ds"], generator=generator),
        "teacher": normal(batch, length, case.shape["Dt"], generator=generator),
    }


def ours_gram(inputs: Inputs, backend: str) -> torch.Tensor:
    grouping, sides = inputs.options["grouping"], (inputs["student"], inputs["teacher"])
    level = "token" if grouping is None else {"token": 1.0, "sequence": 1.0}
    return functional().gram_correlation_loss(*sides, level=level, grouping=grouping or "position", backend=backend)


def gram_work(groups: int, rows: int, ds: int, dt: int) -> tuple[float, float]:
    """FLOPs forward and backward: symmetric products of rows, their mixture @ [rows, ds]; or of features, if that is less."""
    fewest = min(rows, ds + dt)
    return groups * rows * fewest * (ds + dt), groups * rows * fewest * 2.0 * ds


def gram_case(kind: str, batch: int, length: int, ds: int, dt: int, dtype: torch.dtype, **more) -> Case:
    works = [gram_work(batch, length, ds, dt)] + ([] if kind == "token" else [gram_work(length, batch, ds, dt)])
    forward, backward = (sum(work[k] for work in works) for k in (0, 1))
    width, both_sides = dtype.itemsize, batch * length * (ds + dt)
    shapes = [(length, batch)] + ([] if kind == "token" else [(batch, length)])
    gemms = []
    for rows, groups in shapes:
        gemms += [Gemm(rows, ds, rows, groups), Gemm(rows, dt, rows, groups)]
        gemms += [Gemm(rows, rows, ds, groups, ("backward", "both"))]
    return Case(
        "gram", kind, {"B": batch, "N": length, "Ds": ds, "Dt": dt}, dtype, make_states, ours_gram, ("student",),
        flops=Work(forward, forward + backward, forward + backward),
        bytes=Work(both_sides * width, (both_sides + batch * length * ds) * width,
                   (both_sides + batch * length * ds) * width),
        gemms=tuple(gemms), options={"grouping": {"token": None, "fcd": "position", "fcd_official": "official"}[kind]},
        **more,
    )  # fmt: skip


@stem("gram")
def gram_cases() -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        quick = dtype == torch.float32
        goal = "3.2x eager, 2.2x compile, 1.0x of the six bmm" if quick else "7x eager, 3.5x compile"
        yield gram_case("fcd", 32, 128, 384, 768, dtype, quick=quick, goal=goal)
        yield gram_case("fcd_official", 32, 128, 384, 768, dtype)
        yield gram_case("fcd", 16, 512, 768, 1024, dtype)
    yield gram_case("fcd", 4, 32, 384, 768, torch.float32)
    for length in (128, 512, 2048, 4096):
        yield gram_case("token", 2, length, 384, 768, torch.float32, sweep="N")


# relation (MiniLM, MiniLMv2) --------------------------------------------------------------------------------------


def make_relations(case: Case, generator) -> dict:
    size = [case.shape[axis] for axis in "BHLd"]
    count = case.shape["R"]
    return {side: [normal(*size, generator=generator) for _ in range(count)] for side in ("student", "teacher")}


def ours_relation(inputs: Inputs, backend: str) -> torch.Tensor:
    return functional().relation_kl_loss(inputs["student"], inputs["teacher"], backend=backend)


def relation_case(batch: int, heads: int, length: int, d: int, count: int, dtype: torch.dtype, **more) -> Case:
    """Two score tiles forward (symmetric, so half of each), and dS @ X backward."""
    scores, width = count * batch * heads * length * length, dtype.itemsize
    states = count * batch * heads * length * d
    gemm, both = Gemm(length, d, length, 2 * count * batch * heads), ("backward", "both")
    return Case(
        "relation", "self", {"B": batch, "H": heads, "L": length, "d": d, "R": count}, dtype,
        make_relations, ours_relation, ("student",),
        flops=Work(2.0 * scores * d, 4.0 * scores * d, 4.0 * scores * d),
        bytes=Work(2.0 * states * width, 3.0 * states * width, 3.0 * states * width),
        gemms=(gemm, Gemm(length, length, d, count * batch * heads, both)), **more,
    )  # fmt: skip


@stem("relation")
def relation_cases() -> Iterator[Case]:
    fp32 = torch.float32
    yield relation_case(8, 12, 256, 64, 3, fp32, goal="4x eager at a tenth of its extra memory")
    yield relation_case(8, 12, 256, 64, 3, torch.bfloat16)
    yield relation_case(2, 12, 64, 64, 3, fp32, quick=True)
    for length in (128, 512, 2048):
        yield relation_case(1, 12, length, 64, 1, fp32, sweep="L")


# layer_cost (BERT-EMD, TinyBERT, PKD) -----------------------------------------------------------------------------


def sparse_flow(rows: int, columns: int) -> torch.Tensor:
    """A vertex of the uniform transport problem (north-west corner): at most N + M - 1 entries are not zero."""
    flow, supply, demand = torch.zeros(rows, columns), [1.0 / rows] * rows, [1.0 / columns] * columns
    i = j = 0
    while i < rows and j < columns:
        amount = min(supply[i], demand[j])
        flow[i, j] = amount
        supply[i] -= amount
        demand[j] -= amount
        i, j = (i + 1, j) if supply[i] <= demand[j] else (i, j + 1)
    return flow  # [N, M]


def make_layers(case: Case, generator) -> dict:
    shape = case.shape
    size = [shape["B"], shape["S"], shape["D"]]
    sides = {side: [normal(*size, generator=generator) for _ in range(shape[axis])]
             for side, axis in (("students", "N"), ("teachers", "M"))}  # fmt: skip
    return {**sides, "flow": sparse_flow(shape["N"], shape["M"])}


def make_heads(case: Case, generator) -> dict:
    shape = case.shape
    size = [shape[axis] for axis in "BHSd"]
    parts = {f"{side}_{part}": [normal(*size, generator=generator) for _ in range(shape[axis])]
             for side, axis in (("student", "N"), ("teacher", "M")) for part in ("q", "k")}  # fmt: skip
    return {**parts, "flow": sparse_flow(shape["N"], shape["M"])}


def ours_layers(inputs: Inputs, backend: str) -> torch.Tensor:
    costs = functional().layer_costs(inputs["students"], inputs["teachers"], backend=backend)
    return (costs * inputs["flow"]).sum()


def ours_heads(inputs: Inputs, backend: str) -> torch.Tensor:
    sides = [list(zip(inputs[f"{s}_q"], inputs[f"{s}_k"], strict=True)) for s in ("student", "teacher")]
    return (functional().attention_costs(*sides, backend=backend) * inputs["flow"]).sum()


def layer_case(n: int, m: int, batch: int, length: int, d: int, dtype: torch.dtype, **more) -> Case:
    """Forward reads every layer once; backward reads them again (at most N + M - 1 flows) and writes N gradients."""
    layer = batch * length * d
    pairs, moved = 3.0 * n * m * layer, layer * dtype.itemsize
    return Case(
        "layer_cost", "hidden", {"N": n, "M": m, "B": batch, "S": length, "D": d}, dtype, make_layers, ours_layers,
        ("students",), flops=Work(pairs, 2.0 * (n + m) * layer, pairs + 2.0 * (n + m) * layer),
        bytes=Work((n + m) * moved, (2 * n + m) * moved, (2 * n + m) * moved), keep=("flow",), **more,
    )  # fmt: skip


def attention_work(n: int, m: int, length: int, d: int) -> Work:
    """FLOPs of one head, the cheaper way: every layer's scores [S, S]; or, as <Q K^T, R L^T> = <Q^T R, K^T L>, products
    [d, d] of queries and of keys, half of one with itself. At most N + M - 1 flows pull at a student."""
    scores, features, flows = 2.0 * length * length * d, 2.0 * length * d * d, n + m - 1
    of_scores, pulls_of_scores = (n + m) * scores, 2 * n * scores
    of_features, pulls = (n + m + 2 * n * m) * features, 2 * (n + flows) * features
    pulls_alone = (n + 2 * flows) * features + pulls
    return Work(
        min(of_scores, of_features),
        min(of_scores + pulls_of_scores, pulls_alone),
        min(of_scores + min(pulls_of_scores, pulls_alone), of_features + pulls),
    )


def attention_case(n: int, m: int, batch: int, heads: int, length: int, d: int, dtype: torch.dtype, **more) -> Case:
    states, one = batch * heads * length * d, attention_work(n, m, length, d)
    work = [batch * heads * flops for flops in (one.forward, one.backward, one.both)]
    moved = 2.0 * states * dtype.itemsize
    gemms = (Gemm(length, d, length, (n + m) * batch * heads),
             Gemm(length, length, d, 2 * n * batch * heads, ("backward", "both")))  # fmt: skip
    return Case(
        "layer_cost", "attention", {"N": n, "M": m, "B": batch, "H": heads, "S": length, "d": d}, dtype,
        make_heads, ours_heads, ("student_q", "student_k"), flops=Work(*work),
        bytes=Work((n + m) * moved, (2 * n + m) * moved, (2 * n + m) * moved), gemms=gemms, keep=("flow",), **more,
    )  # fmt: skip


@stem("layer_cost")
def layer_cost_cases() -> Iterator[Case]:
    fp32 = torch.float32
    yield layer_case(6, 12, 32, 128, 768, fp32, goal="10x the authors' loop, 2.2x compile, 2.75x of one read")
    yield layer_case(6, 12, 32, 128, 768, torch.bfloat16)
    yield layer_case(4, 12, 8, 64, 312, fp32, quick=True)
    yield attention_case(6, 12, 8, 12, 128, 64, fp32)
    for layers in (6, 12, 24, 48):
        yield layer_case(layers, layers, 8, 128, 256, fp32, sweep="N")


# transport (BERT-EMD) ---------------------------------------------------------------------------------------------


def make_problems(case: Case, generator) -> dict:
    count, n, m = (case.shape[axis] for axis in "PNM")
    marginals = [torch.rand(count, size, generator=generator) + 0.1 for size in (n, m)]
    a, b = (mass / mass.sum(-1, keepdim=True) for mass in (x.double() for x in marginals))
    return {"cost": torch.rand(count, n, m, generator=generator), "a": a, "b": b}


def ours_transport(inputs: Inputs, backend: str) -> torch.Tensor:
    return functional().transport(inputs["cost"], inputs["a"], inputs["b"], backend=backend).value.sum()


def transport_case(count: int, n: int, m: int, **more) -> Case:
    """Every cost is priced at least once; the pivots on top depend on the numbers, so the floor is far away."""
    entries = count * n * m
    return Case(
        "transport", "exact", {"P": count, "N": n, "M": m}, torch.float64, make_problems, ours_transport, ("cost",),
        flops=Work(2.0 * entries, entries, 3.0 * entries), bytes=Work(16.0 * entries, 16.0 * entries, 24.0 * entries),
        modes=("forward",), **more,
    )  # fmt: skip


@stem("transport")
def transport_cases() -> Iterator[Case]:
    yield transport_case(384, 12, 24, goal="10x a Python loop over ot.emd")
    yield transport_case(64, 4, 12, quick=True)
    yield transport_case(1, 4, 12)
    yield transport_case(32, 48, 48)


# contrast (CoDIR, InfoNCE): bench/cases/contrast.py -----------------------------------------------------------------

stem("contrast")(contrast_cases)


# linear_divergence (GLMD) -----------------------------------------------------------------------------------------


def make_hidden(case: Case, generator) -> dict:
    rows, vocabulary, ds, dt = (case.shape[axis] for axis in ("R", "V", "Ds", "Dt"))
    return {
        "student_hidden": normal(rows, ds, generator=generator),
        "student_head": normal(vocabulary, ds, generator=generator, scale=2.0 * ds**-0.5),
        "teacher_hidden": normal(rows, dt, generator=generator),
        "teacher_head": normal(vocabulary, dt, generator=generator, scale=2.0 * dt**-0.5),
    }


HIDDEN = ("student_hidden", "student_head", "teacher_hidden", "teacher_head")


def ours_linear(inputs: Inputs, backend: str) -> torch.Tensor:
    return functional().linear_divergence(*(inputs[name] for name in HIDDEN), backend=backend, **inputs.options)


def linear_case(kind: str, rows: int, vocabulary: int, ds: int, dt: int, dtype: torch.dtype, **more) -> Case:
    """Two products forward, two backward (gradient formed in the forward: no recompute); no logits in memory."""
    unit_flops, width = 2.0 * rows * vocabulary, dtype.itemsize
    read = (rows + vocabulary) * (ds + dt) * width
    written = (rows + vocabulary) * ds * width
    back = ("backward", "both")
    gemms = (Gemm(rows, ds, vocabulary), Gemm(rows, dt, vocabulary),
             Gemm(rows, vocabulary, ds, 1, back), Gemm(vocabulary, rows, ds, 1, back))  # fmt: skip
    return Case(
        "linear_divergence", kind, {"R": rows, "V": vocabulary, "Ds": ds, "Dt": dt}, dtype, make_hidden, ours_linear,
        HIDDEN[:2], flops=Work(unit_flops * (ds + dt), unit_flops * 2 * ds, unit_flops * (3 * ds + dt)),
        bytes=Work(read, read + written, read + written), gemms=gemms, options={"kind": kind, "temperature": 2.0},
        **more,
    )  # fmt: skip


@stem("linear_divergence")
def linear_divergence_cases() -> Iterator[Case]:
    fp32, bf16 = torch.float32, torch.bfloat16
    yield linear_case("forward_kl", 1024, 32000, 768, 1024, bf16, goal="3x eager, 1.7x compile, 1.25x of the GEMMs")
    yield linear_case("forward_kl", 1024, 32000, 768, 1024, fp32, goal="1.8x eager, 1.2x compile, 1.15x of the GEMMs")
    yield linear_case("jsd", 1024, 32000, 768, 1024, bf16)
    yield linear_case("forward_kl", 64, 4096, 256, 384, fp32, quick=True)
    for rows in (128, 512, 2048):
        yield linear_case("forward_kl", rows, 15360, 312, 768, bf16, sweep="R")
