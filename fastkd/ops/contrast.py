"""contrast: InfoNCE and NCE against a bank of negatives, drawing the negatives and moving the bank. The autograd Functions, and
which implementation runs."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd import backends, checks, thresholds
from fastkd.ops.contrast_library import InfoNCEByProducts, gradients_of_queries
from fastkd.ops.gradient_in_forward import wants_gradient
from fastkd.reference import contrast as reference
from fastkd.reference import contrast_bank as bank_reference
from fastkd.reference import contrast_sample as sample_reference

# The gradient is made in the forward, since reading the bank again in the backward would double the time. The query's gradient
# is a multiple of `unit_grad` [B, D], so the backward only rescales it, unless the bank is trained. NCE has no backward kernel.
INFO_NCE = backends.kernels("contrast", "info_nce_fwd", "info_nce_fwd")
OF_BANK = backends.kernels("contrast", "info_nce_bank_bwd", "info_nce_bank_bwd", only=("triton",))
NCE_KERNELS = backends.kernels("contrast", "nce_fwd", "nce_fwd")
NCE_PAIR = backends.kernels("contrast", "nce_pair", "nce_pair")
PARTITION = backends.kernels("contrast", "nce_partition", "nce_partition")
SAMPLE = backends.kernels("contrast", "sample_negatives", "sample_negatives")
UPDATE = backends.kernels("contrast", "update_bank", "update_bank", mutates=("bank", "scale"))
MOST_DRAWS = 8192  # in Triton every draw scans all others; for more draws the reference's sort is faster


def _info_nce_fake(query, positive, bank, index, inverse, query_ids, bank_ids, gradient_in_forward, scale=None):
    rows = query.new_empty(query.shape[0], dtype=torch.float32)
    return rows, _unit_grad_fake(query, gradient_in_forward), torch.empty_like(rows), torch.empty_like(rows)


def _bank_fake(query, bank, inverse_temperature, query_ids, bank_ids, lse, coefficient):
    return bank.new_empty(bank.shape, dtype=torch.float32)


def _nce_fake(query, bank, index, shift, temperature, gradient_in_forward, scale=None):
    return query.new_empty(query.shape[0], dtype=torch.float32), _unit_grad_fake(query, gradient_in_forward)


def _unit_grad_fake(query, wanted):
    return query.new_empty((query.shape[0] if wanted else 0, query.shape[1]), dtype=torch.float32)


def _pair_fake(query_a, query_b, bank_a, bank_b, index, z_a, z_b, noise, temperature, n_data):
    rows = query_a.new_empty(query_a.shape[0], dtype=torch.float32)
    unit_grads = (_unit_grad_fake(query, True) for query in (query_a, query_b))
    return rows, *unit_grads, torch.empty_like(z_a), torch.empty_like(z_b)


def _unit_linear_bwd_fake(grad, unit, length, x, weight, with_x):
    return (
        x.new_empty((x.shape[0] if with_x else 0, x.shape[1])),
        torch.empty_like(weight),
        weight.new_empty(len(weight)),
    )


backends.fake("info_nce_fwd", _info_nce_fake)
backends.fake("nce_pair", _pair_fake)
backends.fake("unit_linear_fwd", lambda x, w, bias: (x.new_empty(len(x), len(w)), x.new_empty(len(x))))
backends.fake("unit_linear_bwd", _unit_linear_bwd_fake)
backends.fake("info_nce_bank_bwd", _bank_fake)
backends.fake("nce_fwd", _nce_fake)
backends.fake("update_bank", lambda bank, index, rows, momentum, scale=None: None)
backends.fake("nce_partition", lambda query, bank, index, z, *_: torch.empty_like(z))
backends.fake("sample_negatives", lambda index, count, *_: index.new_empty((index.shape[0], count)))


class InfoNCE(backends.Function):
    """d loss = w (mean of the negatives - positive) · d query / T - w query · d positive / T, w = sigmoid(lse - p)."""

    function = "info_nce_loss"
    gradient_in_forward = True

    @staticmethod
    def forward(ctx, backend, query, positive, inverse_temperature, bank, index, query_ids, bank_ids, scale):
        wanted = ctx.needs_input_grad[1] or ctx.needs_input_grad[3]
        ctx.backend, inverse = backend, inverse_temperature.to(query.device, torch.float64)
        rows, unit_grad, weight, lse = INFO_NCE[backend].fwd(
            query, positive, bank, index, inverse, query_ids, bank_ids, wanted, scale
        )
        # A bank that is not trained is not saved, since it may change in place before the backward.
        bank_inputs = (bank, lse, query_ids, bank_ids) if ctx.needs_input_grad[4] else ()
        ctx.save_for_backward(query, inverse, unit_grad, weight, *bank_inputs)
        ctx.dtypes = positive.dtype, inverse_temperature.dtype
        return rows

    @staticmethod
    def backward(ctx, grad):
        query, inverse, unit_grad, weight, *bank_inputs = ctx.saved_tensors
        gradients = gradients_of_queries(
            grad, query, inverse, unit_grad, weight, ctx.needs_input_grad[1:4], *ctx.dtypes
        )
        to_bank = None
        if ctx.needs_input_grad[4]:
            bank, lse, query_ids, bank_ids = bank_inputs
            coefficient = (grad * inverse * weight).float()
            to_bank = (
                OF_BANK[ctx.backend].fwd(query, bank, inverse, query_ids, bank_ids, lse, coefficient).to(bank.dtype)
            )
        return None, *gradients, to_bank, *[None] * 4


class NCE(backends.Function):
    """unit_grad is the gradient for an upstream gradient of 1."""

    function = "nce_loss"
    gradient_in_forward = True

    @staticmethod
    def forward(ctx, backend, query, bank, index, shift, temperature, scale):
        wanted = ctx.needs_input_grad[1]
        rows, unit_grad = NCE_KERNELS[backend].fwd(query, bank, index, shift, temperature, wanted, scale)
        ctx.save_for_backward(unit_grad)
        ctx.dtype = query.dtype
        return rows

    @staticmethod
    def backward(ctx, grad):
        (unit_grad,) = ctx.saved_tensors
        return None, (unit_grad * grad[:, None]).to(ctx.dtype), *[None] * 5


class NCEPair(backends.Function):
    """Both anchors of CoDIR in one call. Also returns both z as updated; they and the banks have no gradient."""

    function = "nce_pair_loss"
    gradient_in_forward = True

    @staticmethod
    def forward(ctx, backend, query_a, query_b, *rest):
        rows, to_a, to_b, z_a, z_b = NCE_PAIR[backend].fwd(query_a, query_b, *rest)
        ctx.save_for_backward(to_a, to_b)
        ctx.dtypes = query_a.dtype, query_b.dtype
        ctx.mark_non_differentiable(z_a, z_b)
        if not torch.compiler.is_compiling():  # zeros for z would be two launches more
            ctx.set_materialize_grads(False)
        return rows, z_a, z_b

    @staticmethod
    def backward(ctx, grad, *_):
        (to_a, to_b), column = ctx.saved_tensors, grad[:, None]
        return None, (to_a * column).to(ctx.dtypes[0]), (to_b * column).to(ctx.dtypes[1]), *[None] * 8


class UnitLinear(backends.Function):
    """normalise(x W^T + bias). The forward saves the lengths, and the backward applies the normalisation's derivative first."""

    function = "unit_linear"

    @staticmethod
    def forward(ctx, x, weight, bias):
        unit, length = torch.ops.fastkd.unit_linear_fwd(x, weight, bias)
        ctx.save_for_backward(unit, length, x, weight)
        return unit

    @staticmethod
    def backward(ctx, grad):
        wanted = ctx.needs_input_grad
        gradients = torch.ops.fastkd.unit_linear_bwd(grad, *ctx.saved_tensors, wanted[0])
        return tuple(g if needed else None for g, needed in zip(gradients, wanted, strict=True))


