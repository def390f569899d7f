"""`divergence` from hidden states and heads, without the logits (GLMD)."""

from torch import Tensor

from fastkd import checks, reduce
from fastkd.ops import linear_divergence as linear_divergence_op
from fastkd.ops import vocab_parallel
from fastkd.ops.divergence import TopK


def linear_divergence(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor | TopK,
    teacher_head: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    vocab=None,
    weights: Tensor | None = None,
    memory: str = "speed",
    kind: str = "forward_kl",
    temperature: float = 1.0,
    t_squared: bool = True,
    beta: float = 0.5,
    alpha: float = 0.1,
    mask: Tensor | None = None,
    num_valid: int | None = None,
    labels: Tensor | None = None,
    hard_weight: float = 0.0,
    ignore_index: int = -100,
    logit_scale: float | tuple[float, float] = 1.0,
    logit_softcap: float | tuple[float | None, float | None] | None = None,
    process_group=None,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """`divergence` between hidden @ head.T + bias of both sides. Hidden [..., D], heads [V, D], biases [V].

    In place of the teacher's hidden states a TopK may stand (no head is needed then). vocab (a VocabMap, or kept ids [Vs]):
    the student's vocabulary is that subset of the teacher's, in that order, and the teacher is renormalised over it.
    weights [...]: per row; "mean" is then sum(w row) / sum(w). hard_weight adds so much of the cross-entropy with `labels`.
    Logits are softcap · tanh(scale · x / softcap), one number for both sides or (student, teacher).
    memory: "speed" forms the gradient in the forward; "low" keeps eight numbers per row and makes the logits again; so
    does reduction="none". num_valid: how many rows count at most, if known; a GPU then leaves the others out of its
    products. process_group: heads and biases are this rank's shard of the words, in rank order, the same words on both
    sides; hidden states are whole. Every rank gets the whole loss and hidden's whole gradient; `memory` and `num_valid`
    change nothing there.
    """
    shape = student_hidden.shape[:-1]
    checks.tensor("student_hidden", student_hidden, "[..., D]")
    _check_side("student", student_hidden, student_head, student_bias)
    sparse = isinstance(teacher_hidden, TopK)
    if sparse:
        checks.topk(teacher_hidden, student_hidden, kind, size=student_head.shape[0])
        teacher = teacher_hidden.flattened()
    else:
        checks.tensor("teacher_hidden", teacher_hidden, "[..., D]")
        _check_side("teacher", teacher_hidden, teacher_head, teacher_bias)
        checks.same_leading("teacher_hidden", teacher_hidden, "student_hidden", student_hidden, len(shape))
        checks.frozen("teacher_hidden", teacher_hidden)
        checks.frozen("teacher_head", teacher_head, teacher_bias)
        checks.same_device(student_hidden=student_hidden, teacher_hidden=teacher_hidden, teacher_head=teacher_head,
                           teacher_bias=teacher_bias)  # fmt: skip
        if vocab is not None and process_group is not None:
            raise ValueError(
                "vocab: ids are of the whole vocabulary; with process_group, pass each rank the kept rows of its shard"
            )
        teacher_head, teacher_bias = _kept_rows(vocab, teacher_head, teacher_bias)
        teacher = (teacher_hidden.reshape(-1, teacher_hidden.shape[-1]), teacher_head, teacher_bias)
        _check_vocabularies(student_head, teacher_head)
    checks.same_device(
        student_hidden=student_hidden, student_head=student_head, student_bias=student_bias, mask=mask, labels=labels,
        weights=weights,
    )  # fmt: skip
    checks.one_of("memory", memory, ("speed", "low"))
    checks.mask("weights", weights, shape, "[...]")
    checks.divergence_options(kind, temperature, beta, alpha)
    checks.one_of("reduction", reduction, reduce.REDUCTIONS)
    if hard_weight and labels is None:
        raise ValueError("hard_weight: a cross-entropy needs labels [...]; pass labels=")
    counted = reduce.counted_rows(mask, labels, ignore_index, shape)
    if hard_weight:
        checks.integers("labels", labels, "[...]")
        words = student_head.shape[0] if process_group is None else vocab_parallel.words(student_head, process_group)
        known = lambda: ((labels >= 0) & (labels < words) | ~counted).all()  # noqa: E731 (where it is free)
        checks.values("labels", labels, known, f"a label that counts must lie in [0, {words})")
    if num_valid is not None and not (isinstance(num_valid, int) and 0 <= num_valid <= student_hidden.numel()):
        raise ValueError(
            f"num_valid: expected how many rows of mask are 1, as an int, got {checks.describe(num_valid)}"
        )
    if num_valid is not None and counted is not None:
        checks.values(
            "num_valid", counted, lambda: counted.sum() <= num_valid, f"at most {num_valid} rows should count"
        )
    options = linear_divergence_op.Options(
        kind, float(temperature), float(beta), float(alpha),
        float(temperature) ** 2 if t_squared and kind != "mse" else 1.0, float(hard_weight),
        _both_sides("logit_scale", logit_scale, 1.0), _both_sides("logit_softcap", logit_softcap, 0.0),
    )  # fmt: skip
    if process_group is not None:
        if sparse:
            raise ValueError("process_group: a TopK teacher has no head to shard; gather the student's head instead")
        if backend not in ("auto", "reference"):
            raise RuntimeError(
                f"linear_divergence: backend={backend!r} cannot run here: heads spread over ranks are computed in PyTorch"
            )
        flat = [None if x is None else x.reshape(-1) for x in (counted, labels)]
        student = (student_hidden.reshape(-1, student_hidden.shape[-1]), student_head, student_bias)
        rows = vocab_parallel.rows(student, teacher, *flat, options, process_group).reshape(shape)
        return reduce.reduce(rows, counted, reduction, weights)
    rows = linear_divergence_op.linear_divergence(
        (student_hidden.reshape(-1, student_hidden.shape[-1]), student_head, student_bias), teacher,
        *(None if x is None else x.reshape(-1) for x in (counted, labels)), options, memory,
        reduce.row_weights(counted, reduction, weights, student_hidden), num_valid, backend,
    )  # [N], or their weighted sum []  # fmt: skip
    return rows if reduction != "none" else reduce.reduce(rows.reshape(shape), counted, reduction, weights)


def _check_side(side: str, hidden: Tensor, head: Tensor | None, bias: Tensor | None) -> None:
    checks.tensor(f"{side}_head", head, "[V, D]")
    if hidden.shape[-1] != head.shape[1]:
        raise ValueError(
            f"{side}_hidden {list(hidden.shape)} and {side}_head {list(head.shape)} must share their last axis; "
            "a head is [V, D], as nn.Linear.weight"
        )
    if bias is not None:
        checks.mask(f"{side}_bias", bias, head.shape[:1], "[V]")


def _check_vocabularies(student_head: Tensor, teacher_head: Tensor) -> None:
    ours, theirs = student_head.shape[0], teacher_head.shape[0]
    if ours != theirs:
        low, high = sorted((ours, theirs))
        raise ValueError(
            f"student_head has {ours} words and the teacher's {theirs}: ids {low} to {high - 1} are on one side only; if "
            f"the student's vocabulary is a subset, pass vocab=; if they are padding, slice both heads to [:{low}]"
        )


def _both_sides(name: str, x, none: float) -> tuple[float, float]:
    """(student's, teacher's); None is `none`."""
    pair = tuple(x) if isinstance(x, (tuple, list)) else (x, x)
    if len(pair) != 2:
        raise ValueError(f"{name}: expected a number, or (student, teacher), got {checks.describe(x)}")
    for part in pair:
        if part is not None:
            checks.positive(name, part)
    return tuple(none if part is None else float(part) for part in pair)


def _kept_rows(vocab, head: Tensor, bias: Tensor | None):
    if vocab is None:
        return head, bias
    if not isinstance(vocab, Tensor):
        return vocab.slice_head(head, bias)
    checks.integers("vocab", vocab, "[K]")
    checks.indices_in_range("vocab", vocab, head.shape[0], "rows of teacher_head")
    return head[vocab], None if bias is None else bias[vocab]
