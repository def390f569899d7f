"""contrast: a query against its positive and K negatives out of a bank, one number per query.

InfoNCE: -log e^p / (e^p + sum_k e^n_k) = softplus(lse_k n_k - p), scores p, n = <query, ·> / T.
NCE: with u = <query, ·> / T - log z and noise c = K / n_data, -log P/(P + c) - sum_k log c/(P_k + c) where P = e^u, as
softplus(log c - u_0) + sum_k softplus(u_k - log c), which has no e^u to overflow. (eps is added to c as released.)
"""

import math

import torch
import torch.nn.functional as F

EPS = 1e-7


def info_nce(query, positive, bank, index, inverse_temperature, exclude, scale):
    """[B,D], [B,D], [K,D]; index [B,K'] picks rows of the bank, None takes all; exclude drops equal ids -> rows [B]"""
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    query = query.to(dtype) * inverse_temperature  # [B, D]
    negatives = _scores(query, bank, index, dtype, scale)  # [B, K]
    if exclude is not None:
        query_ids, bank_ids = exclude
        bank_ids = bank_ids if index is None else bank_ids[index]  # [K] or [B, K]
        negatives = negatives.masked_fill(bank_ids == query_ids[:, None], -torch.inf)
    positive = (query * positive.to(dtype)).sum(-1)  # [B]
    return -F.logsigmoid(positive - negatives.logsumexp(-1))  # F.softplus is exact up to 20 only


def nce(query, bank, index, n_data, temperature, z, scale=None):
    """[B,D], [K,D], [B,1+K] with the positive in column 0, the normaliser z (number or tensor) -> rows [B]"""
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    log_z = z.to(dtype).log() if isinstance(z, torch.Tensor) else math.log(z)
    c = (index.shape[1] - 1) / n_data
    u = _scores(query.to(dtype) / temperature, bank, index, dtype, scale) - log_z - math.log(c + EPS)  # [B, 1 + K]
    constant = (index.shape[1] - 1) * (math.log(c) - math.log(c + EPS))  # what eps takes off each log c/(P + c + eps)
    return -F.logsigmoid(u[:, 0]) - F.logsigmoid(-u[:, 1:]).sum(-1) - constant


def partition(query, bank, index, n_data, temperature, z, scale=None):
    """z if it is set (> 0), else n_data · mean e^(<query, ·> / T) of this batch; 0 if no score is finite -> [] as z"""
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    scores = _scores(query.detach().to(dtype) / temperature, bank, index, dtype, scale)  # [B, 1 + K]
    finite = scores.isfinite()  # a NaN row must not be frozen into z
    mean = torch.where(finite, scores.exp(), 0).sum() / finite.sum().clamp_min(1)
    return torch.where(z > 0, z, (mean * n_data).clamp_max(torch.finfo(z.dtype).max).to(z.dtype))


def _scores(query, bank, index, dtype, scale):
    if index is None:
        scores = query @ bank.to(dtype).T  # [B, K]
    else:
        scores = (bank[index].to(dtype) @ query[:, :, None]).squeeze(-1)  # [B, K]
    return scores if scale is None else scores * (scale if index is None else scale[index]).to(dtype)
