"""Contrastive losses, how their negatives are drawn, and the bank that they come from (CoDIR, CRD)."""

import torch
from torch import Tensor

from fastkd import checks, reductions
from fastkd.checks import Backend, Reduction
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
    reduction: Reduction = "mean",
    backend: Backend = "auto",
) -> Tensor:
    """InfoNCE: the query must pick its positive among negatives.

    -log( exp(<q, p> / T) / (exp(<q, p> / T) + Σ_k exp(<q, n_k> / T)) ). Vectors are used as given; give them unit length,
    for example with `torch.nn.functional.normalize`, so that <q, p> is their cosine. With FASTKD_CHECK=1 in the environment,
    queries and positives of another length are refused.

    Args:
        query: [B, D], rows of unit length.
        positive: [B, D], the positive of each query, likewise.
        bank: [K, D], the negatives; may require grad. None: the negatives are the other positives of the batch.
        index: [B, K'], the rows of `bank` that are the negatives of each query. None: all rows are.
        temperature: T, a number or a learnable tensor with one element.
        exclude: (query_ids [B], bank_ids [K]): rows of the bank whose id is the query's are not negatives. With
            bank=None both are the ids of the examples.
        scale: [K], a factor for each row of a bank in an 8-bit dtype.
        reduction: "mean" over the queries, "sum", or "none".
        backend: "auto" takes the fastest implementation that runs here; `fastkd doctor` lists them.

    Returns:
        A scalar, or [B] for reduction="none".

    Example:
        >>> query, positive, bank = (torch.nn.functional.normalize(torch.randn(n, 16), dim=1) for n in (4, 4, 100))
        >>> query.requires_grad_()  # doctest: +ELLIPSIS
        tensor(...)
        >>> loss = fastkd.info_nce_loss(query, positive, bank, temperature=0.07)
        >>> loss.backward()
        >>> in_batch = fastkd.info_nce_loss(query, positive, None, exclude=(torch.arange(4), torch.arange(4)))
    """
    if bank is None and not (index is None and scale is None):
        raise ValueError("bank: None takes the negatives from the batch; leave index and scale out, or pass a bank")
    tensors = (("query", query, "[B, D]"), ("positive", positive, "[B, D]"), ("bank", bank, "[K, D]"))
    for name, x, layout in tensors[: 2 if bank is None else 3]:
        checks.tensor(name, x, layout, eight_bits=name == "bank")
        if x.shape[-1] != query.shape[-1]:
            raise ValueError(f"{name}: expected the width of query, {query.shape[-1]}, got {checks.describe(x)}")
    checks.same_shape("positive", positive, "query", query)
    checks.same_device(query=query, positive=positive, bank=bank, index=index, scale=scale)
    for name, x in (("query", query), ("positive", positive)):
        checks.unit_length(name, x)
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
            same = lambda: (exclude[0] == exclude[1]).all()  # noqa: E731 (called only where values may be read)
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
    reduction: Reduction = "mean",
    backend: Backend = "auto",
) -> Tensor:
    """Noise-contrastive estimation against a bank of examples, as CRD and CoDIR release it.

    With P(n) = exp(<q, n> / T) / z and noise c = K / n_data: -log(P(n_0) / (P(n_0) + c)) - Σ_k log(c / (P(n_k) + c)).

    Args:
        query: [B, D].
        bank: [n, D], a row for each example.
        index: [B, K + 1], rows of `bank`: the positive in column 0, then K negatives.
        n_data: The number of examples in the data set.
        temperature: T > 0.
        z: The normaliser Z, a number or a tensor with one element; see `fastkd.functional.nce_partition`.
        scale: [n], a factor for each row of a bank in an 8-bit dtype.
        reduction: "mean" over the queries, "sum", or "none".
        backend: "auto" takes the fastest implementation that runs here; `fastkd doctor` lists them.

    Returns:
        A scalar, or [B] for reduction="none".

    Example:
        >>> query, bank = torch.randn(4, 16, requires_grad=True), torch.randn(50, 16)
        >>> index = torch.randint(50, (4, 11))  # column 0 is the positive
        >>> loss = fastkd.nce_loss(query, bank, index, n_data=50, temperature=0.1, z=50.0)
        >>> loss.backward()
    """
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
    reduction: Reduction = "mean",
    backend: Backend = "auto",
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """CoDIR's two anchors in one call: half the sum of `nce_loss` of each query against its bank.

    Args:
        queries: (student's, teacher's), each [B, D].
        banks: (teacher's, student's), each [n, D].
        index: [B, K + 1], the same rows for both banks; the positive in column 0.
        n_data: The number of examples in the data set.
        temperature: T > 0.
        z: A normaliser for each query, tensors with one element. One that is 0 is set from this batch, as
            `nce_partition` does.
        reduction: "mean" over the queries, "sum", or "none".
        backend: "auto" takes the fastest implementation that runs here; `fastkd doctor` lists them.

    Returns:
        (loss, z), with the normalisers that were used.

    Example:
        >>> queries = torch.randn(4, 16, requires_grad=True), torch.randn(4, 16, requires_grad=True)
        >>> banks = torch.randn(50, 16), torch.randn(50, 16)
        >>> index, z = torch.randint(50, (4, 11)), (torch.zeros(()), torch.zeros(()))
        >>> loss, z = fastkd.functional.nce_pair_loss(queries, banks, index, n_data=50, temperature=0.5, z=z)
        >>> loss.backward()
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
    backend: Backend = "auto",
) -> Tensor:
    """The normaliser Z of `nce_loss`: `z` where it is > 0, else n_data · mean(exp(<q, n> / T)) of this batch.

    Args:
        query, bank, index, n_data, temperature, scale, backend: As for `nce_loss`.
        z: A tensor with one element. Its value is not read on the host.

    Returns:
        A tensor with one element, without a gradient. Scores that are not finite are left out of the mean.

    Example:
        >>> query, bank, index = torch.randn(4, 16), torch.randn(50, 16), torch.randint(50, (4, 11))
        >>> options = {"n_data": 50, "temperature": 0.5}
        >>> z = fastkd.functional.nce_partition(query, bank, index, z=torch.zeros(()), **options)
        >>> bool(z > 0)
        True
    """
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
    backend: Backend = "auto",
) -> Tensor:
    """Draw negatives for each example, on its device, uniformly among the other examples (of other classes).

    Args:
        index: [B], the ids of the examples, 0 to n_data - 1.
        count: How many negatives to draw for each.
        state: int64 [2], (seed, step). Equal states give equal draws on every device.
        n_data: The number of examples in the data set.
        labels: (class of each example [n_data], ids sorted by class [n_data], where each class begins among them
            [C + 1]); negatives then have another class. None: any other example may be drawn.
        replacement: Draw with replacement. So are examples of which fewer than `count` candidates exist.
        window: Draw only among the `window` ids on either side. 0: among all.
        backend: "auto" takes the fastest implementation that runs here; `fastkd doctor` lists them.

    Returns:
        int64 [B, count], ids.

    Example:
        >>> index, state = torch.tensor([3, 7]), torch.tensor([0, 0])
        >>> negatives = fastkd.functional.sample_negatives(index, 5, state, n_data=100)
        >>> negatives.shape
        torch.Size([2, 5])
    """
    checks.count("count", count)
    checks.count("n_data", n_data)
    checks.flag("replacement", replacement)
    if not isinstance(window, int) or not 0 <= window < 2**60:
        raise ValueError(f"window: expected how many ids on either side, or 0 for all of them, got {window!r}")
    if window and labels is not None:
        raise ValueError("window: negatives are drawn by labels or from a window, not both; pass only one")
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
def unit_linear(x: Tensor, weight: Tensor, bias: Tensor, *, backend: Backend = "auto") -> Tensor:
    """A linear layer followed by normalisation to unit length: normalize(x weightᵀ + bias).

    Args:
        x: [B, S].
        weight: [D, S].
        bias: [D].
        backend: "auto" takes the fastest implementation that runs here; `fastkd doctor` lists them.

    Returns:
        [B, D] in float32. A zero vector stays zero, with a finite gradient.

    Example:
        >>> x, layer = torch.randn(4, 8), torch.nn.Linear(8, 16)
        >>> y = fastkd.functional.unit_linear(x, layer.weight, layer.bias)
        >>> torch.allclose(y.norm(dim=1), torch.ones(4))
        True
    """
    checks.tensor("x", x, "[B, S]")
    checks.tensor("weight", weight, "[D, S]")
    checks.shaped("bias", bias, weight.shape[:1], "[D]")
    checks.same_device(x=x, weight=weight, bias=bias)
    if x.shape[1] != weight.shape[1]:
        raise ValueError(f"x: expected the width of weight, {weight.shape[1]}, got {checks.describe(x)}")
    return contrast.unit_linear(x, weight, bias, backend)


def update_bank(
    bank: Tensor,
    index: Tensor,
    rows: Tensor,
    *,
    momentum: float,
    scale: Tensor | None = None,
    backend: Backend = "auto",
) -> None:
    """Move rows of a bank towards new vectors, in place, and scale them to unit length.

    bank[index] = normalize(momentum · bank[index] + (1 - momentum) · rows)

    Args:
        bank: [K, D], written in place.
        index: [B], the rows to write. Where an id occurs more than once, its last row is used.
        rows: [B, D], the new vectors. One that is not finite is not written.
        momentum: In [0, 1); 0 replaces the rows.
        scale: float32 [K], the factors of a bank in float8_e4m3fn, written with the rows.
        backend: "auto" takes the fastest implementation that runs here; `fastkd doctor` lists them.

    Example:
        >>> bank = torch.nn.functional.normalize(torch.randn(50, 16), dim=1)
        >>> fastkd.functional.update_bank(bank, torch.tensor([3, 7]), torch.randn(2, 16), momentum=0.5)
        >>> torch.allclose(bank.norm(dim=1), torch.ones(50))
        True
    """
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
    """Checks shared by the functions that select rows of a bank by an index."""
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
        raise ValueError(f"labels[2]: expected where each class begins, and the end, got {checks.describe(bounds)}")
    checks.same_device(**{"index": index, "labels[0]": classes, "labels[1]": order, "labels[2]": bounds})


def _check_scale(scale: Tensor | None, bank: Tensor) -> None:
    if scale is not None:
        checks.mask("scale", scale, bank.shape[:1], "[K]")
    elif bank.dtype.itemsize == 1:
        raise ValueError(
            f"scale: rows in {bank.dtype} need one each, [K]; MemoryBank and NegativeQueue have them in .scale"
        )
