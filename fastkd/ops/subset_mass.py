"""How much of a teacher's probability lies on a part of its words, from hidden states and head: a block of logits at a time."""

import torch
from torch import Tensor

from fastkd import backends

ROWS, WORDS = 1024, 1024  # of a block


@torch.library.custom_op("fastkd::kept_log_mass", mutates_args=())
def _log_mass(
    hidden: Tensor, head: Tensor, bias: Tensor | None, kept: Tensor, dropped: Tensor, mask: Tensor | None, backend: str,
    temperature: float, scale: float, cap: float, double: bool, num_valid: int | None,
) -> Tensor:  # fmt: skip
    where, counted = None, hidden
    if mask is not None:
        most = num_valid if hidden.is_cuda else int(mask.sum())  # a look at the CPU is free
        if most is not None:
            where = torch.nonzero_static(mask, size=most, fill_value=0)[:, 0]
        counted = hidden.masked_fill(~mask[:, None], 0) if where is None else hidden[where]
    args = (head, bias, backend, 1 / temperature, scale, cap, double)
    with backends.full_precision(hidden):
        sums = [[_log_sum(rows, ids, *args) for ids in (kept, dropped)] for rows in counted.split(ROWS)]
    of_kept, of_dropped = (torch.cat(parts) for parts in zip(*sums, strict=True))
    found = -torch.logaddexp(of_dropped - of_kept, torch.zeros_like(of_kept))
    if where is not None:
        found = found.new_zeros(len(hidden)).index_copy_(0, where, found)
    return found if mask is None else found.masked_fill_(~mask, 0)


@_log_mass.register_fake
def _(hidden, *_):
    return hidden.new_empty(hidden.shape[0], dtype=torch.float64)


def _log_sum(hidden, ids, head, bias, backend, inverse_temperature, scale, cap, double) -> Tensor:
    """log of the sum over the words `ids` of e^(logit / T), [N] in float64."""
    parts = []
    for words in ids.split(WORDS):
        x = _product(hidden, head[words], backend, double)  # [N, words]
        if bias is not None:
            x += bias[words]
        x *= scale
        x = x.div_(cap).tanh_().mul_(cap) if cap else x
        top = x.amax(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).min)
        total = (x - top).mul_(inverse_temperature).exp_().sum(-1, dtype=torch.float64)
        parts.append(top[:, 0].double() * inverse_temperature + total.log())
    return torch.stack(parts).logsumexp(0)


def _product(x: Tensor, head: Tensor, backend: str, double: bool) -> Tensor:
    """x head^T, its sums not rounded to what the operands are."""
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
    """log sum of softmax(logits / T) over the words `kept`, [N] in float64, masked rows 0; kept and dropped [..] are all
    words together. teacher: (hidden [N, D], head [V, D], bias [V] or None); `like`: whose precision counts, the student's.
    """
    backend = backends.choose("linear_divergence", backend, like)
    hidden, head, bias = teacher
    args = (options.temperature, options.scales[1], options.caps[1], like.dtype == torch.float64, num_valid)
    return _log_mass(hidden.detach(), head.detach(), bias, kept, dropped, mask, backend, *args)
