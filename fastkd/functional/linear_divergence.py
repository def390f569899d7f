"""Divergences from hidden states and heads, without the logits in memory (GLMD)."""

from typing import Literal, get_args

import torch
from torch import Tensor

from fastkd import checks, deprecation, reductions
from fastkd.checks import Backend, DivergenceReduction, Kind
from fastkd.deprecation import renamed
from fastkd.functional import temperature as temperatures
from fastkd.functional.divergence import stats_of, without_mixture
from fastkd.functional.inference_mode import takes_inference_tensors
from fastkd.ops import linear_divergence as linear_divergence_op
from fastkd.ops import subset_mass, vocab_parallel
from fastkd.ops.divergence import TopK
from fastkd.vocab import alignment


@renamed(teacher_words="teacher_tokens", memory=("recompute_logits", deprecation.recompute_logits))
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
    teacher_tokens: Literal["kept", "all"] = "kept",
    weights: Tensor | None = None,
    recompute_logits: bool = False,
    kind: Kind = "forward_kl",
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
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
    reduction: DivergenceReduction = "mean",
    num_items_in_batch: float | Tensor | None = None,
    return_stats: bool = False,
    backend: Backend = "auto",
) -> Tensor:  # with return_stats a tuple, as PyTorch annotates max_pool2d
    """`divergence` of two language models from their hidden states and heads; the logits are never all in memory.

    The logits of either side are hidden headᵀ + bias; the divergences are those of `divergence`, but "skew_reverse_kl". Under
    autocast hidden states, heads and biases are cast as `nn.Linear` casts them; the logits stay in float32.

    Args:
        student_hidden: [..., Ds].
        student_head: [V, Ds], as `nn.Linear.weight`.
        teacher_hidden: [..., Dt]; or a `TopK` over the student's vocabulary, which needs no teacher_head.
        teacher_head: [V, Dt].
        student_bias, teacher_bias: [V].
        vocab: A `VocabMap`, or the kept ids [Vs]: the student's vocabulary is this subset of the teacher's, in this order.
        teacher_tokens: With `vocab`, "kept" renormalises the teacher over the kept tokens; "all" keeps its probabilities
            over its whole vocabulary. If the VocabMap has stand-ins, each dropped token then has its stand-in's logit in
            the student, and the divergence is over the whole vocabulary. Otherwise the sum is over the kept tokens only
            (kind "forward_kl", "reverse_kl" or "soft_ce"), and forward_kl may be negative. `labels` are the student's ids.
        weights: [...], a weight for each row; "mean" is then Σ w · row / Σ w.
        recompute_logits: False forms the gradient in the forward. True saves eight numbers per row instead and computes
            the logits again in the backward: less memory, more time. reduction="none" always does so.
        kind, temperature, teacher_temperature, t_squared, beta, alpha, mask, ignore_index: As for `divergence`; a tensor as
            temperature must be readable, so on the CPU.
        num_valid: An upper bound on the number of rows that count, if known; on a GPU the other rows are then left out
            of the matrix products.
        labels: [...], token ids. Rows with `ignore_index` do not count.
        hard_weight: Adds this much of the cross-entropy with `labels`.
        logit_scale, logit_softcap: The logits are softcap · tanh(scale · x / softcap). A number for both sides, or
            (student's, teacher's); no softcap where it is None.
        process_group: The heads and biases are this rank's shard of the vocabulary, in rank order, with the same tokens
            on both sides; hidden states are whole, and so is a `TopK`. Each rank returns the whole loss and the whole gradient of
            `student_hidden`.
        reduction, num_items_in_batch: As for `divergence`; with `weights`, too, the mean is then their sum by that number.
        return_stats: Also return `DivergenceStats`, as `divergence` does. The student's entropy takes one more product of
            `student_hidden` and `student_head`, beside the four of a dense teacher or the three of a `TopK`.
        backend: "auto" takes the fastest implementation that runs here; `fastkd doctor` lists them.

    Returns:
        A scalar, or [...] for reduction="none"; float32, or float64 for float64 inputs.

    Example:
        >>> student_hidden, teacher_hidden = torch.randn(2, 8, 32, requires_grad=True), torch.randn(2, 8, 64)
        >>> student_head, teacher_head = torch.nn.Linear(32, 1000), torch.nn.Linear(64, 1000).requires_grad_(False)
        >>> loss = fastkd.linear_divergence(
        ...     student_hidden, student_head.weight, teacher_hidden, teacher_head.weight, temperature=2.0
        ... )
        >>> loss.backward()
        >>> student_head.weight.grad.shape
        torch.Size([1000, 32])
    """
    checks.tensor("student_hidden", student_hidden, "[..., D]")
    shape, sparse = student_hidden.shape[:-1], isinstance(teacher_hidden, TopK)
    _check_side("student", student_hidden, student_head, student_bias)
    checks.divergence_options(kind, beta, alpha)
    kind, temperature = without_mixture(kind, beta), _number("temperature", temperature)
    if teacher_temperature is not None:
        teacher_temperature = _number("teacher_temperature", teacher_temperature)
    student_hidden, student_head, student_bias = _autocast(student_hidden, student_head, student_bias)
    if process_group is not None and vocab is not None:
        raise ValueError(
            "vocab: cannot be combined with process_group; pass each rank the kept rows of its shard as heads"
        )
    by_token_id = process_group is not None and (sparse or bool(hard_weight))
    of_ranks = vocab_parallel.sizes(student_head, process_group) if by_token_id else None
    size = student_head.shape[0] if of_ranks is None else of_ranks.sum()
    if sparse:
        _check_sparse(teacher_hidden, student_hidden, size, kind, teacher_tokens, teacher_temperature)
        teacher, heads = teacher_hidden.flattened(), alignment.Heads((student_head, student_bias), None)
    else:
        _check_teacher(teacher_hidden, teacher_head, teacher_bias, student_hidden)
        teacher_hidden, teacher_head, teacher_bias = _autocast(teacher_hidden, teacher_head, teacher_bias)
        given = (student_head, student_bias), (teacher_head, teacher_bias)
        heads = alignment.aligned(vocab, teacher_tokens, kind, *given)
        teacher = (teacher_hidden.reshape(-1, teacher_hidden.shape[-1]), *heads.teacher)
    checks.same_device(
        student_hidden=student_hidden, student_head=student_head, student_bias=student_bias, mask=mask, labels=labels,
        weights=weights,
    )  # fmt: skip
    checks.flag("recompute_logits", recompute_logits)
    checks.mask("weights", weights, shape, "[...]")
    checks.one_of("reduction", reduction, get_args(DivergenceReduction))
    checks.flag("t_squared", t_squared)
    checks.number("hard_weight", hard_weight)
    counted = reductions.counted_rows(mask, labels, ignore_index, shape)
    reduction, divisor = reductions.denominator(reduction, num_items_in_batch, shape)
    if hard_weight:
        _check_labels(labels, counted, size)
    _check_num_valid(num_valid, counted, student_hidden)
    # With teacher_tokens="all" the divergence may be over the teacher's vocabulary; labels are ids of the student's.
    separate_labels = bool(hard_weight) and vocab is not None and teacher_tokens == "all"
    scales, caps = _both_sides("logit_scale", logit_scale, 1.0), _both_sides("logit_softcap", logit_softcap, 0.0)
    if teacher_temperature is not None and kind != "mse":  # logits r z, softcap included, at the student's temperature
        r = temperature / teacher_temperature
        scales, caps = (scales[0], scales[1] * r), (caps[0], caps[1] * r)
    options = linear_divergence_op.Options(
        kind, temperature, float(beta), float(alpha), temperature**2 if t_squared and kind != "mse" else 1.0,
        0.0 if separate_labels else float(hard_weight), scales, caps,
    )  # fmt: skip
    flat = [None if x is None else x.reshape(-1) for x in (counted, labels)]
    student = (student_hidden.reshape(-1, student_hidden.shape[-1]), *heads.student)
    checks.flag("return_stats", return_stats)
    if return_stats and (process_group is not None or separate_labels):
        raise ValueError(
            "return_stats: cannot be combined with process_group, nor with hard_weight where teacher_tokens='all'; leave it out"
        )
    row_weights = reductions.row_weights(counted, reduction, weights, student_hidden, divisor)
    scale = shift = None
    if heads.parts is not None:
        whole = (teacher[0], teacher_head, teacher_bias)
        mass = subset_mass.kept_log_mass(
            whole, *heads.parts, flat[0], options, student_hidden, num_valid, backend
        )  # [N]
        dtype = torch.float64 if student_hidden.dtype == torch.float64 else torch.float32
        scale, shift = alignment.weighting(kind, mass, options.factor, dtype)
    loss, rows = linear_divergence_op.linear_divergence(
        student, teacher, *flat, options, "low" if recompute_logits else "speed",
        row_weights if scale is None or row_weights is None else row_weights * scale, num_valid, backend,
        None if process_group is None else (process_group, of_ranks),
    )  # [N], or their weighted sum [], and [N]  # fmt: skip
    rows = rows if scale is None else rows * scale + shift
    if row_weights is None:
        loss = reductions.reduce(rows.reshape(shape), counted, reduction, weights)
    elif shift is not None:
        loss = loss + (row_weights * shift).sum()
    if return_stats:
        from fastkd.functional.entropy import linear_entropy  # which calls this function

        entropy = linear_entropy(
            student_hidden, student_head, bias=student_bias, temperature=temperature, mask=counted, logit_scale=scales[0],
            logit_softcap=caps[0] or None, reduction="none", backend=backend,
        )  # fmt: skip
        return loss, stats_of(rows.reshape(shape), entropy, teacher_hidden, counted)
    if not separate_labels:
        return loss
    return loss + hard_weight / divisor * linear_divergence(
        student_hidden, student_head, _one_hot(labels, counted), student_bias=student_bias, weights=weights,
        recompute_logits=recompute_logits, kind="soft_ce", mask=counted, num_valid=num_valid, logit_scale=options.scales[0],
        logit_softcap=options.caps[0] or None, reduction=reduction, backend=backend,
    )  # fmt: skip


