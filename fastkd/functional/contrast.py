"""A query against negatives, how they are drawn, and the bank that they come from (CoDIR, CRD)."""

import torch
from torch import Tensor

from fastkd import checks, reductions
from fastkd.functional.inference_mode import takes_inference_tensors
from fastkd.ops import contrast


@takes_inference_tensors
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
        checks.tensor(name, x, layout, eight_bits=name == "bank")
        if x.shape[-1] != query.shape[-1]:
            raise ValueError(f"{name}: expected the width of query, {query.shape[-1]}, got {checks.describe(x)}")
    checks.same_shape("positive", positive, "query", query)
    checks.same_device(query=query, positive=positive, bank=bank, index=index, scale=scale)
    checks.positive("temperature", temperature, learnable=True)
    checks.one_of("reduction", reduction, reductions.REDUCTIONS)
    if index is not None:
        checks.integers("index", index, "[B, K]")
        checks.same_leading("index", index, "query", query, 1)
        checks.indices_in_range("index", index, bank.shape[0], "rows of bank")
    if bank is not None:
        _check_scale(scale, bank)
    if exclude is not None:
        checks.pair("exclude", exclude, "(query_ids [B], bank_ids [K])")
        for i, ids in enumerate(exclude):
            checks.tensor(f"exclude[{i}]", ids, "[...]", floating=False)
        checks.mask("exclude[0]", exclude[0], query.shape[:1], "[B]")
        checks.mask("exclude[1]", exclude[1], (query if bank is None else bank).shape[:1], "[K]")
        checks.same_device(**{"query": query, "exclude[0]": exclude[0], "exclude[1]": exclude[1]})
        if bank is None:
            same = lambda: (exclude[0] == exclude[1]).all()  # noqa: E731 (looked at only where a look is free)
            checks.values("exclude", exclude[0], same, "in the batch, both are the ids of the same examples")
    rows = contrast.info_nce(query, positive, bank, index, 1.0 / temperature, exclude, scale, backend)
    return reductions.reduce(rows, None, reduction)


