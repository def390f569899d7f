"""A query against a bank of negatives (InfoNCE, NCE), its sampling and its bank: which implementation runs."""

import math

import torch
from torch import Tensor

from fastkd import backends
from fastkd.reference import contrast as reference
from fastkd.reference import contrast_bank as bank_reference

# The forward leaves what the query's gradient is a multiple of, `direction` [B, D]: it costs one more use of bank rows
# that are in the cache. Reading the bank again in the backward would double the time. The backward only scales, unless
# the bank is trained too. NCE has no backward kernel at all.
INFO_NCE = backends.kernels("contrast", "info_nce_fwd", "info_nce_bank_bwd")
NCE_KERNELS = backends.kernels("contrast", "nce_fwd", "nce_fwd")


def _info_nce_fake(query, positive, bank, index, inverse_temperature, query_ids, bank_ids, with_direction):
    rows = query.new_empty(query.shape[0], dtype=torch.float32)
    return rows, _direction_fake(query, with_direction), torch.empty_like(rows), torch.empty_like(rows)


def _bank_fake(query, bank, inverse_temperature, query_ids, bank_ids, lse, coefficient):
    return bank.new_empty(bank.shape, dtype=torch.float32)


def _nce_fake(query, bank, index, shift, temperature, with_direction):
    return query.new_empty(query.shape[0], dtype=torch.float32), _direction_fake(query, with_direction)


def _direction_fake(query, wanted):
    return query.new_empty((query.shape[0] if wanted else 0, query.shape[1]), dtype=torch.float32)


backends.fake("info_nce_fwd", _info_nce_fake)
backends.fake("info_nce_bank_bwd", _bank_fake)
backends.fake("nce_fwd", _nce_fake)
backends.fake("update_bank", lambda bank, index, rows, momentum: None)
backends.fake("nce_partition", lambda query, bank, index, z, temperature, n_data: torch.empty_like(z))
backends.fake("sample_negatives", lambda index, count, *_: index.new_empty((index.shape[0], count)))


class InfoNCE(torch.autograd.Function):
    """d loss = w (mean of the negatives - positive) · d query / T - w query · d positive / T, w = sigmoid(lse - p);
    of a trained bank, w e^(n_k - lse) query / T for its row k."""

    @staticmethod
    def forward(ctx, backend, query, positive, inverse_temperature, bank, index, query_ids, bank_ids):
        wanted = ctx.needs_input_grad[1] or ctx.needs_input_grad[3]
        ctx.backend, ctx.trains_bank = backend, ctx.needs_input_grad[4]
        inverse = inverse_temperature.to(query.device, torch.float64)
        rows, direction, weight, lse = INFO_NCE[backend].fwd(
            query, positive, bank, index, inverse, query_ids, bank_ids, wanted
        )
        of_bank = (bank, lse, query_ids, bank_ids) if ctx.trains_bank else ()  # else the bank may change meanwhile
        ctx.save_for_backward(query, inverse, direction, weight, *of_bank)
        ctx.positive_dtype, ctx.temperature_dtype = positive.dtype, inverse_temperature.dtype
        return rows

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        query, inverse, direction, weight, *of_bank = ctx.saved_tensors
        to_query = to_positive = to_inverse = to_bank = None
        scaled = grad * inverse  # [B]
        if ctx.needs_input_grad[1]:
            to_query = (direction * scaled[:, None]).to(query.dtype)
        if ctx.needs_input_grad[2]:
            to_positive = (query * (scaled * -weight)[:, None]).to(ctx.positive_dtype)
        if ctx.needs_input_grad[3]:
            slope = (query.double() * direction).sum(-1)  # [B]
            to_inverse = (grad * slope).sum().to(ctx.temperature_dtype)
        if ctx.trains_bank:
            bank, lse, query_ids, bank_ids = of_bank
            shares = (query, bank, inverse, query_ids, bank_ids, lse, (scaled * weight).float())
            to_bank = INFO_NCE[ctx.backend].bwd(*shares).to(bank.dtype)
        return None, to_query, to_positive, to_inverse, to_bank, None, None, None


class NCE(torch.autograd.Function):
    """The forward's direction is the gradient itself."""

    @staticmethod
    def forward(ctx, backend, query, bank, index, shift, temperature):
        wanted = ctx.needs_input_grad[1]
        rows, direction = NCE_KERNELS[backend].fwd(query, bank, index, shift, temperature, wanted)
        ctx.save_for_backward(direction)
        ctx.dtype = query.dtype
        return rows

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (direction,) = ctx.saved_tensors
        return None, (direction * grad[:, None]).to(ctx.dtype), None, None, None, None