def _number(name: str, x: float | Tensor) -> float:
    x = temperatures.as_number(name, x)
    if isinstance(x, Tensor):
        raise ValueError(f"{name}: reading {checks.describe(x)} would synchronise or break the graph; pass a number")
    return x


def _autocast(hidden, *more: Tensor | None):
    """As `nn.Linear` casts under autocast, which leaves float64 alone."""
    if not isinstance(hidden, Tensor) or not torch.is_autocast_enabled(hidden.device.type):
        return hidden, *more
    dtype = torch.get_autocast_dtype(hidden.device.type)
    return [x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in (hidden, *more)]


def _one_hot(labels: Tensor, counted: Tensor | None) -> TopK:
    """Labels as a sparse teacher with one token per row."""
    ids = (labels if counted is None else labels.masked_fill(~counted, 0))[..., None]
    return TopK(ids, torch.zeros_like(ids, dtype=torch.float32))


def _check_sparse(
    teacher: TopK, student_hidden: Tensor, size, kind: str, tokens: str, temperature: float | None
) -> None:
    if temperature is not None:
        raise ValueError("teacher_temperature: a TopK has log-probabilities, which are used as given; leave None")
    checks.topk("teacher_hidden", teacher, "student_hidden", student_hidden, kind, size)
    if tokens != "kept":
        raise ValueError(
            f"teacher_tokens={tokens!r}: a TopK is used as given, so leave 'kept'; for all tokens, take log_probs over "
            "the teacher's whole vocabulary and indices from vocab.encode"
        )


