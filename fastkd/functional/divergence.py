"""Divergences between two sets of logits."""

from torch import Tensor

from fastkd import checks, reductions
from fastkd.checks import Backend, Kind, Reduction
from fastkd.deprecation import renamed
from fastkd.functional.inference_mode import takes_inference_tensors
from fastkd.ops import divergence as divergence_op
from fastkd.ops.divergence import TopK


@renamed(teacher="teacher_logits")
@takes_inference_tensors
def divergence(
    student_logits: Tensor,
    teacher_logits: Tensor | TopK,
    *,
    kind: Kind = "forward_kl",
    temperature: float = 1.0,
    t_squared: bool = True,
    beta: float = 0.5,
    alpha: float = 0.1,
    mask: Tensor | None = None,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    backend: Backend = "auto",
) -> Tensor:
    """Divergence of each row's student distribution from the teacher's.

    With q = softmax(student_logits / T) and p = softmax(teacher_logits / T), a row's divergence is, by `kind`:

    - "forward_kl": KL(p ‖ q) = Σ p log(p / q)
    - "reverse_kl": KL(q ‖ p)
    - "skew_kl": KL(p ‖ alpha p + (1 - alpha) q)
    - "jsd": beta KL(p ‖ m) + (1 - beta) KL(q ‖ m) with m = beta p + (1 - beta) q
    - "tvd": ½ Σ |p - q|
    - "soft_ce": -Σ p log q
    - "mse": Σ (student_logits - teacher_logits)², without the temperature

    Args:
        student_logits: [..., V], one row per example or token.
        teacher_logits: [..., V], or `TopK(indices, log_probs, tail)` with the teacher's k most likely tokens.
        kind: The divergence; see above.
        temperature: T > 0.
        t_squared: Multiply by T², so that the gradient's size does not depend on T. "mse" is never multiplied.
        beta: The teacher's weight in the mixture of "jsd", strictly between 0 and 1.
        alpha: The teacher's weight in the mixture of "skew_kl", in [0, 1).
        mask: [...], 1 where a row counts. None: all rows count.
        labels: [...]. Rows whose label is `ignore_index` do not count; the labels are used for nothing else.
        ignore_index: The label of rows that do not count.
        reduction: "mean" over the rows that count, "sum", or "none".
        backend: "auto" takes the fastest implementation that runs here; `fastkd doctor` lists them.

    Returns:
        A scalar, or [...] for reduction="none"; float32, or float64 for float64 inputs.

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
    checks.divergence_options(kind, temperature, beta, alpha)
    checks.one_of("reduction", reduction, reductions.REDUCTIONS)
    checks.flag("t_squared", t_squared)
    shape, vocab = student_logits.shape[:-1], student_logits.shape[-1]
    if isinstance(teacher_logits, TopK):
        checks.topk("teacher_logits", teacher_logits, "student_logits", student_logits, kind, vocab)
        teacher = teacher_logits.flattened()
    else:
        checks.tensor("teacher_logits", teacher_logits, "[..., V]")
        hint = "for a smaller vocabulary, select the teacher's columns; TopK(indices, log_probs) is a sparse teacher"
        checks.same_shape("teacher_logits", teacher_logits, "student_logits", student_logits, hint)
        checks.same_device(student_logits=student_logits, teacher_logits=teacher_logits)
        checks.frozen("teacher_logits", teacher_logits)
        teacher = teacher_logits.reshape(-1, vocab)  # [N, V]
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
