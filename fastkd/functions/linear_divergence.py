"""`divergence` from hidden states and heads, without the logits (GLMD)."""

import torch
from torch import Tensor

from fastkd import checks, reduce
from fastkd.functions import vocabulary
from fastkd.ops import kept_mass, vocab_parallel
from fastkd.ops import linear_divergence as linear_divergence_op
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
    shape = student_hidden.shape[:-1]
    checks.tensor("student_hidden", student_hidden, "[..., D]")
    _check_side("student", student_hidden, student_head, student_bias)
    sparse = isinstance(teacher_hidden, TopK)
    if sparse:
        checks.topk(teacher_hidden, student_hidden, kind, size=student_head.shape[0])
        if teacher_words != "kept":
            raise ValueError(
                f"teacher_words={teacher_words!r}: a TopK's log_probs are taken as given; make them over all words, and its "
                "indices by vocab.encode"
            )
        teacher, heads = teacher_hidden.flattened(), vocabulary.Heads((student_head, student_bias), None)
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
        heads = vocabulary.aligned(
            vocab, teacher_words, kind, (student_head, student_bias), (teacher_head, teacher_bias)
        )
        teacher = (teacher_hidden.reshape(-1, teacher_hidden.shape[-1]), *heads.teacher)
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
    apart = bool(hard_weight) and vocab is not None and teacher_words == "all"
    options = linear_divergence_op.Options(
        kind, float(temperature), float(beta), float(alpha),
        float(temperature) ** 2 if t_squared and kind != "mse" else 1.0, 0.0 if apart else float(hard_weight),
        _both_sides("logit_scale", logit_scale, 1.0), _both_sides("logit_softcap", logit_softcap, 0.0),
    )  # fmt: skip
    flat = [None if x is None else x.reshape(-1) for x in (counted, labels)]
    student = (student_hidden.reshape(-1, student_hidden.shape[-1]), *heads.student)
    if process_group is not None:
        if sparse:
            raise ValueError("process_group: a TopK teacher has no head to shard; gather the student's head instead")
        if backend not in ("auto", "reference"):
            raise RuntimeError(
                f"linear_divergence: backend={backend!r} cannot run here: heads spread over ranks are computed in PyTorch"
            )
        rows = vocab_parallel.rows(student, teacher, *flat, options, process_group).reshape(shape)
        return reduce.reduce(rows, counted, reduction, weights)
    row_weights, scale, shift = reduce.row_weights(counted, reduction, weights, student_hidden), None, None
    if heads.parts is not None:
        whole = (teacher[0], teacher_head, teacher_bias)
        mass = kept_mass.kept_log_mass(whole, *heads.parts, flat[0], options, student_hidden, num_valid, backend)  # [N]
        dtype = torch.float64 if student_hidden.dtype == torch.float64 else torch.float32
        scale, shift = vocabulary.weighting(kind, mass, options.factor, dtype)
    found = linear_divergence_op.linear_divergence(
        student, teacher, *flat, options, memory,
        row_weights if scale is None or row_weights is None else row_weights * scale, num_valid, backend,
    )  # [N], or their weighted sum []  # fmt: skip
    if row_weights is None:
        rows = found if scale is None else found * scale + shift
        found = reduce.reduce(rows.reshape(shape), counted, reduction, weights)
    elif shift is not None:
        found = found + (row_weights * shift).sum()
    if not apart:
        return found
    right = labels if counted is None else labels.masked_fill(~counted, 0)
    right = TopK(right[..., None], torch.zeros_like(right[..., None], dtype=torch.float32))  # all of the mass
    return found + hard_weight * linear_divergence(
        student_hidden, student_head, right, student_bias=student_bias, weights=weights, memory=memory, kind="soft_ce",
        mask=counted, num_valid=num_valid, logit_scale=options.scales[0], logit_softcap=options.caps[0] or None,
        reduction=reduction, backend=backend,
    )  # fmt: skip


def _check_side(side: str, hidden: Tensor, head: Tensor | None, bias: Tensor | None) -> None:
    checks.tensor(f"{side}_head", head, "[V, D]")
    if hidden.shape[-1] != head.shape[1]:
        raise ValueError(
            f"{side}_hidden {list(hidden.shape)} and {side}_head {list(head.shape)} must share their last axis; "
            "a head is [V, D], as nn.Linear.weight"
        )
    if bias is not None:
        checks.mask(f"{side}_bias", bias, head.shape[:1], "[V]")


def _both_sides(name: str, x, none: float) -> tuple[float, float]:
    """(student's, teacher's); None is `none`."""
    pair = tuple(x) if isinstance(x, (tuple, list)) else (x, x)
    if len(pair) != 2:
        raise ValueError(f"{name}: expected a number, or (student, teacher), got {checks.describe(x)}")
    for part in pair:
        if part is not None:
            checks.positive(name, part)
    return tuple(none if part is None else float(part) for part in pair)