def _check_teacher(hidden: Tensor, head: Tensor | None, bias: Tensor | None, student_hidden: Tensor) -> None:
    checks.tensor("teacher_hidden", hidden, "[..., D]")
    _check_side("teacher", hidden, head, bias)
    checks.same_leading("teacher_hidden", hidden, "student_hidden", student_hidden, student_hidden.dim() - 1)
    checks.frozen("teacher_hidden", hidden)
    checks.frozen("teacher_head", head, bias)
    checks.same_device(student_hidden=student_hidden, teacher_hidden=hidden, teacher_head=head, teacher_bias=bias)


def _check_labels(labels: Tensor | None, counted: Tensor, size) -> None:
    if labels is None:
        raise ValueError("hard_weight: a cross-entropy needs labels [...]; pass labels=")
    checks.integers("labels", labels, "[...]")
    known = lambda: ((labels >= 0) & (labels < size) | ~counted).all()  # noqa: E731 (called only where values may be read)
    where = f"lie in [0, {size})" if isinstance(size, int) else "be a token of one of the shards"
    checks.values("labels", labels, known, f"a label that counts must {where}")


def _check_num_valid(num_valid: int | None, counted: Tensor | None, student_hidden: Tensor) -> None:
    if num_valid is None:
        return
    if not (isinstance(num_valid, int) and 0 <= num_valid <= student_hidden.numel()):
        raise ValueError(
            f"num_valid: expected the number of rows that count, as an int, got {checks.describe(num_valid)}"
        )
    if counted is not None:
        few = lambda: counted.sum() <= num_valid  # noqa: E731
        checks.values("num_valid", counted, few, f"at most {num_valid} rows may count")


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
    """(student's, teacher's), with None replaced by `none`."""
    pair = tuple(x) if isinstance(x, (tuple, list)) else (x, x)
    if len(pair) != 2:
        raise ValueError(f"{name}: expected a number, or (student, teacher), got {checks.describe(x)}")
    for part in pair:
        if part is not None:
            checks.positive(name, part)
    return tuple(none if part is None else float(part) for part in pair)
