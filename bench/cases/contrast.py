"""contrast's cases: a queue, in-batch negatives, gathered rows, and a whole step of CoDIR's loss.

A step moves bank rows. The batch's rows are where they move to already, so that every call of every provider finds the
state that the check saw.
"""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import torch
from fastkd.bench.cases.case import AFTER, BF16, FP32, Case, Gemm, Inputs, Work, normal, unit

from fastkd import functional
from fastkd.losses.crd import CRDLoss

SIZES = {"B": "examples", "K": "negatives", "D": "width"}
BANK = {**SIZES, "n": "bank rows"}
STEP = {**BANK, "S": "input width"}
AXES = {"info_nce": SIZES, "in_batch": {"B": "examples", "D": "width"}, "nce": BANK, "codir_step": STEP,
        "codir_step_given": STEP}  # fmt: skip


def make_queue(case: Case, generator) -> dict:
    batch, k, d = (case.shape[axis] for axis in "BKD")
    query, positive, bank = (unit(rows, d, generator=generator) for rows in (batch, batch, k))
    return {"query": query, "positive": positive, "bank": bank}


def make_banks(case: Case, generator) -> dict:
    batch, k, d, rows = (case.shape[axis] for axis in ("B", "K", "D", "n"))
    sides = {f"{part}_{side}": unit(count, d, generator=generator)
             for side in "st" for part, count in (("query", batch), ("bank", rows))}  # fmt: skip
    return {**sides, "index": torch.randint(rows, (batch, k + 1), generator=generator)}


def make_batch(case: Case, generator) -> dict:
    batch, d = case.shape["B"], case.shape["D"]
    return {name: unit(batch, d, generator=generator) for name in ("query", "positive")}


def make_step(case: Case, generator) -> dict:
    """Everyone draws other negatives: so the batch has one label, and the examples of the others one row between them,
    in as much memory as different ones. With `given` negatives, rows and labels are what they are."""
    batch, k, d, rows, width = (case.shape[axis] for axis in ("B", "K", "D", "n", "S"))
    idx, labels = torch.randperm(rows, generator=generator)[:batch], torch.randint(3, (rows,), generator=generator)
    labels[idx] = 0
    made = {"idx": idx, "labels": labels}
    for side in "st":
        weight, bias = (normal(*size, generator=generator, scale=width**-0.5) for size in ((d, width), (d,)))
        features = normal(batch, width, generator=generator)
        bank = unit(rows if case.options["given"] else 1, d, generator=generator).expand(rows, d).clone()
        bank[idx] = torch.nn.functional.normalize(features @ weight.T + bias)
        made |= {f"f_{side}": features, f"weight_{side}": weight, f"bias_{side}": bias, f"bank_{side}": bank}
    if case.options["given"]:
        others = torch.randint(rows, (batch, k), generator=generator)
        return {**made, "index": torch.cat([idx[:, None], others], 1)}
    order = labels.argsort(stable=True)
    bounds = torch.searchsorted(labels[order], torch.arange(4))
    return {**made, "order": order, "bounds": bounds, "others": [(labels != c).nonzero().squeeze(1) for c in range(3)]}


def ours_info_nce(inputs: Inputs, backend: str) -> torch.Tensor:
    sides = inputs["query"], inputs["positive"], inputs.get("bank")
    return functional.info_nce_loss(*sides, backend=backend, **inputs.options)


def ours_nce(inputs: Inputs, backend: str) -> torch.Tensor:
    """Both anchors against the other side's bank, as CoDIR does."""
    more, index = {**inputs.options, "backend": backend}, inputs["index"]
    teacher_anchor = functional.nce_loss(inputs["query_t"], inputs["bank_s"], index, **more)
    return teacher_anchor + functional.nce_loss(inputs["query_s"], inputs["bank_t"], index, **more)


def ours_step(inputs: Inputs, backend: str) -> torch.Tensor:
    modules = inputs.__dict__.setdefault("modules", {})  # a training run makes its loss once
    if backend not in modules:
        modules[backend] = step_module(inputs, partial(CRDLoss, backend=backend))
    return modules[backend](inputs["f_s"], inputs["f_t"], inputs["idx"], inputs.get("index"))


def step_module(inputs: Inputs, make: Callable) -> torch.nn.Module:
    """make(opt), CoDIRLoss with its official preset, on the tensors of the inputs."""
    (rows, d), options = inputs["bank_s"].shape, inputs.options
    opt = SimpleNamespace(s_dim=inputs["f_s"].shape[1], t_dim=inputs["f_t"].shape[1], n_data=rows, feat_dim=d,
                          nce_k=options["k"], nce_t=options["temperature"], nce_m=options["momentum"])  # fmt: skip
    with torch.device("meta"):
        loss = make(opt)
    device = inputs["bank_s"].device
    for side, name in (("s", "student"), ("t", "teacher")):
        linear = loss.get_submodule(f"embed_{side}.linear")
        for part in ("weight", "bias"):
            delattr(linear, part)
            setattr(linear, part, inputs[f"{part}_{side}"])
        setattr(loss, f"bank_{name}", inputs[f"bank_{side}"])
        setattr(loss, f"z_{name}", torch.tensor(options["z"], device=device))
    loss.sampler = torch.tensor([1, 0], device=device)
    if "index" not in inputs:
        loss.set_labels(inputs["labels"])
    return loss.train()


