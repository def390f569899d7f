"""Divergences between two sets of logits."""

from torch import Tensor

from fastkd import checks, reductions
from fastkd.functional.inference_mode import takes_inference_tensors
from fastkd.ops import divergence as divergence_op
from fastkd.ops.divergence import TopK


@takes_inference_tensors
def divergence(
    student_logits: Tensor,
    teacher: Tensor | TopK,
    *,
    kind: str = "forward_kl",
    temperature: float = 1.0,
    t_squared: bool = True,
    beta: float = 0.5,
    alpha: float = 0.1,
    mask: Tensor | None = None,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Row-wise divergence between softmax(student / T) = q and softmax(teacher / T) = p; logits [..., V].

    forward_kl KL(p||q) · reverse_kl KL(q||p) · skew_kl KL(p||alpha p + (1-alpha) q) · jsd with m = beta p + (1-beta) q ·
    tvd sum|p-q|/2 · soft_ce -sum p log q · mse sum (s-t)^2 on the raw logits. t_squared multiplies all but mse by T².
    A row counts where mask is 1 and its label is not ignore_index. teacher may be TopK(indices, log_probs, tail).
    """
    checks.tensor("student_logits", student_logits, "[..., V]")
    checks.divergence_options(kind, temperature, beta, alpha)
    checks.one_of("reduction", reduction, reductions.REDUCTIONS)
    checks.flag("t_squared", t_squared)
    shape, vocab = student_logits.shape[:-1], student_logits.shape[-1]
    if isinstance(teacher, TopK):
        checks.topk(teacher, student_logits, kind)
        teacher = teacher.flattened()
    else:
        checks.tensor("teacher", teacher, "[..., V]")
        hint = "a subset vocabulary: slice the teacher's columns; TopK(indices, log_probs) takes a sparse teacher"
        checks.same_shape("teacher", teacher, "student_logits", student_logits, hint)
        checks.same_device(student_logits=student_logits, teacher=teacher)
        checks.frozen("teacher", teacher)
        teacher = teacher.reshape(-1, vocab)  # [N, V]
    checks.same_device(student_logits=student_logits, mask=mask, labels=labels)
    counted = reductions.counted_rows(mask, labels, ignore_index, shape)
    flat = None if counted is None else counted.reshape(-1)
    args = (kind, float(temperature), float(beta), float(alpha))
    factor = float(temperature) ** 2 if t_squared and kind != "mse" else 1.0
    expected = (reduction == "mean", factor)
    rows = divergence_op.divergence(student_logits.reshape(-1, vocab), teacher, flat, *args, backend, expected)  # [N]
    if factor != 1.0:
        rows = rows * factor
    return reductions.reduce(rows.reshape(shape), counted, reduction)
