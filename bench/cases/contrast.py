"""contrast's cases: a queue, in-batch negatives, gathered rows, and a whole step of CoDIR's loss.

A step moves bank rows. The batch's rows are where they move to already, so that every call of every rival finds the
state that the check saw.
"""

from collections.abc import Iterator

import torch
from fastkd.bench.cases.case import Case, Gemm, Inputs, Work, functional, normal, unit

FP32, BF16 = torch.float32, torch.bfloat16


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
    return functional().info_nce_loss(*sides, backend=backend, **inputs.options)


def ours_nce(inputs: Inputs, backend: str) -> torch.Tensor:
    """Both anchors against the other side's bank, as CoDIR does."""
    more, public, index = {**inputs.options, "backend": backend}, functional(), inputs["index"]
    teacher_anchor = public.nce_loss(inputs["query_t"], inputs["bank_s"], index, **more)
    return teacher_anchor + public.nce_loss(inputs["query_s"], inputs["bank_t"], index, **more)


def ours_step(inputs: Inputs, backend: str) -> torch.Tensor:
    modules = inputs.__dict__.setdefault("modules", {})  # a training run makes its loss once
    if backend not in modules:
        modules[backend] = step_module(inputs, backend)
    return modules[backend](inputs["f_s"], inputs["f_t"], inputs["idx"], inputs.get("index"))


def step_module(inputs: Inputs, backend: str) -> torch.nn.Module:
    """CoDIRLoss, the official preset, on the tensors of the inputs."""
    from fastkd.losses.codir import CoDIRLoss

    (rows, d), options = inputs["bank_s"].shape, inputs.options
    with torch.device("meta"):
        loss = CoDIRLoss(inputs["f_s"].shape[1], inputs["f_t"].shape[1], rows, feat_dim=d, nce_k=options["k"],
                         nce_t=options["temperature"], nce_m=options["momentum"], backend=backend)  # fmt: skip
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


def queue_case(batch: int, k: int, d: int, dtype: torch.dtype, **more) -> Case:
    """The bank is read once for loss and gradient together: attention with K = V = bank. dtype is the bank's."""
    product, bank = 2.0 * batch * k * d, float(k * d * dtype.itemsize)
    gemms = (Gemm(batch, d, k), Gemm(batch, k, d, 1, ("backward", "both")))
    return Case(
        "contrast", "info_nce", {"B": batch, "K": k, "D": d}, dtype, make_queue, ours_info_nce, ("query",),
        flops=Work(product, 2 * product, 2 * product), bytes=Work(bank, bank, bank), gemms=gemms,
        options={"temperature": 0.07}, keep=("query", "positive"), **more,
    )  # fmt: skip


def batch_case(batch: int, d: int, dtype: torch.dtype, **more) -> Case:
    """Both sides train. The scores are not kept, but the floor does not count forming them twice."""
    product, side = 2.0 * batch * batch * d, float(batch * d * dtype.itemsize)
    gemms = (Gemm(batch, d, batch), *2 * (Gemm(batch, batch, d, 1, ("backward", "both")),))
    return Case(
        "contrast", "in_batch", {"B": batch, "D": d}, dtype, make_batch, ours_info_nce, ("query", "positive"),
        flops=Work(product, 2 * product, 3 * product), bytes=Work(2 * side, 4 * side, 4 * side), gemms=gemms,
        options={"temperature": 0.07}, **more,
    )  # fmt: skip


def gather_case(batch: int, k: int, d: int, rows: int, **more) -> Case:
    """Two banks; each gathered row is read once for loss and gradient together."""
    gathered = 2.0 * batch * (k + 1) * d
    options = {"n_data": rows, "temperature": 0.07, "z": rows * 1.5}
    return Case(
        "contrast", "nce", {"B": batch, "K": k, "D": d, "n": rows}, FP32, make_banks, ours_nce,
        ("query_s", "query_t"), flops=Work(2 * gathered, 2 * gathered, 4 * gathered),
        bytes=Work(4 * gathered, 4 * gathered, 4 * gathered), options=options, **more,
    )  # fmt: skip


STEP_LEAVES = ("f_s", "weight_s", "bias_s", "weight_t", "bias_t")


def step_case(batch: int, k: int, d: int, rows: int, width: int, given: bool, **more) -> Case:
    """Draw, project, gather, loss, gradients of the features and of both projections, banks updated."""
    gathered, product, weight = 2.0 * batch * (k + 1) * d, 2.0 * batch * width * d, 4.0 * width * d
    gemms = (*2 * (Gemm(batch, width, d), Gemm(d, batch, width)), Gemm(batch, d, width))
    flops, moved = 5 * product + 4 * gathered, 4 * weight + 12.0 * batch * width + 4 * gathered
    options = {"k": k, "temperature": 0.07, "momentum": 0.5, "z": rows * 1.5, "given": given}
    return Case(
        "contrast", "codir_step_given" if given else "codir_step", {"B": batch, "K": k, "D": d, "n": rows, "S": width},
        FP32, make_step, ours_step, STEP_LEAVES, flops=Work(flops, flops, flops), bytes=Work(moved, moved, moved),
        gemms=gemms, options=options, modes=("both",), **more,
    )  # fmt: skip


MNLI, SIX_LAYERS = 392702, 6 * 768  # examples, and what [CLS] of six layers makes


def contrast_cases() -> Iterator[Case]:
    yield queue_case(32, 65536, 128, FP32, goal="4x eager, 0.75x of its bare GEMMs")
    yield queue_case(32, 65536, 128, BF16, goal="10x fp32 eager")
    yield queue_case(256, 65536, 128, FP32)
    yield queue_case(32, 4096, 128, FP32, quick=True)
    yield gather_case(32, 4096, 128, 262144, goal="10x the authors' way, 65 % of the gather floor")
    yield gather_case(32, 100, 128, 393216)
    yield step_case(32, 100, 128, MNLI, SIX_LAYERS, False, goal="20x the authors' way, host sampling and all")
    yield step_case(32, 100, 128, MNLI, SIX_LAYERS, True, goal="3x the authors' way, negatives given")
    yield batch_case(2048, 256, FP32)
    for k in (16384, 131072, 1048576):
        yield queue_case(32, k, 256, FP32, sweep="K")
    yield queue_case(32, 1048576, 256, BF16, sweep="K")
