"""The entropy of a language model's predictions, without its logits in memory."""

import math

import torch
from torch import Tensor

from fastkd import reductions
from fastkd.checks import Backend, DivergenceReduction
from fastkd.functional.linear_divergence import linear_divergence


def linear_entropy(
    hidden: Tensor,
    head: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    reduction: DivergenceReduction = "mean",
    backend: Backend = "auto",
) -> Tensor:
    """Entropy -Σ q log q in nats, q = softmax((hidden headᵀ + bias) / T), of each row; it has no gradient.

    It is log V - KL(q ‖ uniform), so it costs one product of `hidden` and `head`.

    Args:
        hidden: [..., D].
        head: [V, D], as `nn.Linear.weight`.
        bias: [V].
        temperature, mask, labels, ignore_index, logit_scale, logit_softcap, reduction, backend: As for `linear_divergence`.

    Returns:
        A scalar, or [...] for reduction="none"; float32, or float64 for float64 inputs.

    Example:
        >>> hidden, head = torch.randn(2, 8, 32), torch.nn.Linear(32, 1000)
        >>> entropy = fastkd.functional.linear_entropy(hidden, head.weight, bias=head.bias)
        >>> bool((entropy > 0) & (entropy < 7))
        True
    """
    with torch.no_grad():
        uniform = hidden.new_zeros(*hidden.shape[:-1], 1), head.new_zeros(len(head), 1)  # logits 0
        rows = linear_divergence(
            hidden, head, *uniform, student_bias=bias, kind="reverse_kl", temperature=temperature, t_squared=False,
            mask=mask, labels=labels, ignore_index=ignore_index, logit_scale=(logit_scale, 1.0),
            logit_softcap=(logit_softcap, None), reduction=reduction, backend=backend,
        )  # fmt: skip
        counted = reductions.counted_rows(mask, labels, ignore_index, hidden.shape[:-1])
        ones = torch.ones(hidden.shape[:-1], dtype=rows.dtype, device=rows.device)
        reduction, divisor = reductions.denominator(reduction, None, hidden.shape[:-1])
        return math.log(len(head)) * reductions.reduce(ones, counted, reduction) / divisor - rows
