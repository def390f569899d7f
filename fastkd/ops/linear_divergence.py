"""divergence from hidden states and LM heads: the autograd Functions, and which implementation runs."""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fastkd import backends
from fastkd.checks import KINDS
from fastkd.ops import linear_divergence_library, vocab_parallel, vocab_parallel_kernels
from fastkd.ops.divergence import TopK, kernel_dtype, kernel_form, without_mixture
from fastkd.ops.gradient_in_forward import HandedOver, can_hand_over, wants_gradient
from fastkd.reference import linear_divergence as reference


class Options(NamedTuple):
    """The options that are not tensors. factor multiplies the divergence, hard the cross-entropy with the labels; scales and
    caps are those of the student's and of the teacher's logits (cap 0: none)."""

    kind: str
    temperature: float
    beta: float
    alpha: float
    factor: float
    hard: float
    scales: tuple[float, float]
    caps: tuple[float, float]

    def as_numbers(self) -> tuple:
        mix = 1.0 - self.alpha if self.kind == "skew_kl" else 1.0 - self.beta
        (scale, t_scale), (cap, t_cap) = self.scales, self.caps
        return KINDS.index(self.kind), self.temperature, mix, self.factor, self.hard, scale, cap, t_scale, t_cap


# GRADIENT_IN_FORWARD: fwd(weights, *inputs, *numbers, to_hidden, to_head, to_bias) -> rows [N, 1] and the gradients of
# sum weights * rows; RECOMPUTED: fwd(*inputs, *numbers) -> rows [N, 1], stats and bwd(grad, stats, *inputs, *numbers, to_…)
# -> gradients. Those of hidden and bias are float32; the head's has the head's dtype, but in the forward, which does not know
# the loss scale yet, float32 if the head is float16. inputs: hidden, head, bias of the student and of the teacher, indices,
# log_probs, tail, mask, labels.
GRADIENT_IN_FORWARD = backends.kernels("linear_divergence", "linear_divergence_fwd_grad", "linear_divergence_scale")
if "cpu" in GRADIENT_IN_FORWARD:

    def _cpu_fwd_grad(weights, hidden, head, bias, t_hidden, t_head, *rest):
        inputs = weights, hidden, head, bias, t_hidden, t_head, *rest
        with_library = linear_divergence_library.serves(hidden, head, t_hidden, t_head)
        return (linear_divergence_library.fwd_grad if with_library else torch.ops.fastkd.linear_divergence_fwd_grad)(
            *inputs
        )

    GRADIENT_IN_FORWARD["cpu"] = GRADIENT_IN_FORWARD["cpu"]._replace(fwd=_cpu_fwd_grad)
RECOMPUTED = backends.kernels("linear_divergence", "linear_divergence_fwd", "linear_divergence_bwd")
_INPUTS = 11


def _gradients_fake(hidden, head, to_hidden, to_head, to_bias, head_dtype):
    return (
        hidden.new_empty(hidden.shape[0] if to_hidden else 0, hidden.shape[1], dtype=torch.float32),
        head.new_empty(head.shape[0] if to_head else 0, head.shape[1], dtype=head_dtype),
        head.new_empty(head.shape[0] if to_bias else 0, 1, dtype=torch.float32),
    )


def _rows_fake(hidden, width):
    return hidden.new_empty(hidden.shape[0], width, dtype=torch.float32)


def _fwd_grad_fake(weights, hidden, head, *rest):
    head_dtype = torch.bfloat16 if head.dtype == torch.bfloat16 else torch.float32
    return _rows_fake(hidden, 1), *_gradients_fake(hidden, head, *rest[-3:], head_dtype)


def _bwd_fake(grad, stats, hidden, head, *rest):
    to_hidden, to_head, to_bias = rest[-3:]
    return _gradients_fake(hidden, head, to_hidden, to_head, to_bias, head.dtype if to_head else torch.float32)