def unit_linear(x, weight, bias, backend) -> Tensor:
    """Projects x [B, S] onto the unit sphere of D dimensions: normalise(x W^T + bias) [B, D]; 0 stays 0."""
    plain = x.dtype == weight.dtype == bias.dtype == torch.float32 and not torch.is_autocast_enabled(x.device.type)
    served = backend != "auto" or thresholds.serves("unit_linear", len(x)) == thresholds.KERNELS
    if plain and served and backends.choose("contrast", backend, x) == "cpu":
        return UnitLinear.apply(x, weight, bias)
    x = torch.nn.functional.linear(x.to(weight.dtype), weight, bias)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / torch.where(norm == 0, 1.0, norm)


def info_nce(query, positive, bank, index, inverse_temperature, exclude, scale, backend) -> Tensor:
    """InfoNCE per query, [B]. If bank is None, the other positives of the batch are the bank, and have a gradient."""
    if bank is None and exclude is None and backend == "auto" and by_cross_entropy(query, positive):
        if isinstance(inverse_temperature, Tensor):
            inverse_temperature = inverse_temperature.to(query.device, torch.float32).reshape(())
        with backends.full_precision(query):
            scores = query.float() @ positive.float().t() * inverse_temperature
            return F.cross_entropy(scores, torch.arange(len(query), device=query.device), reduction="none")
    if bank is None:
        bank = positive
        if exclude is None:
            own = torch.arange(query.shape[0], device=query.device)
            exclude = own, own
    why_not = _bank_reason(bank, trained_rows=index is not None or scale is not None, scale=scale)
    if isinstance(inverse_temperature, Tensor) and inverse_temperature.numel() != 1:
        why_not = "it takes one temperature for all queries"
    elif exclude is not None and any(ids.is_floating_point() for ids in exclude):
        why_not = "it compares integer ids"
    backend = _choose(backend, query, why_not)
    if backend == "reference":
        if bank is not positive and index is None:  # a bank that is not trained may change before the backward
            bank, scale = (x if x is None or x.requires_grad else x.clone() for x in (bank, scale))
        with backends.full_precision(query):
            return reference.info_nce(query, positive, bank, index, inverse_temperature, exclude, scale)
    if not isinstance(inverse_temperature, Tensor):
        inverse_temperature = torch.full((), inverse_temperature, dtype=torch.float64, device=query.device)
    query_ids, bank_ids = (None, None) if exclude is None else (ids.long() for ids in exclude)
    own, temperature = bank is positive, inverse_temperature.reshape(())
    positive = positive.float() if positive.dtype == torch.float64 else positive
    plain = query.dtype == bank.dtype == torch.float32 and index is None and scale is None
    # A bank with a gradient is shared, and has no scale.
    by_products = own or wants_gradient(bank) or (plain and _by_library(query, bank))
    if backend == "cpu" and by_products:
        others = None if own else bank, query_ids, None if bank_ids is query_ids else bank_ids
        return InfoNCEByProducts.apply(query, positive, temperature, *others)
    index, scale = (None if index is None else index.long()), (None if scale is None else scale.float())
    return InfoNCE.apply(backend, query, positive, temperature, bank, index, query_ids, bank_ids, scale)


