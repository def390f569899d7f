"""Oracles: the losses by the papers' formulas, in as few lines as say them. They share no code with fastkd or with bench/.

In float64 they are what results are compared with. In float32 they are what people write in eager PyTorch, whose own error
is the measure of a kernel's.
"""

import torch


def reduced(values, valid, reduction, weights=None):
    """Mean over what is valid (weighted: sum(w value) / sum(w)), sum, or the values with 0 where nothing is valid."""
    values = torch.where(valid, values, torch.zeros_like(values))
    weights = torch.ones_like(values) if weights is None else weights.to(values)
    if reduction == "none":
        return values * weights
    total = (torch.where(valid, weights, 0 * weights)).sum() if reduction == "mean" else 1
    return (values * weights).sum() / (total if total != 0 else 1)