@takes_inference_tensors
def nce_loss(
    query: Tensor,
    bank: Tensor,
    index: Tensor,
    *,
    n_data: int,
    temperature: float,
    z: float | Tensor,
    scale: Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Noise-contrastive estimation as CRD and CoDIR release it: query [B, D] against bank[index], index [B, K + 1] with
    the positive in column 0. p = e^<q,n>/T / z, noise c = K / n_data; -log p0/(p0+c) - sum_k log c/(pk+c) per query.
    scale [K] multiplies each bank row (fp8 banks)."""
    _check_chosen(query, bank, index, scale)
    if index.shape[1] < 2:
        raise ValueError(
            f"index: expected the positive and at least one negative per row, got {checks.describe(index)}"
        )
    checks.count("n_data", n_data)
    checks.positive("temperature", temperature)
    checks.positive("z", z, learnable=True)
    checks.one_of("reduction", reduction, reductions.REDUCTIONS)
    rows = contrast.nce(query, bank, index, n_data, float(temperature), z, scale, backend)
    return reductions.reduce(rows, None, reduction)


@takes_inference_tensors
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
    for name, x in (("queries", queries), ("banks", banks), ("z", z)):
        checks.pair(name, x, "of both anchors")
    for side in (0, 1):
        query, bank, names = queries[side], banks[side], (f"queries[{side}]", f"banks[{side}]")
        checks.tensor(names[0], query, "[B, D]")
        checks.tensor(names[1], bank, "[K, D]", eight_bits=True)  # for the hint below
        checks.one_number(f"z[{side}]", z[side])
        checks.same_leading("index", index, names[0], query, 1)
        checks.same_device(**{names[0]: query, names[1]: bank, "index": index, f"z[{side}]": z[side]})
        if bank.dtype.itemsize == 1:
            raise ValueError(
                f"{names[1]}: {bank.dtype} rows need a scale, which nce_loss takes for one anchor at a time"
            )
        if bank.shape[1] != queries[0].shape[1] or query.shape[1] != queries[0].shape[1]:
            raise ValueError(f"{names[1]}: expected the width of queries[0], {queries[0].shape[1]}")
    checks.indices_in_range("index", index, min(len(bank) for bank in banks), "rows of both banks")
    checks.count("n_data", n_data)
    checks.positive("temperature", temperature)
    checks.one_of("reduction", reduction, reductions.REDUCTIONS)
    rows, z = contrast.nce_pair(queries, banks, index, n_data, float(temperature), z, backend)
    return reductions.reduce(rows, None, reduction), z


def nce_partition(
    query: Tensor,
    bank: Tensor,
    index: Tensor,
    *,
    n_data: int,
    temperature: float,
    z: Tensor,
    scale: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """nce_loss's z as it is frozen after the first batch: `z` where it is > 0, else n_data · mean e^<q,n>/T of this
    batch (over its finite scores; 0 if there are none). Without a gradient and without a look at z."""
    checks.one_number("z", z)
    _check_chosen(query, bank, index, scale)
    checks.same_device(query=query, z=z)
    checks.count("n_data", n_data)
    checks.positive("temperature", temperature)
    return contrast.partition(query, bank, index, n_data, float(temperature), z, scale, backend)


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
    checks.count("count", count)
    checks.count("n_data", n_data)
    checks.flag("replacement", replacement)
    if not isinstance(window, int) or not 0 <= window < 2**60:
        raise ValueError(f"window: expected how many ids on either side, or 0 for all of them, got {window!r}")
    if window and labels is not None:
        raise ValueError("window: negatives are drawn by label or from a window, not both; leave one of them out")
    checks.integers("index", index, "[B]")
    checks.integers("state", state, "[2]")
    checks.mask("state", state, (2,), "[2]")
    checks.indices_in_range("index", index, n_data, "n_data examples")
    if labels is not None:
        _check_labels(labels, index, n_data)
    classes, order, bounds = (None, None, None) if labels is None else labels
    checks.same_device(index=index, state=state)
    return contrast.sample_negatives(index, count, n_data, classes, order, bounds, state, replacement, window, backend)


@takes_inference_tensors
def unit_linear(x: Tensor, weight: Tensor, bias: Tensor, *, backend: str = "auto") -> Tensor:
    """x [B, S] by weight [D, S] and bias [D] onto the unit sphere, [B, D] in float32; a zero vector stays zero."""
    checks.tensor("x", x, "[B, S]")
    checks.tensor("weight", weight, "[D, S]")
    checks.shaped("bias", bias, weight.shape[:1], "[D]")
    checks.same_device(x=x, weight=weight, bias=bias)
    if x.shape[1] != weight.shape[1]:
        raise ValueError(f"x: expected the width of weight, {weight.shape[1]}, got {checks.describe(x)}")
    return contrast.unit_linear(x, weight, bias, backend)


def update_bank(
    bank: Tensor, index: Tensor, rows: Tensor, *, momentum: float, scale: Tensor | None = None, backend: str = "auto"
) -> None:
    """bank[index] = normalise(momentum · bank[index] + (1 - momentum) · rows), in place. bank [K, D], index [B],
    rows [B, D]. Of equal ids the last counts, on every device; a row that is not finite is not written.

    scale [K], of a bank in float8_e4m3fn, is written with the rows: they are moved in float32 and rounded again."""
    checks.tensor("bank", bank, "[K, D]", eight_bits=True)
    checks.tensor("rows", rows, "[B, D]")
    checks.integers("index", index, "[B]")
    checks.same_leading("rows", rows, "index", index, 1)
    checks.same_device(bank=bank, rows=rows, index=index, scale=scale)
    _check_scale(scale, bank)
    if scale is not None and (bank.dtype != torch.float8_e4m3fn or scale.dtype != torch.float32):
        raise ValueError(
            "scale: is written in float32 beside a bank in float8_e4m3fn, "
            f"got {checks.describe(scale)} and {checks.describe(bank)}; an 8-bit module is not cast by .half() or .to(dtype)"
        )
    checks.indices_in_range("index", index, bank.shape[0], "rows of bank")
    if rows.shape[1] != bank.shape[1]:
        raise ValueError(f"rows: expected the width of bank, {bank.shape[1]}, got {checks.describe(rows)}")
    checks.number("momentum", momentum)
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum: must lie in [0, 1), got {momentum!r}")
    contrast.update_bank(bank, index, rows, float(momentum), scale, backend)


def _check_chosen(query: Tensor, bank: Tensor, index: Tensor, scale: Tensor | None) -> None:
    """Rows of a bank that each query chooses by an index."""
    checks.tensor("query", query, "[B, D]")
    checks.tensor("bank", bank, "[K, D]", eight_bits=True)
    checks.integers("index", index, "[B, K]")
    checks.same_leading("index", index, "query", query, 1)
    checks.same_device(query=query, bank=bank, index=index, scale=scale)
    _check_scale(scale, bank)
    if bank.shape[1] != query.shape[1]:
        raise ValueError(f"bank: expected the width of query, {query.shape[1]}, got {checks.describe(bank)}")
    checks.indices_in_range("index", index, bank.shape[0], "rows of bank")


def _check_labels(labels, index: Tensor, n_data: int) -> None:
    if not isinstance(labels, (tuple, list)) or len(labels) != 3:
        raise ValueError(
            f"labels: expected (classes [n_data], ids sorted by class [n_data], bounds [C + 1]), got {checks.describe(labels)}"
        )
    classes, order, bounds = labels
    for i, layout in enumerate(("[n_data]", "[n_data]", "[C + 1]")):
        checks.integers(f"labels[{i}]", labels[i], layout)
        if i < 2:
            checks.mask(f"labels[{i}]", labels[i], (n_data,), layout)
    if bounds.shape[0] < 2:
        raise ValueError(f"labels[2]: expected where each class starts, and the end, got {checks.describe(bounds)}")
    checks.same_device(**{"index": index, "labels[0]": classes, "labels[1]": order, "labels[2]": bounds})


def _check_scale(scale: Tensor | None, bank: Tensor) -> None:
    if scale is not None:
        checks.mask("scale", scale, bank.shape[:1], "[K]")
    elif bank.dtype.itemsize == 1:
        raise ValueError(
            f"scale: rows in {bank.dtype} need one each, [K]; MemoryBank and NegativeQueue(dtype=...) keep them in .scale"
        )