backends.fake("linear_divergence_fwd_grad", _fwd_grad_fake)
backends.fake(
    "linear_divergence_rows", lambda s, t, *rest: (_rows_fake(s, 1), s.new_empty(s.shape[1] if rest[-1] else 0, 1))
)
backends.fake("linear_divergence_fwd", lambda h, *rest: (_rows_fake(h, 1), _rows_fake(h, 8)))
backends.fake("linear_divergence_bwd", _bwd_fake)
backends.fake("linear_divergence_scale", lambda x, factor, like: torch.empty_like(x, dtype=like.dtype))
backends.fake("linear_divergence_rescale_grad", lambda *_: None)


class LinearDivergenceGradientInForward(backends.Function):
    """sum weights * rows, whose gradients are made while the logits are in memory, and rows, which have none."""

    function = "linear_divergence"
    gradient_in_forward = True

    @staticmethod
    def forward(ctx, backend, shard, numbers, wanted, hand_over, weights, *inputs):
        fwd = GRADIENT_IN_FORWARD[backend].fwd if shard is None else partial(vocab_parallel_kernels.fwd_grad, shard)
        rows, *gradients = fwd(weights, *inputs, *numbers, *wanted)
        ctx.made = HandedOver(gradients) if hand_over else None
        ctx.save_for_backward(rows, *((weights, *inputs) if hand_over else gradients))
        ctx.backend, ctx.fwd, ctx.numbers, ctx.wanted = backend, fwd, numbers, wanted
        ctx.dtypes = (inputs[0].dtype, inputs[1].dtype, torch.float32)
        rows = rows[:, 0]
        ctx.mark_non_differentiable(rows)
        return (rows * weights).sum(), rows

    @staticmethod
    def backward(ctx, grad, _):
        rows, *saved = ctx.saved_tensors
        made = ctx.made
        gradients = saved if made is None else made.take(lambda: ctx.fwd(*saved, *ctx.numbers, *ctx.wanted)[1:])
        scaled = [None, None, None]
        for i, (dtype, wanted) in enumerate(zip(ctx.dtypes, ctx.wanted, strict=True)):
            if wanted:
                scaled[i] = _rescaled(gradients[i], grad, dtype, ctx.backend, in_place=made is not None)
        to_bias = None if scaled[2] is None else scaled[2][:, 0]
        to_weights = grad * rows[:, 0] if ctx.needs_input_grad[5] else None
        return None, None, None, None, None, to_weights, scaled[0], scaled[1], to_bias, *[None] * (_INPUTS - 3)


def _rescaled(x: Tensor, factor: Tensor, dtype: torch.dtype, backend: str, in_place: bool) -> Tensor:
    if in_place and x.dtype == dtype:
        if backend == "cpu":  # returns immediately if the factor is 1, as expected
            torch.ops.fastkd.linear_divergence_rescale_grad(x, factor)
            return x
        return x.mul_(factor)
    return GRADIENT_IN_FORWARD[backend].bwd(x, factor, x.new_empty(0, dtype=dtype))


class LinearDivergence(backends.Function):
    """Rows. Saves eight numbers for each, and computes the logits again in the backward."""

    function = "linear_divergence"

    @staticmethod
    def forward(ctx, backend, shard, numbers, wanted, *inputs):
        ctx.kernels = RECOMPUTED[backend] if shard is None else vocab_parallel_kernels.recomputed(shard)
        rows, stats = ctx.kernels.fwd(*inputs, *numbers)
        ctx.save_for_backward(stats, *inputs)
        ctx.numbers, ctx.wanted = numbers, wanted
        return rows[:, 0]

    @staticmethod
    def backward(ctx, grad):
        stats, *inputs = ctx.saved_tensors
        hidden, head, bias = ctx.kernels.bwd(grad, stats, *inputs, *ctx.numbers, *ctx.wanted)
        gradients = (hidden.to(inputs[0].dtype), head.to(inputs[1].dtype), bias[:, 0])
        gradients = (x if wanted else None for x, wanted in zip(gradients, ctx.wanted, strict=True))
        return None, None, None, None, *gradients, *[None] * (_INPUTS - 3)