def by_cross_entropy(query: Tensor, positive: Tensor) -> bool:
    """Whether "auto" takes cross_entropy for in-batch negatives. In half precision a CPU's kernels are faster at every size."""
    device = query.device.type
    dtypes = (torch.float32,) if device == "cpu" else (torch.float32, torch.bfloat16, torch.float16)
    alike = query.dtype == positive.dtype and query.dtype in dtypes
    return alike and thresholds.serves("in_batch", len(query), device) == thresholds.PYTORCH


def _by_library(query: Tensor, bank: Tensor) -> bool:
    return thresholds.serves("bank", len(query) * len(bank)) == thresholds.PYTORCH


def nce(query, bank, index, n_data, temperature, z, scale, backend) -> Tensor:
    """NCE per query, [B]."""
    why_not = _bank_reason(bank, trained_rows=True, scale=scale)
    if isinstance(z, Tensor) and (z.numel() != 1 or z.requires_grad):
        why_not = "z must be one number without a gradient"
    backend = _choose(backend, query, why_not)
    if backend == "reference":
        with backends.full_precision(query):
            return reference.nce(query, bank, index, n_data, temperature, z, scale)
    c = (index.shape[1] - 1) / n_data
    if isinstance(z, Tensor):
        log_z = z.to(query.device, torch.float64).reshape(()).log()
    else:
        log_z = torch.full((), math.log(z), dtype=torch.float64, device=query.device)
    shift = log_z + math.log(c + reference.EPS)
    constant = (index.shape[1] - 1) * (math.log(c) - math.log(c + reference.EPS))  # as in the reference
    scale = None if scale is None else scale.float()
    return NCE.apply(backend, query, bank, index.long(), shift, temperature, scale) - constant


