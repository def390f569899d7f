"""linear_divergence: `divergence` between two models' logits, hidden @ head.T + bias, from hidden states and heads.

Logits are scaled, then capped: cap tanh(scale x / cap). The result is factor times the divergence plus hard times the
cross-entropy with the labels, at temperature 1.
"""

import torch

from .divergence import divergence
from .divergence_topk import divergence_topk


def linear_divergence(
    student_hidden, student_head, student_bias, teacher_hidden, teacher_head, teacher_bias,
    mask, kind, temperature, beta, alpha, *, topk=None, labels=None, factor=1.0, hard=0.0, scales=(1.0, 1.0), caps=(0.0, 0.0),
):  # fmt: skip
    """hidden [N,D], head [V,D], bias [V], mask, labels [N] -> rows [N]. topk (indices, log_probs, tail) is a sparse teacher,
    which has neither hidden nor head."""
    dtype = torch.float64 if student_hidden.dtype == torch.float64 else torch.float32
    s = _logits(student_hidden, student_head, student_bias, mask, dtype, scales[0], caps[0])  # [N, V]
    if topk is None:
        t = _logits(teacher_hidden, teacher_head, teacher_bias, mask, dtype, scales[1], caps[1])
        rows = divergence(s, t, mask, kind, temperature, beta, alpha)
    else:
        rows = divergence_topk(s, *topk, mask, kind, temperature, beta, alpha)
    rows = factor * rows
    if labels is None or hard == 0:
        return rows
    if mask is not None:
        labels = labels.masked_fill(~mask, 0)
    cross_entropy = torch.nn.functional.cross_entropy(s, labels, reduction="none")  # [N]
    return rows + hard * (cross_entropy if mask is None else cross_entropy.masked_fill(~mask, 0))


def _logits(hidden, head, bias, mask, dtype, scale, cap):
    # A masked row may hold NaN, and the gradient of the head would multiply it by 0.
    hidden = hidden if mask is None else hidden.masked_fill(~mask[:, None], 0)
    x = torch.nn.functional.linear(hidden.to(dtype), head.to(dtype), None if bias is None else bias.to(dtype))
    x = x if scale == 1 else x * scale
    return cap * torch.tanh(x / cap) if cap else x
