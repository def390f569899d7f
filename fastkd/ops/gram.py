"""gram, the correlation of two self-similarity matrices (FCD): the autograd Functions, and which implementation runs.

A term is one pair of layers at one level: pair 0 level 0, pair 0 level 1, pair 1 level 0, ... A level has groups of rows:
the tokens of a sequence, the sequences at a position, or (official) the rows of `view(B, -1)` of all positions' matrices.
"""

import torch
from torch import Tensor

from fastkd import backends
from fastkd.ops.gradient_in_forward import HandedOver, can_hand_over, wants_gradient
from fastkd.reference import gram as reference

LEVELS = ("token", "sequence", "official")

# Kernels, with options = (levels (their indices in LEVELS), row, normalize, eps):
# fwd(students, teachers, mask, *options, with_gradient) -> (values, valid, saved), lists: 1 - rho of each term, [G], or
# per row of each Gram [G, R] with `row`; whether it is valid; and what bwd reads, nothing unless with_gradient.
# bwd(grads, students, teachers, mask, saved, *options) -> one gradient per student, in the student's dtype.
KERNELS = backends.kernels("gram", "gram_fwd", "gram_bwd")

# Rows of the longest groups in cache (kernels/gram/in_cache.py), by whether both sides are half precision.
IN_CACHE_ROWS = {True: 128, False: 64}


def _in_cache(rows: int, student: Tensor, teacher: Tensor) -> bool:
    return rows <= IN_CACHE_ROWS[student.element_size() == 2 and teacher.element_size() == 2]


def _values_fake(students, mask, levels, row):
    B, N, _ = students[0].shape
    shapes = {"token": (B, N), "sequence": (N, B), "official": (N, B) if row else (B, B)}
    shapes = [shapes[LEVELS[level]] for _ in students for level in levels]
    sizes = [shape if row else shape[:1] for shape in shapes]
    return [[students[0].new_empty(s, dtype=d) for s in sizes] for d in (torch.float32, torch.bool)]


def _fwd_fake(students, teachers, mask, levels, row, normalize, eps, with_gradient):
    """saved is the C++ kernel's: every term's gradient for an upstream gradient of 1, if each row has that of its group."""
    saved = []
    has_unit_grads = with_gradient and not row and LEVELS.index("official") not in levels
    for student in students if has_unit_grads else ():
        dtype = torch.bfloat16 if student.dtype == torch.bfloat16 else torch.float32
        saved += [student.new_empty(student.shape, dtype=dtype) for _ in levels]
    return *_values_fake(students, mask, levels, row), saved


