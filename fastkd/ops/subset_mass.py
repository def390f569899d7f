"""The probability that a teacher gives to some tokens of its vocabulary, from hidden states and head, in blocks of logits."""

import torch
from torch import Tensor

from fastkd import backends

ROWS, TOKENS = 1024, 1024  # of a block


@torch.library.custom_op("fastkd::kept_log_mass", mutates_args=())
def _log_mass(
    hidden: Tensor, head: Tensor, bias: Tensor | None, kept: Tensor, dropped: Tensor, mask: Tensor | None, backend: str,
    temperature: float, scale: float, cap: float, double: bool, num_valid: int | None,
) -> Tensor:  # fmt: skip
    where, valid_hidden = None, hidden
    if mask is not None:
        most = num_valid if hidden.is_cuda else int(mask.sum())  # on the CPU this does not synchronise
        if most is not None:
            where = torch.nonzero_static(mask, size=most, fill_value=0)[:, 0]
        valid_hidden = hidden.masked_fill(~mask[:, None], 0) if where is None else hidden[where]
    args = (head, bias, backend, 1 / temperature, scale, cap, double)
    with backends.full_precision(hidden):
        sums = [[_log_sum(rows, ids, *args) for ids in (kept, dropped)] for rows in valid_hidden.split(ROWS)]
    kept_sum, dropped_sum = (torch.cat(parts) for parts in zip(*sums, strict=True))
    log_mass = -torch.logaddexp(dropped_sum - kept_sum, torch.zeros_like(kept_sum))
    if where is not None:
        log_mass = log_mass.new_zeros(len(hidden)).index_copy_(0, where, log_mass)
    return log_mass if mask is None else log_mass.masked_fill_(~mask, 0)


@_log_mass.register_fake
def _(hidden, *_):
    return hidden.new_empty(hidden.shape[0], dtype=torch.float64)


def _log_sum(hidden, ids, head, bias, backend, inverse_temperature, scale, cap, double) -> Tensor:
    """log of the sum over the tokens `ids` of e^(logit / T), [N] in float64."""
    parts = []
    for some in ids.split(TOKENS):
        x = _product(hidden, head[some], backend, double)  # [N, TOKENS]
        if bias is not None:
            x += bias[some]
        x *= scale
        x = x.div_(cap).tanh_().mul_(cap) if cap else x
        top = x.amax(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).min)
        total = (x - top).mul_(inverse_temperature).exp_().sum(-1, dtype=torch.float64)
        parts.append(top[:, 0].double() * inverse_temperature + total.log())
    return torch.stack(parts).logsumexp(0)


def _product(x: Tensor, head: Tensor, backend: str, double: bool) -> Tensor:
    """x head^T; its sums are not rounded to the dtype of the operands."""
    if double:
        return x.double() @ head.double().t()
    if x.dtype != head.dtype:
        x, head = x.float(), head.float()
    if backend == "cpu":
        return torch.ops.fastkd.gemm_nt(x, head)
    if x.is_cuda and x.dtype != torch.float32:
        return torch.mm(x, head.t(), out_dtype=torch.float32)
    return x.float() @ head.float().t()


def kept_log_mass(teacher, kept, dropped, mask, options, like, num_valid, backend) -> Tensor:
    """log sum of softmax(logits / T) over the tokens `kept`, [N] in float64; masked rows are 0. kept and dropped are ids that
    make up the vocabulary. teacher: (hidden [N, D], head [V, D], bias [V] or None); `like`: a tensor of the student, whose
    dtype decides the precision."""
    backend = backends.choose("linear_divergence", backend, like)
    hidden, head, bias = teacher
    args = (options.temperature, options.scales[1], options.caps[1], like.dtype == torch.float64, num_valid)
    return _log_mass(hidden.detach(), head.detach(), bias, kept, dropped, mask, backend, *args)