def linear_divergence(
    student: tuple,
    teacher: tuple | TopK,
    mask,
    labels,
    options: Options,
    memory: str,
    row_weights,
    num_valid,
    backend: str,
    ranks: tuple | None = None,
) -> tuple[Tensor, Tensor]:
    """student, teacher: (hidden [N, D], head [V, D], bias [V] or None). Rows [N], masked ones 0, twice; with row_weights [N],
    what memory="speed" can do better: sum row_weights * rows, and rows whose gradient may be missing. ranks: where the heads
    are shards, (process_group, what vocab_parallel.sizes returned or None)."""
    options = options._replace(kind=without_mixture(options.kind, options.alpha))
    backend = backends.choose("linear_divergence", backend, student[0])
    labels = None if labels is None else labels.long()
    if ranks is not None and backend == "reference":
        rows = vocab_parallel.rows(student, teacher, mask, labels, *ranks, options)
        return rows if row_weights is None else (rows * row_weights).sum(), rows
    if backend == "reference":
        sides = (*student, None, None, None) if isinstance(teacher, TopK) else (*student, *teacher)
        with backends.full_precision(student[0]):
            rows = reference.linear_divergence(
                *sides, mask, options.kind, options.temperature, options.beta, options.alpha,
                topk=teacher if isinstance(teacher, TopK) else None, labels=labels,
                **{name: getattr(options, name) for name in ("factor", "hard", "scales", "caps")},
            )  # fmt: skip
            return rows if row_weights is None else (rows * row_weights).sum(), rows
    if ranks is not None and backend == "cpu" and mask is not None:  # a mask on the CPU costs nothing to look at
        num_valid = int(mask.sum())
    packs = backend == "triton" or (ranks is not None and num_valid != len(student[0]))
    if packs and num_valid is not None and mask is not None:
        packed, where = _packed(student, teacher, mask, labels, row_weights, num_valid)
        loss, rows = linear_divergence(*packed[:4], options, memory, packed[4], None, backend, ranks)
        rows = rows.new_zeros(len(mask)).index_add(0, where, rows)
        return rows if row_weights is None else loss, rows
    hidden, head, bias = student
    if isinstance(teacher, TopK):
        teacher_inputs = (None, None, None, *kernel_form(teacher))
    else:
        teacher_inputs = (*map(kernel_dtype, teacher[:2]), _bias(teacher[2]), None, None, None)
    wanted = tuple(wants_gradient(x) for x in student)
    inputs = (hidden, kernel_dtype(head), _bias(bias), *teacher_inputs, mask, labels)
    # If no gradient is needed, streaming the logits is as fast for the kinds that need one pass over them.
    one_pass = options.kind in ("forward_kl", "soft_ce", "mse") or isinstance(teacher, TopK)
    shard = None
    if ranks is not None:
        shard = vocab_parallel_kernels.Shard(backend, ranks[0], vocab_parallel.first_token(ranks[1], ranks[0]))
    if row_weights is not None and memory == "speed" and (any(wanted) or not one_pass):
        return LinearDivergenceGradientInForward.apply(
            backend, shard, options.as_numbers(), wanted, can_hand_over(), row_weights.float(), *inputs
        )
    rows = LinearDivergence.apply(backend, shard, options.as_numbers(), wanted, *inputs)
    return rows if row_weights is None else (rows * row_weights).sum(), rows


def _packed(student, teacher, mask, labels, row_weights, num_valid):
    """The valid rows, found without synchronising: num_valid of them at most, and masked rows up to that number."""
    where = torch.nonzero_static(mask, size=num_valid, fill_value=0)[:, 0]  # [num_valid]
    take = lambda x: x[where] if isinstance(x, Tensor) else x  # noqa: E731
    if isinstance(teacher, TopK):
        teacher = TopK(*map(take, teacher))
    else:
        teacher = (take(teacher[0]), *teacher[1:])
    packed_mask = torch.arange(num_valid, device=mask.device) < mask.sum()
    return ((take(student[0]), *student[1:]), teacher, packed_mask, take(labels), take(row_weights)), where


def _bias(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float()
