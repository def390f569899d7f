"""linear_divergence with heads sharded over ranks, through the kernels of `divergence`; the logits of a shard are made once.

The gradient is made in the forward, for a chunk of rows at a time:

    s, t = x Ws^T, y Wt^T       [C, V / ranks], float32: this rank's shard
    rows, stats = fwd(s, t)     the divergence of the shard's own softmaxes, and their log-sum-exps
    exchange                    the log-sum-exps of whole rows, in float64 and equal on all ranks
    dZ = bwd(s, t, stats)       the shard's part of the gradient, from the statistics of the whole row
    dX = dZ Ws, summed over the ranks;  dW += dZ^T x

With P, Q the masses that the teacher and the student have in a shard, and p, q its own softmaxes, the forward KL of whole rows is
sum P KL(p || q) + sum P log(P / Q) over the shards, in which nothing cancels; soft_ce has the entropy besides. The other kinds
compare the p and q of a token in the whole row, so their values come from a second look at the logits.

A sparse teacher needs the student's logits at its k tokens and the log-sum-exp of the others: k + 1 numbers per row, which all
ranks compare alike.
"""

import ctypes
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastkd import backends, distributed
from fastkd.checks import KINDS
from fastkd.ops.divergence import KERNELS
from fastkd.ops.gemm import product
from fastkd.reference.divergence_topk import compared

ROWS = {"cpu": 256, "triton": 2048}  # of a chunk; between two chunks the gradient of the head is read and written
# fwd(s, t, stats, kind, temperature, mix) -> [N, 3], sums over the shard of the value, q and q (h - centre); bwd(x, temperature)
# -> [N], the log-sum-exp in float64.
SHARD = backends.kernels("divergence", "divergence_shard_terms", "divergence_log_sum_exp")
backends.fake("divergence_shard_terms", lambda s, *_: s.new_empty(s.shape[0], 3, dtype=torch.float64))
backends.fake("divergence_log_sum_exp", lambda x, _: x.new_empty(x.shape[0], dtype=torch.float64))


