"""A query against negatives: InfoNCE, and CRD's noise-contrastive estimation with its bank (CoDIR)."""

import torch


def info_nce(query, positive, bank, index, temperature, exclude=None, scale=None):
    """-log e^p / (e^p + sum_k e^n_k) = log(1 + sum_k e^(n_k - p)), scores p of the positive, n of the negatives: rows [B]."""
    in_batch = bank is None
    bank = positive if in_batch else bank if scale is None else bank * scale[:, None]
    of_bank = torch.arange(len(bank)).expand(len(query), -1) if index is None else index  # [B, K]
    allowed = torch.ones_like(of_bank, dtype=torch.bool)
    if in_batch:
        allowed = of_bank != torch.arange(len(query))[:, None]
    if exclude is not None:
        allowed = allowed & (exclude[1][of_bank] != exclude[0][:, None])
    rows = []
    for q, p, mine, ok in zip(query, positive, of_bank, allowed, strict=True):
        against = (bank[mine[ok]] @ q / temperature).logsumexp(0) - q @ p / temperature
        rows.append(torch.logaddexp(against, 0 * against) if ok.any() else 0 * (q @ p))
    return torch.stack(rows)


def nce(query, bank, index, n_data, temperature, z, scale=None):
    """index [B, K + 1], the positive first -> -log p0 / (p0 + c + eps) - sum_k log c / (pk + c + eps), rows [B]"""
    bank = bank if scale is None else bank * scale[:, None]
    p = ((bank[index] * query[:, None]).sum(-1) / temperature).exp() / z  # [B, K + 1]
    c, eps = (index.shape[1] - 1) / n_data, 1e-7
    return -(p[:, 0] / (p[:, 0] + c + eps)).log() - (c / (p[:, 1:] + c + eps)).log().sum(1)


def partition(query, bank, index, n_data, temperature):
    return ((bank[index] * query[:, None]).sum(-1) / temperature).exp().mean() * n_data


def moved(bank, index, rows, momentum):
    """The bank after it has moved towards the rows of distinct examples."""
    new = momentum * bank[index] + (1 - momentum) * rows
    return bank.index_copy(0, index, new / new.norm(dim=1, keepdim=True))