def _triton_fake(students, teachers, mask, levels, row, normalize, eps, with_gradient):
    """saved: lengths, means and sums of the terms with tiled groups."""
    saved = []
    for student, teacher in zip(students, teachers, strict=True) if with_gradient else ():
        for level in levels:
            groups, rows = student.shape[:2] if level == 0 else student.shape[1::-1]
            official = level == LEVELS.index("official") and not row
            if official or not _in_cache(rows, student, teacher):
                widths = sum((x.shape[2] + 7) // 8 * 8 for x in (student, teacher))  # rows begin at 16 bytes
                size = groups * (4 + (8 if row or official else 4) * rows + widths)
                saved.append(student.new_empty(size, dtype=torch.float32))
    return *_values_fake(students, mask, levels, row), saved


def _grads_fake(grads, students, *_):
    return [torch.empty_like(student, memory_format=torch.contiguous_format) for student in students]


backends.fake("gram_fwd", _fwd_fake, _triton_fake)
backends.fake("gram_bwd", _grads_fake)
backends.fake(
    "gram_fwd_grad", lambda s, t, mask, levels, row, *_: (*_values_fake(s, mask, levels, row), _grads_fake([], s))
)
backends.fake("gram_rescale_grads", lambda *_: None)


def _save_layers(ctx, mask, count, layers, values, valid, more) -> None:
    ctx.save_for_backward(mask, *layers, *more)
    ctx.mark_non_differentiable(*valid)
    ctx.count = count
    if not torch.compiler.is_compiling():  # it makes the zeros of what is not used by itself
        ctx.set_materialize_grads(False)
        ctx.shapes = [x.shape for x in values]


def _of_values(ctx, grads) -> list[Tensor]:
    """The upstream gradients of the values, without those of `valid`."""
    grads = grads[: len(grads) // 2]
    if any(x is None for x in grads):  # values that nobody used
        used = next(x for x in grads if x is not None)
        grads = [used.new_zeros(ctx.shapes[i]) if x is None else x for i, x in enumerate(grads)]
    return list(grads)


def _saved_layers(ctx):
    """Students, teachers, mask, and what else was saved."""
    mask, *rest = ctx.saved_tensors
    return rest[: ctx.count], rest[ctx.count : 2 * ctx.count], mask, rest[2 * ctx.count :]


class Gram(backends.Function):
    """Either all of these students need a gradient, or none. Returns the values of all terms, then whether they are valid."""

    function = "gram_correlation_loss"

    @staticmethod
    def forward(ctx, backend, options, with_gradient, mask, count, *layers):
        values, valid, saved = KERNELS[backend].fwd(layers[:count], layers[count:], mask, *options, with_gradient)
        _save_layers(ctx, mask, count, layers, values, valid, saved)
        ctx.backend, ctx.options = backend, options
        return *values, *valid

    @staticmethod
    def backward(ctx, *grads):
        gradients = KERNELS[ctx.backend].bwd(_of_values(ctx, grads), *_saved_layers(ctx), *ctx.options)
        return None, None, None, None, None, *gradients, *[None] * ctx.count


class GramGradientInForward(backends.Function):
    """On the CPU: one pass computes the values, and the gradients summed over all levels."""

    function = "gram_correlation_loss"
    gradient_in_forward = True

    @staticmethod
    def forward(ctx, options, expected_upstream, mask, count, *layers):
        args = (layers[:count], layers[count:], mask, *options, *expected_upstream)
        values, valid, gradients = torch.ops.fastkd.gram_fwd_grad(*args)
        ctx.made = HandedOver(gradients)
        _save_layers(ctx, mask, count, layers, values, valid, valid)
        ctx.options, ctx.expected_upstream = options, expected_upstream
        return *values, *valid

    @staticmethod
    def backward(ctx, *grads):
        *layers, valid = _saved_layers(ctx)
        args = (*layers, *ctx.options, *ctx.expected_upstream)
        gradients = ctx.made.take(lambda: torch.ops.fastkd.gram_fwd_grad(*args)[2])
        torch.ops.fastkd.gram_rescale_grads(gradients, _of_values(ctx, grads), valid, *args)
        return None, None, None, None, *gradients, *[None] * ctx.count


def gram(
    students, teachers, mask, levels, row, normalize, eps, backend, expected_upstream=None
) -> tuple[list[Tensor], list[Tensor]]:
    """1 - rho of every term, and whether it is valid: per group [G], or per row of each group's Gram [G, R] (row).
    expected_upstream (a weight per level, mean): the caller will take the sum of a level's values, or their mean, times its
    weight. Any other upstream gradient is correct, but slower."""
    backend = backends.choose("gram", backend, students[0])
    if backend == "reference":
        sides = zip(students, teachers, strict=True)
        terms = [_by_reference(*side, mask, level, row, normalize, eps) for side in sides for level in levels]
        return [values for values, _ in terms], [valid for _, valid in terms]
    options = ([LEVELS.index(level) for level in levels], row, normalize, eps)
    wanted = [wants_gradient(s) for s in students]
    float16 = any(s.dtype == torch.float16 for s in students)  # needs a loss scale, which only the backward knows
    in_forward = backend == "cpu" and not float16 and can_hand_over()
    of_pairs: list = [()] * len(students)
    for with_gradient in (True, False):  # frozen students have a call of their own, without a gradient
        pairs = [i for i, wants in enumerate(wanted) if wants == with_gradient]
        if not pairs:
            continue
        layers = [_kernel_dtype(x[i]) for x in (students, teachers) for i in pairs]
        if with_gradient and expected_upstream is not None and in_forward:
            out = GramGradientInForward.apply(options, expected_upstream, mask, len(pairs), *layers)
        else:
            out = Gram.apply(backend, options, with_gradient, mask, len(pairs), *layers)
        terms = list(zip(out[: len(out) // 2], out[len(out) // 2 :], strict=True))
        for place, i in enumerate(pairs):
            of_pairs[i] = terms[place * len(levels) : (place + 1) * len(levels)]
    values, valid = zip(*[term for of_pair in of_pairs for term in of_pair], strict=True)
    return list(values), list(valid)


def _by_reference(student, teacher, mask, level, row, normalize, eps):
    grouping, pearson = "official" if level == "official" else "position", "row" if row else "matrix"
    level = "token" if level == "token" else "sequence"
    with backends.full_precision(student):
        return reference.gram(student, teacher, mask, level, grouping, pearson, normalize, eps)


def _kernel_dtype(x: Tensor) -> Tensor:
    return x.float() if x.dtype == torch.float64 else x
