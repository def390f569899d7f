"""InfoNCE on a CPU through the library's products, with one kernel between them: for a bank that has a gradient too, and
where they are faster. ops/contrast.py says when."""

import torch
from torch import Tensor

from fastkd import backends
from fastkd.ops.gemm import product

SOFTMAX = backends.kernels("contrast", "info_nce_softmax", "info_nce_softmax", only=("cpu",))
SCORES = 1 << 24  # that exist at once, and up to which they are saved for the backward
backends.fake("info_nce_softmax", lambda scores, *_: (scores.new_empty(len(scores)), scores.new_empty(len(scores))))


def gradients_of_queries(grad, query, inverse, unit_grad, weight, wanted, positive_dtype, temperature_dtype) -> list:
    """The gradients of queries, positives and 1 / T that are wanted."""
    to_query = to_positive = to_inverse = None
    scaled = (grad * inverse).float()[:, None]  # [B, 1]
    if wanted[0]:
        to_query = (unit_grad * scaled).to(query.dtype)
    if wanted[1]:
        to_positive = (query * (scaled * -weight[:, None])).to(positive_dtype)
    if wanted[2]:
        slope = (query.double() * unit_grad).sum(-1)  # [B]
        to_inverse = (grad * slope).sum().to(temperature_dtype)
    return [to_query, to_positive, to_inverse]


class InfoNCEByProducts(backends.Function):
    """The library's products form the scores S = query bank^T, some rows at a time, and the kernel replaces them by
    W = w softmax(S / T); d query = (W bank - w positive) / T and d bank = W^T query / T. If one chunk has all rows, W is saved for
    the backward, which otherwise computes it again."""

    function = "info_nce_loss"

    @staticmethod
    def forward(ctx, query, positive, inverse_temperature, bank, query_ids, bank_ids):
        """bank: None where the positives are the bank, and bank_ids where they are the queries': torch.compile takes no tensor
        twice."""
        ctx.in_batch, bank = bank is None, positive if bank is None else bank
        bank_ids = query_ids if bank_ids is None else bank_ids
        ctx.trains_bank = ctx.needs_input_grad[1 if ctx.in_batch else 3]
        inputs = query, positive, inverse_temperature.to(query.device, torch.float64), bank, query_ids, bank_ids
        chunks, keys = [], bank.float().t()
        for part, scores, rows, weight in _weights(*inputs):
            unit_grad = rows.new_empty(0)
            if ctx.needs_input_grad[0] or ctx.needs_input_grad[2]:
                unit_grad = product(scores, keys).addcmul_(positive[part].float(), weight[:, None], value=-1)
            chunks.append((rows, weight, unit_grad))
        rows, weight, unit_grad = chunks[0] if len(chunks) == 1 else map(torch.cat, zip(*chunks, strict=True))
        trained = (positive, bank, query_ids, bank_ids, *([scores] if len(chunks) == 1 else []))
        ctx.save_for_backward(query, inputs[2], unit_grad, weight, *(trained if ctx.trains_bank else ()))
        ctx.dtypes = positive.dtype, inverse_temperature.dtype
        return rows

    @staticmethod
    def backward(ctx, grad):
        (query, inverse, unit_grad, weight, *trained), wanted = ctx.saved_tensors, [*ctx.needs_input_grad[:3]]
        wanted[1] = wanted[1] and not ctx.in_batch
        gradients = [*gradients_of_queries(grad, query, inverse, unit_grad, weight, wanted, *ctx.dtypes), None]
        if ctx.trains_bank:
            positive, bank, query_ids, bank_ids, *saved = trained
            factor = (grad * inverse).float()[:, None]  # [B, 1]
            queries, sums = (query * factor).float().t(), None
            again = saved or (x[1] for x in _weights(query, positive, inverse, bank, query_ids, bank_ids))
            for scores, part in zip(again, queries.split(len(query) if saved else _rows(bank), 1), strict=True):
                sums = product(scores.t(), part, sums)
            if ctx.in_batch:
                sums.addcmul_(query.float(), factor * weight[:, None], value=-1)
            gradients[1 if ctx.in_batch else 3] = sums.to(bank.dtype)
        return *gradients, None, None


def _rows(bank: Tensor) -> int:
    return max(SCORES // max(len(bank), 1), 1)


def _weights(query, positive, inverse, bank, query_ids, bank_ids):
    """Rows at a time: (these rows, their W [C, K], their loss [C], their w [C]). There is at least one chunk."""
    queries, keys = query.float(), bank.float()
    for begin in range(0, max(len(query), 1), _rows(bank)):
        part = slice(begin, begin + _rows(bank))
        scores = product(queries[part], keys)
        ids = None if query_ids is None else query_ids[part]
        yield part, scores, *SOFTMAX["cpu"].fwd(scores, query[part], positive[part], inverse, ids, bank_ids)