class Shard(NamedTuple):
    """A rank's shard of the vocabulary. first: its first token's id, a tensor on the device; 0 where no ids are asked for."""

    backend: str
    group: dist.ProcessGroup
    first: Tensor | int

    def of_each_rank(self, x: Tensor) -> Tensor:
        """[ranks, ...], equal on all ranks."""
        return distributed.gather_rows(x.contiguous(), self.group).view(-1, *x.shape)

    def at(self, logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(logits [N, k] of the token ids [N, k], 0 where another rank has the token; where this one has it; the columns)."""
        place = ids - self.first
        here = (place >= 0) & (place < logits.shape[1])
        place = place.clamp(0, logits.shape[1] - 1)
        return torch.where(here, logits.gather(1, place), 0), here, place


@torch.no_grad()
def fwd_grad(
    shard: Shard, weights, hidden, head, bias, t_hidden, t_head, t_bias, indices, log_probs, tail, mask, labels,
    kind, temperature, mix, factor, hard, scale, cap, t_scale, t_cap, to_hidden, to_head, to_bias,
):  # fmt: skip
    """Rows [N, 1], and the gradients of sum weights * rows: of `hidden` that of all shards, of head and bias the shard's."""
    if mask is not None:  # a masked row may hold NaN, and 0 times that would reach the head's gradient
        hidden, t_hidden = (x if x is None else x.masked_fill(~mask[:, None], 0) for x in (hidden, t_hidden))
    student, teacher = (head, bias, scale, cap), (t_head, t_bias, t_scale, t_cap)
    rows, dtype = hidden.new_zeros(len(hidden), 1, dtype=torch.float32), _operand(hidden, head)
    of_hidden, of_head = rows.new_zeros(len(hidden) if to_hidden else 0, hidden.shape[1]), None
    of_bias = rows.new_zeros(len(head) if to_bias else 0, 1)
    of_logits = to_hidden or to_head or to_bias
    for begin in range(0, len(hidden), ROWS[shard.backend]):
        part = slice(begin, begin + ROWS[shard.backend])
        some = [None if x is None else x[part] for x in (weights, mask, indices, log_probs, tail, labels)]
        w, keep, ids, log_p, rest, label = some
        s = _logits(hidden[part], *student)  # [C, V / ranks]
        if indices is None:
            t = _logits(t_hidden[part], *teacher)
            value, grad = _dense(shard, s, t, keep, kind, temperature, mix, w * factor, of_logits)
        else:
            value, grad = _sparse(shard, s, (ids, log_p, rest), keep, kind, temperature, mix, w * factor, of_logits)
        value = factor * value
        if hard:
            value = value + hard * _cross_entropy(shard, s, label, w * hard, grad)
        rows[part, 0] = value.float() if keep is None else value.float().masked_fill(~keep, 0)
        if not of_logits:
            continue
        if scale != 1 or cap:
            grad *= scale * (1 - (s / cap).square()) if cap else scale
        if to_bias:
            of_bias[:, 0] += grad.sum(0)
        grad, x = grad.to(dtype), hidden[part].to(dtype)
        if to_hidden:
            of_hidden[part] = product(grad, head.to(dtype).t())
        if to_head:
            of_head = product(grad.t(), x.t(), of_head)
    if to_hidden:
        dist.all_reduce(of_hidden, group=shard.group)
    if of_head is None:  # nobody asks for it, or there are no rows
        of_head = rows.new_zeros(len(head) if to_head else 0, head.shape[1])
    return rows, of_hidden, of_head.bfloat16() if head.dtype == torch.bfloat16 else of_head, of_bias


def recomputed(shard: Shard) -> backends.Kernels:
    """As RECOMPUTED of linear_divergence, without statistics: the backward computes all of it again."""

    def fwd(hidden, *rest):
        rows = fwd_grad(shard, torch.zeros_like(hidden[:, 0]), hidden, *rest, False, False, False)[0]
        return rows, rows.new_empty(0)

    return backends.Kernels(fwd, lambda grad, _, *rest: fwd_grad(shard, grad, *rest)[1:])


def _operand(hidden: Tensor, head: Tensor) -> torch.dtype:
    """What the gradient of the logits is rounded to for its products: float16 would need the loss scale, which comes later."""
    return torch.bfloat16 if hidden.dtype == head.dtype == torch.bfloat16 else torch.float32


def _logits(hidden, head, bias, scale, cap) -> Tensor:
    x = product(hidden, head)
    if bias is not None:
        x += bias
    if scale != 1:
        x *= scale
    return x.div_(cap).tanh_().mul_(cap) if cap else x


def _dense(shard, s, t, mask, kind, temperature, mix, w, wanted) -> tuple[Tensor, Tensor | None]:
    """The divergence [C] of whole rows, and the gradient of sum w * divergence by s."""
    kernels, name = KERNELS["dense"][shard.backend], KINDS[kind]
    direct = name in ("forward_kl", "soft_ce", "mse")
    rows, stats = kernels.fwd(s, t, mask, kind if direct else KINDS.index("forward_kl"), temperature, mix)
    if name == "mse":
        value = shard.of_each_rank(rows.double()).sum(0)
    else:
        value, stats = _whole(shard, rows, stats, name, temperature)
    if not direct:
        value, stats = _second_look(shard, s, t, stats, name, temperature, mix)
    return value, kernels.bwd(w, s, t, mask, stats, kind, temperature, mix) if wanted else None


def _whole(shard, rows, stats, name, temperature) -> tuple[Tensor, Tensor]:
    """forward_kl or soft_ce [C] of whole rows, and their statistics [C, 7] but the last two, from those of a shard's softmaxes: a
    reference and the sum of exponentials relative to it of each side, and kappa (csrc/cpu/divergence/op.h)."""
    per_T = ctypes.c_float(1 / temperature).value  # as the kernels have it
    every = shard.of_each_rank(torch.cat([rows[:, None], stats[:, :5]], -1).double())  # [ranks, C, 6]
    own, ref_s, ref_t, sum_s, sum_t, kappa = every.unbind(-1)
    log_t = ref_t * per_T + sum_t.log()  # [ranks, C], the log-sum-exps
    log_s = torch.where(kappa.abs() < 0.5, log_t + (ref_s - ref_t) * per_T + kappa, ref_s * per_T + sum_s.log())
    all_t, all_s = log_t.logsumexp(0), log_s.logsumexp(0)  # [C]
    P, Q, gap = (log_t - all_t).exp(), (log_s - all_s).exp(), all_s - all_t
    if name == "soft_ce":
        value = torch.where(P == 0, 0, P * (own - (log_s - all_s))).sum(0)
    else:
        e = log_s - log_t - gap  # log(Q / P)
        of_masses = torch.where(e.abs() < 1, P * (e.expm1() - e), Q - P - P * e)
        value = torch.where(P == 0, Q, P * own + of_masses).sum(0)
    none = (all_s == -torch.inf) & (all_t == -torch.inf)  # no token exists on either side
    ref_s, ref_t = (ref.masked_fill(total == 0, -torch.inf).amax(0) for ref, total in ((ref_s, sum_s), (ref_t, sum_t)))
    ref_s = torch.where(ref_s == -torch.inf, ref_t, ref_s)
    sums = [(x - ref * per_T).exp() for x, ref in ((all_s, ref_s), (all_t, ref_t))]
    whole = torch.stack([ref_s, ref_t, *sums, gap - (ref_s - ref_t) * per_T], -1).float()
    blank = whole.new_tensor([0, 0, 1, 1, 0])
    whole = torch.where(none[:, None], blank, whole)
    return value.masked_fill(none, 0), torch.cat([whole, whole.new_zeros(len(whole), 2)], -1)


def _second_look(shard, s, t, stats, name, temperature, mix) -> tuple[Tensor, Tensor]:
    """The values [C], and the statistics with a centre and the mean of h - centre under q. The kind's h is known up to a constant:
    where it is nearly the same wherever q has mass, h less its mean would cancel, so the mean is taken in two steps."""
    for last in (False, True):
        terms = SHARD[shard.backend].fwd(s, t, stats, KINDS.index(name), temperature, mix)
        value, mass, slope = shard.of_each_rank(terms).sum(0).unbind(-1)
        mean = (slope / mass).nan_to_num(0, 0, 0)
        if name == "skew_kl":  # h - mix is taken without subtracting
            mean = mean if last else torch.where(mean > 0.5 * mix, mix, mean)
        stats[:, 6 if last else 5] = mean
    return value, stats


def _sparse(shard, s, teacher, mask, kind, temperature, mix, w, wanted) -> tuple[Tensor, Tensor | None]:
    """The same from a sparse teacher (ids, log-probabilities, log-mass of the rest or None)."""
    ids, log_probs, tail = teacher
    own, here, place = shard.at(s, ids)
    others = s.clone()  # without the k tokens
    _add_at(others, place, torch.where(here, -torch.inf, 0))
    log_rest = SHARD[shard.backend].bwd(others, temperature)
    every = shard.of_each_rank(torch.cat([log_rest[:, None], own.double() / temperature], -1))  # [ranks, C, 1 + k]
    rest, at_k = every[..., :1].logsumexp(0), every[..., 1:].sum(0)
    has_rest = rest != -torch.inf
    rest = rest.masked_fill(~has_rest, 0)
    masked = torch.zeros_like(has_rest) if mask is None else ~mask[:, None]
    with torch.enable_grad():
        at_k, rest = at_k.requires_grad_(wanted), rest.requires_grad_(wanted)
        value = compared(
            at_k.masked_fill(masked, 0), rest, has_rest, log_probs.masked_fill(masked, 0), tail, masked, KINDS[kind],
            1 - mix, 1 - mix,
        )  # fmt: skip
        if not wanted:
            return value, None
        of_k, of_rest = torch.autograd.grad(value.sum(), (at_k, rest))
    w = w.double()[:, None] / temperature
    raw = rest.detach() * temperature
    high = raw.float()
    grad = others.sub_(high).sub_((raw - high).float()).mul_(1 / temperature).exp_().mul_((w * of_rest).float())
    _add_at(grad, place, torch.where(here, w * of_k, 0))
    return value.detach(), grad


def _cross_entropy(shard, s, labels, w, grad) -> Tensor:
    """[C], at temperature 1; the gradient of sum w * it is added to `grad`, unless that is None."""
    own, here, place = shard.at(s, labels[:, None])
    every = shard.of_each_rank(torch.cat([SHARD[shard.backend].bwd(s, 1.0)[:, None], own.double()], -1))
    log_sum, label = every[..., 0].logsumexp(0), every[..., 1].sum(0)
    if grad is not None:
        grad += (s - log_sum[:, None].float()).exp_().mul_(w[:, None])
        _add_at(grad, place, torch.where(here, -w[:, None], 0))
    return log_sum - label


def _add_at(x: Tensor, columns: Tensor, values: Tensor) -> None:
    """x [C, V] += values [C, k] at these columns [C, k], in place."""
    rows = torch.arange(len(x), device=x.device)[:, None]
    x.index_put_((rows, columns), values.to(x.dtype), accumulate=True)