def info_nce(query, positive, bank, index, inverse_temperature, exclude, scale, backend) -> Tensor:
    """InfoNCE per query, [B]. bank None: the other positives of the batch, with a gradient."""
    if bank is None:
        bank = positive
        if exclude is None:
            own = torch.arange(query.shape[0], device=query.device)
            exclude = own, own
    why_not = _bank_reason(bank, trained_rows=index is not None)
    if scale is not None:
        why_not = "rows with a scale are not written there yet"
    elif isinstance(inverse_temperature, Tensor) and inverse_temperature.numel() != 1:
        why_not = "it takes one temperature for all queries"
    elif exclude is not None and any(ids.is_floating_point() for ids in exclude):
        why_not = "it compares whole-number ids"
    backend = _choose(backend, query, why_not)
    if backend == "reference":
        with backends.full_precision(query):
            return reference.info_nce(query, positive, bank, index, inverse_temperature, exclude, scale)
    if not isinstance(inverse_temperature, Tensor):
        inverse_temperature = torch.full((), inverse_temperature, dtype=torch.float64, device=query.device)
    query_ids, bank_ids = (None, None) if exclude is None else (ids.long() for ids in exclude)
    return InfoNCE.apply(
        backend,
        query,
        positive.float() if positive.dtype == torch.float64 else positive,
        inverse_temperature.reshape(()),
        bank,
        None if index is None else index.long(),
        query_ids,
        bank_ids,
    )


def nce(query, bank, index, n_data, temperature, z, backend) -> Tensor:
    """NCE per query, [B]."""
    why_not = _bank_reason(bank, trained_rows=True)
    if isinstance(z, Tensor) and (z.numel() != 1 or z.requires_grad):
        why_not = "z must be one number without a gradient"
    backend = _choose(backend, query, why_not)
    if backend == "reference":
        with backends.full_precision(query):
            return reference.nce(query, bank, index, n_data, temperature, z)
    c = (index.shape[1] - 1) / n_data
    if isinstance(z, Tensor):
        log_z = z.to(query.device, torch.float64).reshape(()).log()
    else:
        log_z = torch.full((), math.log(z), dtype=torch.float64, device=query.device)
    shift = log_z + math.log(c + reference.EPS)
    dropped = (index.shape[1] - 1) * (math.log(c) - math.log(c + reference.EPS))  # as in the reference
    return NCE.apply(backend, query, bank, index.long(), shift, temperature) - dropped


def partition(query, bank, index, n_data, temperature, z, backend) -> Tensor:
    """NCE's normaliser: z if it is set, else this batch's, []."""
    why_not = _bank_reason(bank)
    if z.dtype != torch.float32 or z.dim():
        why_not = "z must be one float32 number"
    if _choose(backend, query, why_not) == "cpu":
        return torch.ops.fastkd.nce_partition(query.detach(), bank.detach(), index.long(), z, temperature, n_data)
    with backends.full_precision(query):
        return reference.partition(query, bank, index, n_data, temperature, z)


def sample_negatives(index, count, n_data, labels, order, bounds, state, replacement, window, backend) -> Tensor:
    """Ids of other labels, or of neighbours, [B, count]: the same on every backend."""
    arguments = index.long(), count, n_data, labels, order, bounds, state.long(), replacement, window
    if backends.choose("contrast", backend, index[:0].float()) == "cpu":
        return torch.ops.fastkd.sample_negatives(*arguments)
    return bank_reference.sample_negatives(*arguments)


def update_bank(bank, index, rows, momentum, backend) -> None:
    """Move the bank's rows towards the new ones, in place."""
    why_not = _bank_reason(bank)
    if rows.dtype == torch.float64:
        rows = rows.to(torch.promote_types(bank.dtype, torch.float32))
    elif bank.shape[1] > 1 and bank.stride(1) != 1:
        why_not = "the rows of the bank are not contiguous"
    if _choose(backend, bank, why_not) == "cpu":
        with torch.no_grad():
            return torch.ops.fastkd.update_bank(bank, index.long(), rows.detach(), momentum)
    with backends.full_precision(bank):
        bank_reference.update_bank(bank, index, rows, momentum)


def _bank_reason(bank: Tensor, trained_rows: bool = False) -> str | None:
    """Why the kernels cannot take this bank, as a clause that follows "because"; None if they can."""
    if trained_rows and bank.requires_grad and torch.is_grad_enabled():
        return "the bank needs a gradient, which the kernels form for a bank that the batch shares only"
    if bank.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the bank is {str(bank.dtype).removeprefix('torch.')}, and kernels take float32, bfloat16 and float16"
    return None


def _choose(backend: str, query: Tensor, why_not: str | None) -> str:
    chosen = backends.choose("contrast", backend, query)
    if chosen == "reference" or why_not is None:
        return chosen
    if backend == "auto":
        return "reference"
    raise RuntimeError(f"contrast: backend='{backend}' cannot run here: {why_not}")
