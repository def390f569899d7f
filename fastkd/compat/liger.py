"""The distillation losses of Liger-Kernel 0.8.5, with its names, arguments and defaults, on CPUs too.

`LigerKLDIVLoss`, `LigerJSD` and `LigerTVDLoss` take log-probabilities or probabilities as they are, so that there is no softmax
to fuse: on a CPU they are PyTorch, elsewhere Liger's own kernels. `LigerFusedLinearJSD` is `linear_divergence`, and
fastkd/compat/liger_chunked.py has the losses of `liger_kernel.chunked_loss`.
No loss is NaN if all rows are ignored; it is 0.
"""

import importlib
import importlib.util
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd import functional
from fastkd.compat.liger_chunked import Known
from fastkd.compat.liger_chunked import LigerFusedLinearCosineSimilarityLoss as LigerFusedLinearCosineSimilarityLoss
from fastkd.compat.liger_chunked import LigerFusedLinearJSDLoss as LigerFusedLinearJSDLoss


class LigerKLDIVLoss(nn.KLDivLoss):
    """KL of log-probabilities `y_pred` [N, V] from the targets, as `nn.KLDivLoss`; without log_target, log(max(target, eps)).

    Args:
        eps: The least target of which a logarithm is taken.
        args, kwargs: Those of `nn.KLDivLoss`: size_average, reduce, reduction, log_target.
    """

    def __init__(self, eps: float = 1e-10, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.eps = eps

    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        theirs = _liger_function(y_pred, "LigerKLDivLossFunction")
        if theirs is not None:
            return theirs.apply(y_pred, y_true, self.reduction, self.log_target, self.eps)
        with torch.no_grad():
            y = y_true.float()
            p, log_p = (y.exp(), y) if self.log_target else (y, y.clamp_min(self.eps).log())
            value, gradient = p * (log_p - y_pred.float()), -p
        return _reduced(y_pred, value, gradient, self.reduction, None, 0)


class LigerJSD(nn.Module):
    """beta KL(P ‖ M) + (1 - beta) KL(Q ‖ M), M = beta P + (1 - beta) Q, of log-probabilities; mean over the rows that count.

    beta 0 is KL(P ‖ Q) and 1 is KL(Q ‖ P).

    Args:
        beta: The teacher's weight in the mixture, in [0, 1].
        ignore_index: Rows with this label do not count.
    """

    def __init__(self, beta: float = 0.5, ignore_index: int = -100):
        super().__init__()
        self.beta = beta
        self.ignore_index = ignore_index

    def forward(self, log_q: Tensor, log_p: Tensor, shift_labels: Tensor | None = None) -> Tensor:
        theirs = _liger_function(log_q, "LigerJSDFunction")
        if theirs is not None:
            return theirs.apply(log_q, log_p, shift_labels, self.beta, self.ignore_index, None, None)
        with torch.no_grad():
            value, gradient = _jsd(log_q.float(), log_p.float(), self.beta)
        return _reduced(log_q, value, gradient, "batchmean", shift_labels, self.ignore_index).to(log_q.dtype)


class LigerTVDLoss(nn.Module):
    """½ Σ |p - q| of probabilities [N, V].

    Args:
        reduction: "batchmean" over the rows that count, "mean" over their elements, "sum", or "none".
        ignore_index: Rows with this label do not count.
    """

    def __init__(self, reduction: str = "batchmean", ignore_index: int = -100):
        super().__init__()
        self.reduction = reduction
        self.ignore_index = ignore_index

    def forward(self, p: Tensor, q: Tensor, shift_labels: Tensor | None = None) -> Tensor:
        theirs = _liger_function(p, "LigerTVDLossFunction")
        if theirs is not None:
            return theirs.apply(p, q, shift_labels, self.reduction, self.ignore_index)
        with torch.no_grad():
            difference = p.float() - q.float()
            value, gradient = 0.5 * difference.abs(), 0.5 * difference.sign()
        return _reduced(p, value, gradient, self.reduction, shift_labels, self.ignore_index)


class LigerFusedLinearJSD(nn.Module):
    """The generalized JSD of two models' logits, from hidden states and heads; mean over the rows that count.

    Args:
        jsd_beta: The teacher's weight in the mixture, in [0, 1]; 0 is forward KL and 1 reverse KL.
        ignore_index: Rows with this label do not count.
        temperature: T > 0; the loss is not multiplied by T².
        accum_dtype: Accepted; the gradient of the head is summed in float32 whatever it is.
    """

    def __init__(
        self,
        jsd_beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        accum_dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.jsd_beta = jsd_beta
        self.temperature = temperature
        self.ignore_index = ignore_index
        self.accum_dtype = accum_dtype

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        shift_labels: Tensor | None,
    ) -> Tensor:
        return functional.linear_divergence(
            student_input, student_weight, teacher_input.detach(), teacher_weight.detach(), kind="jsd",
            beta=self.jsd_beta, temperature=self.temperature, t_squared=False, labels=shift_labels,
            ignore_index=self.ignore_index,
        )  # fmt: skip


class LigerFusedLinearKLDivLoss(nn.Module):
    """KL(target ‖ softmax(student_input student_weightᵀ / T)) for a target of given probabilities [N, V].

    A target needs not sum to 1. Tokens below `eps` are not raised to it, which would change the loss by less than V · eps.

    Args:
        reduction: "batchmean" over the rows that count, "mean" over their elements, or "sum".
        ignore_index: Rows with this label do not count.
        temperature: The student's; the loss is not multiplied by T².
        eps: Accepted, see above.
        accum_dtype: Accepted; the gradient of the head has the head's dtype.
    """

    def __init__(
        self,
        reduction: str | None = "batchmean",
        ignore_index: int = -100,
        temperature: float = 1.0,
        eps: float = 1e-10,
        accum_dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.reduction = reduction
        self.temperature = temperature
        self.ignore_index = ignore_index
        self.eps = eps
        self.accum_dtype = accum_dtype

    def forward(
        self, student_input: Tensor, student_weight: Tensor, target: Tensor, shift_labels: Tensor | None = None
    ) -> Tensor:
        if self.reduction not in ("batchmean", "mean", "sum"):
            raise ValueError(f"reduction: expected 'batchmean', 'mean' or 'sum', got {self.reduction!r}")
        theirs = _liger_function(student_input, "LigerFusedLinearKLDivFunction")
        if theirs is not None:
            return theirs.apply(
                student_input, student_weight, target, shift_labels, self.reduction, self.ignore_index,
                self.temperature, self.eps, self.accum_dtype,
            )  # fmt: skip
        target = target.detach().float()
        mass = target.sum(-1)  # [N]; KL(target ‖ q) = mass (KL(target / mass ‖ q) + log mass)
        counted = mass > 0 if shift_labels is None else (mass > 0) & (shift_labels != self.ignore_index)
        rows = functional.divergence(
            F.linear(student_input, student_weight), target.log(), temperature=self.temperature, teacher_temperature=1.0,
            t_squared=False, mask=counted, reduction="none",
        )  # fmt: skip
        total = (rows * mass + torch.where(counted, torch.xlogy(mass, mass), 0.0)).sum()
        if self.reduction == "sum":
            return total
        total = total / _count(target, shift_labels, self.ignore_index)
        return total if self.reduction == "batchmean" else total / target.shape[1]

    def extra_repr(self) -> str:
        return f"reduction={self.reduction}, ignore_index={self.ignore_index}, temperature={self.temperature}"


def _liger_function(x: Tensor, name: str):
    """Liger's own autograd Function where it can run, which is on no CPU; None elsewhere."""
    if x.device.type == "cpu" or importlib.util.find_spec("liger_kernel") is None:
        return None
    return getattr(importlib.import_module("liger_kernel.ops"), name)


def _jsd(x: Tensor, y: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """The terms of each element [N, V], and their derivatives by x = log q; y = log p."""
    if beta == 0:
        p = y.exp()
        return p * (y - x), -p
    q = x.exp()
    if beta == 1:
        value = q * (x - y)
        return value, value + q
    log_m = torch.logaddexp(x + math.log(1 - beta), y + math.log(beta))
    gradient = (1 - beta) * q * (x - log_m)
    return beta * y.exp() * (y - log_m) + gradient, gradient


def _count(rows: Tensor, labels: Tensor | None, ignore_index: int):
    return max(len(rows), 1) if labels is None else (labels != ignore_index).sum().clamp_min(1)


def _reduced(x: Tensor, value: Tensor, gradient: Tensor, reduction: str, labels: Tensor | None, ignore_index: int):
    """The reduction of value [N, V], whose elements have the derivative `gradient` by those of x."""
    if labels is not None:
        ignored = (labels == ignore_index)[:, None]
        value, gradient = value.masked_fill(ignored, 0), gradient.masked_fill(ignored, 0)
    if reduction != "none":
        count = _count(value, labels, ignore_index)
        divisor = {"sum": 1, "batchmean": count, "mean": count * value.shape[1]}[reduction]
        value, gradient = value.sum() / divisor, gradient / divisor
    return Known.apply(x, value, gradient.to(x.dtype))
