"""`divergence` from hidden states and heads, without the logits (GLMD)."""

import torch
from torch import Tensor

from fastkd import checks, reductions
from fastkd.functional.inference_mode import takes_inference_tensors
from fastkd.ops import linear_divergence as linear_divergence_op
from fastkd.ops import subset_mass, vocab_parallel
from fastkd.ops.divergence import TopK
from fastkd.vocab import alignment


@takes_inference_tensors
def linear_divergence(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor | TopK,
    teacher_head: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    vocab=None,
    teacher_words: str = "kept",
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
    the student's vocabulary is that subset of the teacher's, in that order. teacher_words: "kept" renormalises the teacher
    over it; "all" keeps the probabilities p that it has over all of its words (slice padding off its head). What it gives to
    a dropped word is then compared with the student's probability of the stand-in, where vocab is a VocabMap that has
    stand-ins: a divergence over all words, the student's softmax too, since a dropped word has its stand-in's logit. With
    kept ids (or a map without stand-ins) it counts nowhere: forward_kl sum p log(p/q), soft_ce and reverse_kl over the kept
    words, q summing to 1 over them and p to less, as of a TopK without tail; forward_kl may then be negative, and a row's
    gradient has the weight sum p. Labels are the student's ids, their cross-entropy is over its own words.
    weights [...]: per row; "mean" is then sum(w row) / sum(w). hard_weight adds so much of the cross-entropy with `labels`.
    Logits are softcap · tanh(scale · x / softcap), one number for both sides or (student, teacher).
    memory: "speed" forms the gradient in the forward; "low" keeps eight numbers per row and makes the logits again; so
    does reduction="none". num_valid: how many rows count at most, if known; a GPU then leaves the others out of its
    products. process_group: heads and biases are this rank's shard of the words, in rank order, the same words on both
    sides; hidden states are whole. Every rank gets the whole loss and hidden's whole gradient; `memory` and `num_valid`
    change nothing there.
    """
    checks.tensor("student_hidden", student_hidden, "[..., D]")
    shape, sparse = student_hidden.shape[:-1], isinstance(teacher_hidden, TopK)
    _check_side("student", student_hidden, student_head, student_bias)
    if process_group is not None:
        _check_shards(sparse, vocab, backend)
    if sparse:
        _check_sparse(teacher_hidden, student_hidden, student_head, kind, teacher_words)
        teacher, heads = teacher_hidden.flattened(), alignment.Heads((student_head, student_bias), None)
    else:
        _check_teacher(teacher_hidden, teacher_head, teacher_bias, student_hidden)
        given = (student_head, student_bias), (teacher_head, teacher_bias)
        heads = alignment.aligned(vocab, teacher_words, kind, *given)
        teacher = (teacher_hidden.reshape(-1, teacher_hidden.shape[-1]), *heads.teacher)
    checks.same_device(
        student_hidden=student_hidden, student_head=student_head, student_bias=student_bias, mask=mask, labels=labels,
        weights=weights,
    )  # fmt: skip
    checks.one_of("memory", memory, ("speed", "low"))
    checks.mask("weights", weights, shape, "[...]")
    checks.divergence_options(kind, temperature, beta, alpha)
    checks.one_of("reduction", reduction, reductions.REDUCTIONS)
    checks.flag("t_squared", t_squared)
    checks.number("hard_weight", hard_weight)
    counted = reductions.counted_rows(mask, labels, ignore_index, shape)
    of_ranks = vocab_parallel.sizes(student_head, process_group) if hard_weight and process_group is not None else None
    if hard_weight:
        _check_labels(labels, counted, student_head.shape[0] if of_ranks is None else of_ranks.sum())
    _check_num_valid(num_valid, counted, student_hidden)
    apart = bool(hard_weight) and vocab is not None and teacher_words == "all"  # labels are of the student's own words
    options = linear_divergence_op.Options(
        kind, float(temperature), float(beta), float(alpha),
        float(temperature) ** 2 if t_squared and kind != "mse" else 1.0, 0.0 if apart else float(hard_weight),
        _both_sides("logit_scale", logit_scale, 1.0), _both_sides("logit_softcap", logit_softcap, 0.0),
    )  # fmt: skip
    flat = [None if x is None else x.reshape(-1) for x in (counted, labels)]
    student = (student_hidden.reshape(-1, student_hidden.shape[-1]), *heads.student)
    if process_group is not None:
        rows = vocab_parallel.rows(student, teacher, *flat, of_ranks, options, process_group).reshape(shape)
        return reductions.reduce(rows, counted, reduction, weights)
    row_weights, scale, shift = reductions.row_weights(counted, reduction, weights, student_hidden), None, None
    if heads.parts is not None:
        whole = (teacher[0], teacher_head, teacher_bias)
        mass = subset_mass.kept_log_mass(
            whole, *heads.parts, flat[0], options, student_hidden, num_valid, backend
        )  # [N]
        dtype = torch.float64 if student_hidden.dtype == torch.float64 else torch.float32
        scale, shift = alignment.weighting(kind, mass, options.factor, dtype)
    found = linear_divergence_op.linear_divergence(
        student, teacher, *flat, options, memory,
        row_weights if scale is None or row_weights is None else row_weights * scale, num_valid, backend,
    )  # [N], or their weighted sum []  # fmt: skip
    if row_weights is None:
        rows = found if scale is None else found * scale + shift
        found = reductions.reduce(rows.reshape(shape), counted, reduction, weights)
    elif shift is not None:
        found = found + (row_weights * shift).sum()
    if not apart:
        return found
    return found + hard_weight * linear_divergence(
        student_hidden, student_head, _certain(labels, counted), student_bias=student_bias, weights=weights,
        memory=memory, kind="soft_ce", mask=counted, num_valid=num_valid, logit_scale=options.scales[0],
        logit_softcap=options.caps[0] or None, reduction=reduction, backend=backend,
    )  # fmt: skip


def _certain(labels: Tensor, counted: Tensor | None) -> TopK:
    """Labels as a teacher that is sure of them."""
    ids = (labels if counted is None else labels.masked_fill(~counted, 0))[..., None]
    return TopK(ids, torch.zeros_like(ids, dtype=torch.float32))


def _check_shards(sparse: bool, vocab, backend: str) -> None:
    if sparse:
        raise ValueError("process_group: a TopK teacher has no head to shard; gather the student's head instead")
    if vocab is not None:
        raise ValueError(
            "vocab: ids are of the whole vocabulary; with process_group, pass each rank the kept rows of its shard"
        )
    if backend not in ("auto", "reference"):
        raise RuntimeError(
            f"linear_divergence: backend={backend!r} cannot run here: heads spread over ranks are computed in PyTorch"
        )


def _check_sparse(teacher: TopK, student_hidden: Tensor, student_head: Tensor, kind: str, teacher_words: str) -> None:
    checks.topk(teacher, student_hidden, kind, size=student_head.shape[0])
    if teacher_words != "kept":
        raise ValueError(
            f"teacher_words={teacher_words!r}: a TopK's log_probs are taken as given; make them over all words, and its "
            "indices by vocab.encode"
        )


def _check_teacher(hidden: Tensor, head: Tensor | None, bias: Tensor | None, student_hidden: Tensor) -> None:
    checks.tensor("teacher_hidden", hidden, "[..., D]")
    _check_side("teacher", hidden, head, bias)
    checks.same_leading("teacher_hidden", hidden, "student_hidden", student_hidden, student_hidden.dim() - 1)
    checks.frozen("teacher_hidden", hidden)
    checks.frozen("teacher_head", head, bias)
    checks.same_device(student_hidden=student_hidden, teacher_hidden=hidden, teacher_head=head, teacher_bias=bias)


def _check_labels(labels: Tensor | None, counted: Tensor, words) -> None:
    if labels is None:
        raise ValueError("hard_weight: a cross-entropy needs labels [...]; pass labels=")
    checks.integers("labels", labels, "[...]")
    known = lambda: ((labels >= 0) & (labels < words) | ~counted).all()  # noqa: E731 (where it is free)
    where = f"lie in [0, {words})" if isinstance(words, int) else "be a word of one of the shards"
    checks.values("labels", labels, known, f"a label that counts must {where}")


def _check_num_valid(num_valid: int | None, counted: Tensor | None, student_hidden: Tensor) -> None:
    if num_valid is None:
        return
    if not (isinstance(num_valid, int) and 0 <= num_valid <= student_hidden.numel()):
        raise ValueError(
            f"num_valid: expected how many rows of mask are 1, as an int, got {checks.describe(num_valid)}"
        )
    if counted is not None:
        few = lambda: counted.sum() <= num_valid  # noqa: E731
        checks.values("num_valid", counted, few, f"at most {num_valid} rows should count")


def _check_side(side: str, hidden: Tensor, head: Tensor | None, bias: Tensor | None) -> None:
    checks.tensor(f"{side}_head", head, "[V, D]")
    if hidden.shape[-1] != head.shape[1]:
        raise ValueError(
            f"{side}_hidden {list(hidden.shape)} and {side}_head {list(head.shape)} must share their last axis; "
            "a head is [V, D], as nn.Linear.weight"
        )
    if head.shape[0] == 0:
        raise ValueError(f"{side}_head: expected at least one row, got {checks.describe(head)}")
    if bias is not None:
        checks.shaped(f"{side}_bias", bias, head.shape[:1], "[V]")


def _both_sides(name: str, x, none: float) -> tuple[float, float]:
    """(student's, teacher's); None is `none`."""
    pair = tuple(x) if isinstance(x, (tuple, list)) else (x, x)
    if len(pair) != 2:
        raise ValueError(f"{name}: expected a number, or (student, teacher), got {checks.describe(x)}")
    for part in pair:
        if part is not None:
            checks.positive(name, part)
    return tuple(none if part is None else float(part) for part in pair)