def nce_pair(queries, banks, index, n_data, temperature, z, backend) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The mean of two anchors' NCE [B], each against its bank, and both z as updated."""
    why_not = next(filter(None, (_bank_reason(bank, trained_rows=True) for bank in banks)), None)
    if any(x.dtype != torch.float32 or x.dim() for x in z):
        why_not = "z must be one float32 number"
    chosen = _choose(backend, queries[0], why_not)
    if chosen != "reference":
        noise = (index.shape[1] - 1) / n_data + reference.EPS
        rows, *new_z = NCEPair.apply(chosen, *queries, *banks, index.long(), *z, noise, temperature, n_data)
        return rows, tuple(new_z)
    sides = list(zip(queries, banks, z, strict=True))
    new_z = [partition(query, bank, index, n_data, temperature, old, None, backend) for query, bank, old in sides]
    anchors = [
        nce(query, bank, index, n_data, temperature, torch.where(new > 0, new, 1.0), None, backend)
        for (query, bank, _), new in zip(sides, new_z, strict=True)
    ]
    return (anchors[0] + anchors[1]) / 2, tuple(new_z)


def partition(query, bank, index, n_data, temperature, z, scale, backend) -> Tensor:
    """NCE's normaliser: z if it is set, else this batch's, []."""
    why_not = _bank_reason(bank, scale=scale)
    if z.dtype != torch.float32 or z.dim():
        why_not = "z must be one float32 number"
    chosen = _choose(backend, query, why_not)
    if chosen != "reference":
        scale = None if scale is None else scale.detach().float()
        return PARTITION[chosen].fwd(query.detach(), bank.detach(), index.long(), z, temperature, n_data, scale)
    with backends.full_precision(query):
        return reference.partition(query, bank, index, n_data, temperature, z, scale)


def sample_negatives(index, count, n_data, labels, order, bounds, state, replacement, window, backend) -> Tensor:
    """Ids of other labels, or of neighbours, [B, count]. Every backend draws the same ids."""
    labels, order, bounds = (None if x is None else x.long() for x in (labels, order, bounds))
    arguments = index.long(), count, n_data, labels, order, bounds, state.long(), replacement, window
    chosen = backends.choose("contrast", backend, index[:0].float())
    if labels is not None and chosen != "cpu":  # the C++ kernel checks them itself
        fit = lambda: _labels_fit(index.long(), n_data, labels, order, bounds)  # noqa: E731
        rule = "expected classes 0 to C - 1, the ids sorted by class, and where each class begins"
        checks.values("labels", labels, fit, rule)
    if chosen != "reference" and (chosen == "cpu" or replacement or count <= MOST_DRAWS):
        return SAMPLE[chosen].fwd(*arguments)
    return sample_reference.sample_negatives(*arguments)


def _labels_fit(index, n_data, labels, order, bounds) -> Tensor:
    """Whether each class that the examples have begins and ends in `order` where `bounds` says, []."""
    own = labels[index]  # [B]
    known = (own >= 0) & (own < len(bounds) - 1)
    own = torch.where(known, own, 0)
    begin, end = bounds[own], bounds[own + 1]
    ends = order[torch.stack([begin, end - 1]).clamp(0, n_data - 1)]  # [2, B]
    known = known & (begin >= 0) & (begin < end) & (end <= n_data) & (ends >= 0) & (ends < n_data)
    return (known & (labels[ends.clamp(0, n_data - 1)] == own)).all()


def update_bank(bank, index, rows, momentum, scale, backend) -> None:
    """Move the bank's rows towards the new ones, in place."""
    why_not = _bank_reason(bank, scale=scale)
    if rows.dtype == torch.float64:
        rows = rows.to(torch.float64 if bank.dtype == torch.float64 else torch.float32)
    elif bank.shape[1] > 1 and bank.stride(1) != 1:
        why_not = "the rows of the bank are not contiguous"
    if scale is not None and scale.numel() > 1 and scale.stride(0) != 1:
        why_not = "the scale is not contiguous"
    chosen, index = _choose(backend, bank if scale is None else scale, why_not), index.long()
    if chosen != "reference":
        with torch.no_grad():
            return UPDATE[chosen].fwd(bank, index, rows.detach(), momentum, scale)
    with backends.full_precision(bank):
        bank_reference.update_bank(bank, index, rows, momentum, scale)


def _bank_reason(bank: Tensor, trained_rows: bool = False, scale: Tensor | None = None) -> str | None:
    """Why the kernels cannot take this bank, as a clause that follows "because"; None if they can."""
    if trained_rows and bank.requires_grad and torch.is_grad_enabled():
        return "the bank needs a gradient, which the kernels compute only for a shared bank without a scale"
    if scale is not None and scale.requires_grad and torch.is_grad_enabled():
        return "the scale needs a gradient, which the kernels do not compute"
    if scale is not None and bank.dtype == torch.float8_e4m3fn:
        return None
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