def case(kind: str, *sizes: int, dtype=FP32, **more) -> Case:
    shape = dict(zip(AXES[kind], sizes, strict=True))
    build = {"info_nce": queue, "in_batch": in_batch, "nce": gather}.get(kind, step)
    return Case("contrast", kind, shape, **build(shape, dtype, kind.endswith("given")), **more)


def queue(shape: dict, dtype: torch.dtype, _) -> dict:
    """The bank is read once for loss and gradient together: attention with K = V = bank. dtype is the bank's."""
    batch, k, d = shape.values()
    product, bank = 2.0 * batch * k * d, float(k * d * dtype.itemsize)
    return {
        "dtype": dtype, "make": make_queue, "ours": ours_info_nce, "leaves": ("query",),
        "flops": Work(product, 2 * product, 2 * product), "bytes": Work(bank, bank, bank),
        "gemms": (Gemm(batch, d, k), Gemm(batch, k, d, 1, AFTER)), "options": {"temperature": 0.07},
        "keep": ("query", "positive"),
    }  # fmt: skip


def in_batch(shape: dict, dtype: torch.dtype, _) -> dict:
    """Both sides train. The scores are not kept, but the floor does not count forming them twice."""
    batch, d = shape.values()
    product, side = 2.0 * batch * batch * d, float(batch * d * dtype.itemsize)
    return {
        "dtype": dtype, "make": make_batch, "ours": ours_info_nce, "leaves": ("query", "positive"),
        "flops": Work(product, 2 * product, 3 * product), "bytes": Work(2 * side, 4 * side, 4 * side),
        "gemms": (Gemm(batch, d, batch), *2 * (Gemm(batch, batch, d, 1, AFTER),)), "options": {"temperature": 0.07},
    }  # fmt: skip


def gather(shape: dict, _, __) -> dict:
    """Two banks; each gathered row is read once for loss and gradient together."""
    batch, k, d, rows = shape.values()
    gathered = 2.0 * batch * (k + 1) * d
    return {
        "dtype": FP32, "make": make_banks, "ours": ours_nce, "leaves": ("query_s", "query_t"),
        "flops": Work(2 * gathered, 2 * gathered, 4 * gathered), "bytes": Work(*3 * (4 * gathered,)),
        "options": {"n_data": rows, "temperature": 0.07, "z": rows * 1.5},
    }  # fmt: skip


def step(shape: dict, _, given: bool) -> dict:
    """Draw, project, gather, loss, gradients of the features and of both projections, banks updated."""
    batch, k, d, rows, width = shape.values()
    gathered, product, weight = 2.0 * batch * (k + 1) * d, 2.0 * batch * width * d, 4.0 * width * d
    return {
        "dtype": FP32, "make": make_step, "ours": ours_step, "leaves": ("f_s", "weight_s", "bias_s", "weight_t", "bias_t"),
        "flops": Work(*3 * (5 * product + 4 * gathered,)),
        "bytes": Work(*3 * (4 * weight + 12.0 * batch * width + 4 * gathered,)),
        "gemms": (*2 * (Gemm(batch, width, d), Gemm(d, batch, width)), Gemm(batch, d, width)), "modes": ("both",),
        "options": {"k": k, "temperature": 0.07, "momentum": 0.5, "z": rows * 1.5, "given": given},
    }  # fmt: skip


MNLI, SIX_LAYERS = 392702, 6 * 768  # examples, and what [CLS] of six layers makes
CASES = [
    case("info_nce", 32, 65536, 128, goals={"eager": 4, "gemms": 0.75}),
    case("info_nce", 32, 65536, 128, dtype=BF16, goals={"eager": 10}),
    case("info_nce", 256, 65536, 128),
    case("info_nce", 32, 4096, 128, quick=True),
    case("info_nce", 47, 49999, 127, goals={"eager": 3.5}),
    case("nce", 32, 4096, 128, 262144, goals={"authors": 10, "floor": 0.65}, target="G14 nce"),
    case("nce", 32, 100, 128, 393216),
    case("codir_step", 32, 100, 128, MNLI, SIX_LAYERS, goals={"authors": 20}),
    case("codir_step_given", 32, 100, 128, MNLI, SIX_LAYERS, goals={"authors": 3}, target="G14"),
    case("in_batch", 64, 768, quick=True),
    *(case("in_batch", batch, d) for batch, d in ((16, 384), (256, 384), (512, 768), (2048, 256), (4096, 768))),
    *(case("info_nce", 32, k, 256) for k in (16384, 131072, 1048576)),
    case("info_nce", 32, 1048576, 256, dtype=BF16),
]
ON_GPU = [
    case("info_nce", 32, 65536, 768, dtype=BF16, goals={"floor": 0.6, "eager": 3, "compile": 1.8}, target="G12 32"),
    case("info_nce", 256, 65536, 768, dtype=BF16, goals={"floor": 0.5}, target="G12 256"),
    case("in_batch", 32768, 768, dtype=BF16, goals={"inf-cl-style": 1, "cut-cross-entropy": 1}, target="G13"),
]
