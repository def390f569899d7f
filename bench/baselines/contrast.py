"""Contrastive losses and CoDIR's step: eager PyTorch (InfoNCE as MoCo writes it), and CoDIR's way."""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from fastkd import functional, reductions

EPS = 1e-7


def eager_info_nce(query, positive, bank=None, index=None, temperature=0.07):
    """Scores side by side, cross-entropy of the first -> [B]; without a bank the other rows' positives are negatives."""
    if bank is None:
        return F.cross_entropy(query @ positive.mT / temperature, torch.arange(len(query), device=query.device),
                               reduction="none")  # fmt: skip
    first = (query * positive).sum(-1, keepdim=True)  # [B, 1]
    others = (
        query.to(bank.dtype) @ bank.mT if index is None else (bank[index] @ query[:, :, None]).squeeze(-1)
    )  # [B, K]
    scores = torch.cat((first, others.to(query.dtype)), 1) / temperature
    return F.cross_entropy(scores, torch.zeros(len(scores), dtype=torch.long, device=scores.device), reduction="none")


def eager_nce(query, bank, index, n_data, temperature, z):
    """Column 0 of index [B, 1 + K] is the positive -> [B]."""
    count = index.shape[1] - 1
    noise = count / n_data
    scores = torch.einsum("bkd,bd->bk", bank[index], query)
    u = scores / temperature - (math.log(z) + math.log(noise + EPS))
    dropped = count * (math.log(noise) - math.log(noise + EPS))
    return F.softplus(-u[:, 0]) + F.softplus(u[:, 1:]).sum(-1) - dropped


def authors_info_nce(query, positive, bank, index=None, *, temperature=0.07, reduction="mean"):
    """CoDIR released NCE alone."""
    return reductions.reduce(eager_info_nce(query, positive, bank, index, temperature), None, reduction)


def authors_nce(query, bank, index, *, n_data, temperature, z, reduction="mean"):
    """Rows gathered into [B, K + 1, D], a bmm, exp over Z, two logarithms with their eps."""
    batch, columns = index.shape
    noise = (columns - 1) / n_data
    rows = torch.index_select(bank, 0, index.reshape(-1)).view(batch, columns, -1)
    p = torch.exp(torch.bmm(rows, query.reshape(batch, -1, 1)) / temperature).squeeze(-1) / z
    first = torch.log(p[:, 0] / (p[:, 0] + noise + EPS))
    second = torch.log(torch.full_like(p[:, 1:], noise) / (p[:, 1:] + noise + EPS))
    return reductions.reduce(-first - second.sum(-1), None, reduction)


def authors_nce_pair(queries, banks, index, *, z, reduction="mean", **options):
    sides = list(zip(queries, banks, z, strict=True))
    z = tuple(functional.nce_partition(q, bank, index, z=x, backend="reference", **options) for q, bank, x in sides)
    losses = [authors_nce(q, bank, index, z=x.item(), reduction=reduction, **options)
              for (q, bank, _), x in zip(sides, z, strict=True)]  # fmt: skip
    return sum(losses) / 2, z


# Cases ------------------------------------------------------------------------------------------------------------


def eager_case(x: dict, options: dict):
    if "labels" in x:
        return eager_step(x, options)
    if "positive" in x:
        return eager_info_nce(x["query"], x["positive"], x.get("bank"), temperature=options["temperature"]).mean()
    return both_anchors(x, options, eager_nce)


def authors_case(x: dict, options: dict):
    return authors_step(x, options) if "labels" in x else both_anchors(x, options, authors_nce)


def both_anchors(x: dict, options: dict, nce: Callable):
    sides = (x["query_t"], x["bank_s"]), (x["query_s"], x["bank_t"])
    options = {name: options[name] for name in ("n_data", "temperature", "z")}
    return sum(nce(query, bank, x["index"], **options).mean() for query, bank in sides)


def projections(x: dict) -> tuple:
    """CoDIR's Embed on either side: on the unit sphere, [B, D]."""
    sides = (F.linear(x[f"f_{side}"], x[f"weight_{side}"], x[f"bias_{side}"]) for side in "st")
    return tuple(v / v.pow(2).sum(1, keepdim=True).sqrt() for v in sides)


@torch.no_grad()
def move_rows(bank, idx, v, momentum: float) -> None:
    rows = bank.index_select(0, idx) * momentum + v * (1 - momentum)
    bank.index_copy_(0, idx, rows / rows.pow(2).sum(1, keepdim=True).sqrt())


def step_of(x: dict, options: dict, index, nce: Callable):
    v_s, v_t = projections(x)
    sides = {"query_s": v_s, "query_t": v_t, "bank_s": x["bank_s"], "bank_t": x["bank_t"], "index": index}
    loss = both_anchors(sides, {**options, "n_data": x["bank_s"].shape[0]}, nce) / 2
    for bank, v in ((x["bank_s"], v_s), (x["bank_t"], v_t)):
        move_rows(bank, x["idx"], v, options["momentum"])
    return loss


def eager_step(x: dict, options: dict):
    """Negatives drawn on the device, with replacement: a place among the ids by class that skips the own class."""
    if "index" in x:
        return step_of(x, options, x["index"], eager_nce)
    own = x["labels"][x["idx"]]
    start, size = x["bounds"][own], x["bounds"][own + 1] - x["bounds"][own]  # [B]
    uniform = torch.rand(len(own), options["k"], device=own.device, dtype=torch.float64)
    place = (uniform * (x["order"].shape[0] - size)[:, None]).long()
    negatives = x["order"][place + torch.where(place >= start[:, None], size[:, None], 0)]  # [B, K]
    return step_of(x, options, torch.cat((x["idx"][:, None], negatives), 1), eager_nce)


def authors_step(x: dict, options: dict):
    """CoDIR: numpy draws for one example after another, and a copy to the device."""
    if "index" in x:
        return step_of(x, options, x["index"], authors_nce)
    pools = [ids.cpu().numpy() for ids in x["others"]]
    scarce = options["k"] >= min(map(len, pools))
    rows = [np.concatenate(([i], np.random.choice(pools[x["labels"][i]], options["k"], replace=scarce)))
            for i in x["idx"].tolist()]  # fmt: skip
    index = torch.from_numpy(np.stack(rows)).to(x["idx"].device)
    return step_of(x, options, index, authors_nce)
