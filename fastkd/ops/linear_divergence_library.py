"""linear_divergence in float32 where the library multiplies faster than our tile: a chunk of rows at a time,

s, t = x Ws^T, y Wt^T       [C, V], by torch.mm
rows, t <- dZ               one kernel
dX = dZ Ws, dW += dZ^T x    by torch.mm
"""

import torch
from torch import Tensor

from fastkd import backends, thresholds

LOGITS = 1 << 24  # of a side that exist at once, within
FEWEST_ROWS, MOST_ROWS = 128, 512  # between two chunks the gradient of the head is read and written


def serves(hidden: Tensor, head: Tensor, t_hidden: Tensor | None, t_head: Tensor | None) -> bool:
    """Whether this is the faster way for these tensors. A compiled graph has no sizes that depend on a mask."""
    tensors = (x for x in (hidden, head, t_hidden, t_head) if x is not None)
    if torch.compiler.is_compiling() or any(x.dtype != torch.float32 for x in tensors):
        return False
    return thresholds.serves("linear_divergence", len(hidden) * len(head)) == thresholds.PYTORCH


def fwd_grad(
    weights, hidden, head, bias, t_hidden, t_head, t_bias, indices, log_probs, tail, mask, labels, *numbers
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As GRADIENT_IN_FORWARD of linear_divergence."""
    by_row, of_vocabulary = (weights, hidden, t_hidden, indices, log_probs, tail, labels), (head, bias, t_head, t_bias)
    if mask is None or mask.all():
        return _of_valid_rows(by_row, of_vocabulary, *numbers)
    where = torch.nonzero_static(mask, size=int(mask.sum()))[:, 0]  # a masked row may hold NaN
    rows, of_hidden, *others = _of_valid_rows((x if x is None else x[where] for x in by_row), of_vocabulary, *numbers)
    spread = lambda x: x.new_zeros(len(mask), x.shape[1]).index_copy_(0, where, x)  # noqa: E731
    return spread(rows), spread(of_hidden) if numbers[-3] else of_hidden, *others


@torch.no_grad()
def _of_valid_rows(by_row, of_vocabulary, *numbers):
    (weights, hidden, *others), (head, bias, t_head, t_bias) = by_row, of_vocabulary
    *numbers, to_hidden, to_head, to_bias = numbers
    rows, tokens = len(hidden), len(head)
    step = min(max(LOGITS // tokens, FEWEST_ROWS), MOST_ROWS, max(rows, 1))
    s_memory, t_memory = (hidden.new_empty(step, tokens) for _ in range(2))
    value, of_hidden = hidden.new_empty(rows, 1), hidden.new_empty(rows if to_hidden else 0, hidden.shape[1])
    of_head = (hidden.new_empty if to_head and rows else hidden.new_zeros)(tokens if to_head else 0, hidden.shape[1])
    of_bias = hidden.new_zeros(tokens if to_bias else 0, 1)
    with backends.full_precision(hidden):
        for begin in range(0, rows, step):
            part = slice(begin, begin + step)
            x, (y, *sparse, label) = hidden[part], (z if z is None else z[part] for z in others)
            s, t = s_memory[: len(x)], t_memory[: len(x)]
            torch.mm(x, head.t(), out=s)
            if y is not None:
                torch.mm(y, t_head.t(), out=t)
            found = torch.ops.fastkd.linear_divergence_rows(
                s, t, weights[part], x, head, bias, y, t_head, t_bias, *sparse, None, label, *numbers, to_bias
            )
            value[part] = found[0]
            if to_bias:
                of_bias += found[1]
            if to_hidden:
                torch.mm(t, head, out=of_hidden[part])
            if to_head:
                torch.addmm(of_head, t.t(), x, beta=float(begin > 0), out=of_head)
    return value, of_hidden, of_head, of_bias
