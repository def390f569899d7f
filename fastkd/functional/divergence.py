"""Divergences between two sets of logits."""

from typing import get_args

import torch
from torch import Tensor

from fastkd import checks, reductions
from fastkd.checks import Backend, DivergenceReduction, LogitsKind
from fastkd.deprecation import renamed
from fastkd.functional import temperature as temperatures
from fastkd.functional.inference_mode import takes_inference_tensors
from fastkd.ops import divergence as divergence_op
from fastkd.ops.divergence import DivergenceStats, TopK

_KINDS, _REDUCTIONS = get_args(LogitsKind), get_args(DivergenceReduction)
_ROWS = 256  # of which the entropy is computed at a time


@renamed(teacher="teacher_logits")
@takes_inference_tensors
def divergence(
    student_logits: Tensor,
    teacher_logits: Tensor | TopK,
    *,
    kind: LogitsKind = "forward_kl",
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    t_squared: bool = True,
    beta: float = 0.5,
    alpha: float = 0.1,
    mask: Tensor | None = None,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    reduction: DivergenceReduction = "mean",
    num_items_in_batch: float | Tensor | None = None,
    return_stats: bool = False,
    backend: Backend = "auto",
) -> Tensor:  # with return_stats a tuple, as PyTorch annotates max_pool2d
    """Divergence of each row's student distribution from the teacher's.

    With q = softmax(student_logits / T) and p = softmax(teacher_logits / T), a row's divergence is, by `kind`:

    - "forward_kl": KL(p ‖ q) = Σ p log(p / q)
    - "reverse_kl": KL(q ‖ p)
    - "skew_kl": KL(p ‖ alpha p + (1 - alpha) q)
    - "skew_reverse_kl": KL(q ‖ alpha q + (1 - alpha) p), from a "jsd" and a "skew_kl"; twice the work of the others
    - "jsd": beta KL(p ‖ m) + (1 - beta) KL(q ‖ m) with m = beta p + (1 - beta) q; by convention KL(p ‖ q) for beta 0 and
      KL(q ‖ p) for beta 1
    - "tvd": ½ Σ |p - q|
    - "soft_ce": -Σ p log q
    - "mse": Σ (student_logits - teacher_logits)², without the temperature

    Args:
        student_logits: [..., V], one row per example or token.
        teacher_logits: [..., V], or `TopK(indices, log_probs, tail)` with the teacher's k most likely tokens.
        kind: The divergence; see above.
        temperature: T > 0, a number or a tensor of one number, which gets no gradient.
        teacher_temperature: The teacher's own temperature; None: T. `t_squared` means the student's.
        t_squared: Multiply by T², so that the gradient's size does not depend on T. "mse" is never multiplied.
        beta: The teacher's weight in the mixture of "jsd", in [0, 1].
        alpha: The teacher's weight in the mixture of "skew_kl", the student's in "skew_reverse_kl"; in [0, 1).
        mask: [...], 1 where a row counts. None: all rows count.
        labels: [...]. Rows whose label is `ignore_index` do not count; the labels are used for nothing else.
        ignore_index: The label of rows that do not count.
        reduction: "mean" over the rows that count, "batchmean" (their sum divided by the length of the first axis, as in
            `torch.nn.functional.kl_div`), "sum", or "none".
        num_items_in_batch: What "mean" divides by, in place of the number of rows that count; `Trainer` passes the number
            of tokens of all accumulated batches on all ranks.
        return_stats: Also return `DivergenceStats(value, student_entropy, kept_mass)`, each [...], for logs and for choosing
            tokens: the row's divergence, the entropy of its student in nats, and what a `TopK` has of the teacher's mass.
        backend: "auto" takes the fastest implementation that runs here; `fastkd doctor` lists them.

    Returns:
        A scalar, or [...] for reduction="none"; float32, or float64 for float64 inputs. With return_stats a pair of it and the
        `DivergenceStats`.

    Example:
        >>> student_logits = torch.randn(8, 1000, requires_grad=True)
        >>> teacher_logits = torch.randn(8, 1000)
        >>> loss = fastkd.divergence(student_logits, teacher_logits, kind="jsd", temperature=2.0)
        >>> loss.backward()
        >>> student_logits.grad.shape
        torch.Size([8, 1000])

        A teacher of which only the 64 most likely tokens were kept:

        >>> log_probs, indices = (teacher_logits / 2.0).log_softmax(-1).topk(64)
        >>> sparse = fastkd.TopK(indices, log_probs, tail=True)
        >>> bool(fastkd.divergence(student_logits, sparse, temperature=2.0) > 0)
        True
    """
    checks.tensor("student_logits", student_logits, "[..., V]")
    checks.divergence_options(kind, beta, alpha, _KINDS)
    if kind == "skew_reverse_kl" and alpha:
        # With m = alpha q + (1 - alpha) p: jsd = (1 - alpha) KL(p ‖ m) + alpha KL(q ‖ m), and KL(p ‖ m) is a skew KL.
        more = {
            "temperature": temperature, "teacher_temperature": teacher_temperature, "t_squared": t_squared, "mask": mask,
            "labels": labels, "ignore_index": ignore_index, "reduction": reduction,
            "num_items_in_batch": num_items_in_batch, "return_stats": return_stats, "backend": backend,
        }  # fmt: skip
        jsd = divergence(student_logits, teacher_logits, kind="jsd", beta=1 - alpha, **more)
        skew = divergence(student_logits, teacher_logits, kind="skew_kl", alpha=1 - alpha, **more)
        combined = lambda jsd, skew: (jsd - (1 - alpha) * skew) / alpha  # noqa: E731
        if not return_stats:
            return combined(jsd, skew)
        return combined(jsd[0], skew[0]), jsd[1]._replace(value=combined(jsd[1].value, skew[1].value))
    kind = without_mixture(kind, beta)
    temperature = temperatures.as_number("temperature", temperature)
    if teacher_temperature is not None:
        teacher_temperature = temperatures.as_number("teacher_temperature", teacher_temperature)
    checks.one_of("reduction", reduction, _REDUCTIONS)
    checks.flag("t_squared", t_squared)
    checks.flag("return_stats", return_stats)
    shape, vocab = student_logits.shape[:-1], student_logits.shape[-1]
    if isinstance(teacher_logits, TopK):
        checks.topk("teacher_logits", teacher_logits, "student_logits", student_logits, kind, vocab)
        if teacher_temperature is not None:
            raise ValueError("teacher_temperature: a TopK has log-probabilities, which are used as given; leave None")
        teacher = teacher_logits.flattened()
    else:
        checks.tensor("teacher_logits", teacher_logits, "[..., V]")
        hint = "for a smaller vocabulary, select the teacher's columns; TopK(indices, log_probs) is a sparse teacher"
        checks.same_shape("teacher_logits", teacher_logits, "student_logits", student_logits, hint)
        checks.same_device(student_logits=student_logits, teacher_logits=teacher_logits)
        checks.frozen("teacher_logits", teacher_logits)
        teacher = _flat(teacher_logits)  # [N, V]
    checks.same_device(student_logits=student_logits, mask=mask, labels=labels)
    counted = reductions.counted_rows(mask, labels, ignore_index, shape)
    flat = None if counted is None else counted.reshape(-1)
    factor = of_rows = temperature**2 if t_squared and kind != "mse" else 1.0
    student, own_temperature = _flat(student_logits), temperature
    if kind != "mse":
        student, teacher, temperature = temperatures.scaled(student, teacher, temperature, teacher_temperature)
    elif isinstance(temperature, Tensor):
        temperature = 1.0
    reduction, divisor = reductions.denominator(reduction, num_items_in_batch, shape)
    factor = factor / divisor
    expected = (reduction == "mean", factor if isinstance(factor, float) else 1.0)
    args = (kind, temperature, float(beta), float(alpha), backend, expected)
    rows = divergence_op.divergence(student, teacher, flat, *args)  # [N]
    stats = None
    if return_stats:
        entropy = torch.cat(
            [_entropy(part / own_temperature) for part in student_logits.detach().reshape(-1, vocab).split(_ROWS)]
        )
        stats = stats_of((rows * of_rows).reshape(shape), entropy.reshape(shape), teacher_logits, counted)
    if isinstance(factor, Tensor) or factor != 1.0:
        rows = rows * factor
    loss = reductions.reduce(rows, flat, reduction)
    loss = loss.reshape(shape) if reduction == "none" else loss
    return loss if stats is None else (loss, stats)


def _flat(logits: Tensor) -> Tensor:
    """[..., V] as [N, V]; itself where it is, since a view is a node of the graph, too."""
    return logits if logits.dim() == 2 else logits.reshape(-1, logits.shape[-1])


def stats_of(value: Tensor, entropy: Tensor, teacher, counted: Tensor | None) -> DivergenceStats:
    kept = teacher.log_probs.to(value.dtype).exp().sum(-1) if isinstance(teacher, TopK) else None
    rows = (x if x is None or counted is None else torch.where(counted, x, 0.0) for x in (value, entropy, kept))
    return DivergenceStats(*(x if x is None else x.detach() for x in rows))


def _entropy(logits: Tensor) -> Tensor:
    """Of softmax(logits), by row."""
    return torch.special.entr(logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)).sum(-1)


def without_mixture(kind: str, beta: float) -> str:
    """The kind that needs no mixture, where an end of the range has none."""
    if kind == "skew_reverse_kl":  # alpha 0
        return "reverse_kl"
    return {0: "forward_kl", 1: "reverse_kl"}.get(beta, kind) if kind == "jsd" else kind
