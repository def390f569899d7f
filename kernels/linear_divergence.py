"""divergence between hidden @ head^T of two models: library GEMMs on a chunk of rows, and one kernel that turns a row's logits
into its value and, in the same pass over the vocabulary, the gradient.

    s, t = x Ws^T, y Wt^T      [C, V], float32 out of the GEMM whatever its operands: near convergence the gradient is a
                               difference of logits, and bfloat16 would leave nothing of it
    rows, dZ = row_kernel      the maths of divergence/row.py; dZ in the student's dtype, rounded once
    dX = dZ Ws,  dW += dZ^T x  dW in float32

Gradient in the forward: dZ is formed there. With recomputed logits, the forward keeps eight numbers per row, and the backward
makes the logits again. Chunks of C rows: dW is read and written once per chunk, 8 bytes per element against at least 6 C flops.
Recomputing is for those who lack memory: fewer rows. A chunk's logits and dZ have no more than BUDGET bytes, unless LEAST_ROWS
rows of the vocabulary need more.

Rounded to float16, dZ must not be subnormal: weights are divided by the largest of them, and the gradients multiplied by it.

Hard labels add hard * (log sum e^s - s_label), at temperature 1 whatever the divergence's.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks import contiguous_rows, is_masked, load_pair, maxima, multiply, row_of
from .divergence.row import LOG2_E, MSE, Stats, compare, exact_differences, gradient, load_stats, squares, store_stats
from .divergence.topk import divergence_topk_bwd, divergence_topk_fwd

VALUE, VALUE_AND_GRADIENT, GRADIENT = (tl.constexpr(mode) for mode in range(3))
ROWS = {False: 2048, True: 512}  # of a chunk at most, by whether the logits are recomputed
BUDGET, LEAST_ROWS = 1 << 30, 128


@triton.jit
def log_sum_exp(row, BLOCK: tl.constexpr):
    """The log-sum-exp of the student's logits, at temperature 1."""
    top, _ = maxima(row, row.end, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, row.end, BLOCK):
        b_s, _t = load_pair(row, start, BLOCK, False)
        total += tl.exp2((b_s - top) * LOG2_E)
    return top + tl.log(tl.sum(total))


@triton.jit
def row_kernel(
    s_ptr, t_ptr, weights_ptr, mask_ptr, labels_ptr, values_ptr, stats_ptr, grad_ptr, s_stride, t_stride, grad_stride, V,
    inv_T, mix, rest, factor, hard, scale, inv_cap,
    KIND: tl.constexpr, MODE: tl.constexpr, SHAPED: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program per row. stats [N, 8]: the seven of divergence/row.py, and the log-sum-exp for the labels."""
    i_n = tl.program_id(0).to(tl.int64)
    grad_ptr += i_n * grad_stride // 8 * 8
    stats_ptr += 8 * i_n
    o_v = tl.arange(0, BLOCK)
    if is_masked(mask_ptr, i_n):
        if MODE != GRADIENT:
            tl.store(values_ptr + i_n, 0.0)
        if MODE != VALUE:
            for start in range(0, V, BLOCK):
                tl.store(grad_ptr + start + o_v, tl.zeros([BLOCK], grad_ptr.dtype.element_ty), mask=start + o_v < V)
        return
    row = row_of(s_ptr, t_ptr, i_n, s_stride, t_stride, V, 8)  # all begin at 16 bytes: Chunks
    label, log_sum = 0, 0.0
    if labels_ptr is not None:
        label = tl.load(labels_ptr + i_n).to(tl.int32)
    stats = Stats((0.0, 0.0), 1.0, 1.0, 0.0, 0.0, 0.0)
    EXACT: tl.constexpr = exact_differences(s_ptr.dtype.element_ty, t_ptr.dtype.element_ty)
    if MODE == GRADIENT:
        if KIND != MSE:
            stats = load_stats(stats_ptr)
        if labels_ptr is not None:
            log_sum = tl.load(stats_ptr + 7)
    else:
        if KIND == MSE:
            value = squares(row, BLOCK, STAGES)
        else:
            value, stats = compare(row, inv_T, (mix, rest), KIND, BLOCK, STAGES)
        value *= factor
        if labels_ptr is not None:
            log_sum = log_sum_exp(row, BLOCK)
            exists = (label >= 0) & (label < V)  # elsewhere NaN, not a fault
            s_label = tl.load(s_ptr + i_n * s_stride + tl.where(exists, label, 0)).to(tl.float32)
            value += hard * tl.where(exists, log_sum - s_label, float("nan"))
        tl.store(values_ptr + i_n, value)
        if MODE == VALUE:
            store_stats(stats_ptr, stats)
            tl.store(stats_ptr + 7, log_sum)
    if MODE != VALUE:
        g = tl.load(weights_ptr + i_n).to(tl.float32)
        for start in range(0, V, BLOCK):
            b_s, b_t = load_pair(row, start, BLOCK, False)
            grad = gradient(b_s, b_t, g * factor, stats, inv_T, (mix, rest), KIND, EXACT)
            if labels_ptr is not None:
                q = tl.exp2((b_s - log_sum) * LOG2_E)
                grad += (g * hard) * (q - tl.where(start + o_v == label, 1.0, 0.0))
            if SHAPED:
                y = b_s * inv_cap
                grad *= scale * (1.0 - y * y)
            tl.store(grad_ptr + start + o_v, grad.to(grad_ptr.dtype.element_ty), mask=start + o_v < V)


# Bytes of local memory a thread may use (tests/ops/test_triton.py), and the launch by the width of the row.
SPILL_LIMIT = {"row_kernel": 32}
SMALL = {"BLOCK": 1024, "STAGES": 1, "num_warps": 4}
LARGE = {
    "BLOCK": 2048,
    "STAGES": 3,
    "num_warps": 8,
    "maxnreg": 128,
}  # two programs on a multiprocessor, with any Triton


class Chunks:
    """The arguments of a call, and buffers for the logits of one chunk of rows."""

    def __init__(self, recompute, hidden, head, bias, t_hidden, t_head, t_bias, indices, log_probs, tail, mask, labels,
                 kind, temperature, mix, factor, hard, scale, cap, t_scale, t_cap):  # fmt: skip
        self.rows, self.vocabulary = hidden.shape[0], head.shape[0]
        self.mask = contiguous_rows(mask)
        # A masked row may hold NaN, and 0 times that would reach the head's gradient.
        drop = None if mask is None else ~mask[:, None]
        self.hidden, self.t_hidden = (
            x if x is None or drop is None else x.masked_fill(drop, 0) for x in (hidden, t_hidden)
        )
        self.student, self.teacher = (head, bias, scale, cap), (t_head, t_bias, t_scale, t_cap)
        self.sparse = None if indices is None else (indices, log_probs, tail)
        self.labels = contiguous_rows(labels) if hard else None
        self.soft, self.factor, self.hard = (kind, temperature, mix), factor, hard
        width = -(-self.vocabulary // 8) * 8  # rows begin at 16 bytes, as the GEMM likes it
        count = 1 if self.sparse else 2
        grad_dtype = hidden.dtype if hidden.dtype == head.dtype else torch.float32
        fitting = BUDGET // max(width * (4 * count + grad_dtype.itemsize), 1) // LEAST_ROWS * LEAST_ROWS
        self.step = max(1, min(ROWS[recompute], max(fitting, LEAST_ROWS), self.rows))
        self.buffers = [hidden.new_empty(self.step, width, dtype=torch.float32) for _ in range(count)]
        self.grad = hidden.new_empty(self.step, width, dtype=grad_dtype)

    def __iter__(self):
        return (slice(begin, min(begin + self.step, self.rows)) for begin in range(0, self.rows, self.step))

    def logits(self, part, of_teacher=False) -> Tensor:
        head, bias, scale, cap = self.teacher if of_teacher else self.student
        x = (self.t_hidden if of_teacher else self.hidden)[part]
        out = self.buffers[of_teacher][: x.shape[0], : self.vocabulary]
        multiply(x, head.t(), out)
        if bias is not None:
            out += bias
        if scale != 1:
            out *= scale
        return out.div_(cap).tanh_().mul_(cap) if cap else out

    def launch(self, mode, part, values, stats, weights) -> Tensor:
        """Against a dense teacher: returns the gradient of the chunk's logits, if `mode` makes one."""
        s, t = self.logits(part), self.logits(part, of_teacher=True)
        grad = self.grad[: s.shape[0], : self.vocabulary]
        (kind, temperature, mix), (_, _, scale, cap) = self.soft, self.student
        mask, labels = (None if x is None else x[part] for x in (self.mask, self.labels))
        row_kernel[(s.shape[0],)](
            s, t, weights, mask, labels, values, stats, grad, s.stride(0), t.stride(0), grad.stride(0), self.vocabulary,
            1 / temperature, mix, 1 - mix, self.factor, self.hard, scale, 1 / cap if cap else 0.0,
            KIND=kind, MODE=mode.value, SHAPED=scale != 1 or cap != 0, enable_fp_fusion=True,
            **(SMALL if self.vocabulary <= 1024 else LARGE),
        )  # fmt: skip
        return grad

    def launch_sparse(self, mode, part, values, stats, weights) -> Tensor:
        """The same against a sparse teacher, whose rows have kernels of their own."""
        s, makes_value, makes_gradient = self.logits(part), mode.value != 2, mode.value != 0
        indices, log_probs, tail = (None if x is None else x[part] for x in self.sparse)
        mask = None if self.mask is None else self.mask[part]
        if makes_value:
            rows, topk_stats = divergence_topk_fwd(s, indices, log_probs, tail, mask, *self.soft)
            values.copy_(self.factor * rows)
            stats[:, :7] = topk_stats
        if makes_gradient:
            topk_stats = stats[:, :7].contiguous()
            grad = divergence_topk_bwd(weights * self.factor, s, indices, log_probs, tail, mask, topk_stats, *self.soft)
        if self.labels is not None:
            labels = self.labels[part] if mask is None else self.labels[part].masked_fill(~mask, 0)
            if makes_value:
                stats[:, 7] = s.logsumexp(-1)
                cross_entropy = stats[:, 7] - s.gather(-1, labels[:, None])[:, 0]
                values += self.hard * (cross_entropy if mask is None else cross_entropy.masked_fill(~mask, 0))
            if makes_gradient:
                w = self.hard * (weights if mask is None else weights.masked_fill(~mask, 0))[:, None]
                grad += w * (s - stats[:, 7:8]).exp_()
                rows = torch.arange(len(labels), device=labels.device)
                # scatter_add_ would synchronise under deterministic algorithms
                grad.index_put_((rows, labels), -w[:, 0], accumulate=True)
        if not makes_gradient:
            return None
        _, _, scale, cap = self.student
        if scale != 1 or cap:
            grad *= scale * (1 - (s / cap).square()) if cap else scale
        return grad.to(self.grad.dtype)

    def run(self, mode, part, values, stats, weights) -> Tensor:
        return (self.launch if self.sparse is None else self.launch_sparse)(mode, part, values, stats, weights)


def _over_largest(weights: Tensor, chunks: Chunks) -> tuple[Tensor, Tensor | None]:
    if chunks.grad.dtype != torch.float16 or not weights.numel():
        return weights, None
    largest = weights.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
    return weights / largest, largest


class Gradients:
    """The gradients, in float32; those that are not wanted have no rows."""

    def __init__(self, chunks, to_hidden, to_head, to_bias):
        self.chunks, self.wanted = chunks, (to_hidden, to_head, to_bias)
        like, head = chunks.hidden, chunks.student[0]
        zeros = lambda *size: like.new_zeros(size, dtype=torch.float32)  # noqa: E731
        self.hidden = zeros(like.shape[0] if to_hidden else 0, like.shape[1])
        self.head = zeros(head.shape[0] if to_head else 0, head.shape[1])
        self.bias = zeros(head.shape[0] if to_bias else 0, 1)

    def add(self, part, grad) -> None:
        to_hidden, to_head, to_bias = self.wanted
        if to_hidden:
            multiply(grad, self.chunks.student[0], self.hidden[part])
        if to_head:
            multiply(grad.t(), self.chunks.hidden[part], self.head, add=True)
        if to_bias:
            self.bias[:, 0] += grad.sum(0, dtype=torch.float32)

    def finish(self, largest: Tensor | None) -> None:
        """Times the weights' largest. The chunks' buffers are not needed any more."""
        self.chunks.buffers = self.chunks.grad = None
        for x in (self.hidden, self.head, self.bias) if largest is not None else ():
            x *= largest


def linear_divergence_fwd_grad(
    weights: Tensor, hidden: Tensor, head: Tensor, bias: Tensor | None, t_hidden: Tensor | None, t_head: Tensor | None,
    t_bias: Tensor | None, indices: Tensor | None, log_probs: Tensor | None, tail: Tensor | None, mask: Tensor | None,
    labels: Tensor | None, kind: int, temperature: float, mix: float, factor: float, hard: float, scale: float, cap: float,
    t_scale: float, t_cap: float, to_hidden: bool, to_head: bool, to_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Rows [N, 1], and the gradients of sum weights * rows."""
    chunks = Chunks(False, hidden, head, bias, t_hidden, t_head, t_bias, indices, log_probs, tail, mask, labels, kind,
                    temperature, mix, factor, hard, scale, cap, t_scale, t_cap)  # fmt: skip
    gradients, values = (
        Gradients(chunks, to_hidden, to_head, to_bias),
        hidden.new_empty(hidden.shape[0], 1, dtype=torch.float32),
    )
    stats = values.new_empty(chunks.step, 8)
    wanted = to_hidden or to_head or to_bias
    weights, largest = _over_largest(weights, chunks)
    for part in chunks:
        mode = VALUE_AND_GRADIENT if wanted else VALUE
        grad = chunks.run(mode, part, values[part, 0], stats[: part.stop - part.start], weights[part].contiguous())
        if wanted:
            gradients.add(part, grad)
    grad = None
    gradients.finish(largest)
    to_head = gradients.head.to(torch.bfloat16) if head.dtype == torch.bfloat16 else gradients.head
    return values, gradients.hidden, to_head, gradients.bias


def linear_divergence_scale(x: Tensor, factor: Tensor, like: Tensor) -> Tensor:
    return (x * factor).to(like.dtype)


def linear_divergence_fwd(
    hidden: Tensor, head: Tensor, bias: Tensor | None, t_hidden: Tensor | None, t_head: Tensor | None, t_bias: Tensor | None,
    indices: Tensor | None, log_probs: Tensor | None, tail: Tensor | None, mask: Tensor | None, labels: Tensor | None,
    kind: int, temperature: float, mix: float, factor: float, hard: float, scale: float, cap: float, t_scale: float,
    t_cap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Rows [N, 1], stats [N, 8]."""
    chunks = Chunks(True, hidden, head, bias, t_hidden, t_head, t_bias, indices, log_probs, tail, mask, labels, kind,
                    temperature, mix, factor, hard, scale, cap, t_scale, t_cap)  # fmt: skip
    values, stats = (hidden.new_zeros(hidden.shape[0], width, dtype=torch.float32) for width in (1, 8))
    for part in chunks:
        chunks.run(VALUE, part, values[part, 0], stats[part], values)
    return values, stats


def linear_divergence_bwd(
    grad: Tensor, stats: Tensor, hidden: Tensor, head: Tensor, bias: Tensor | None, t_hidden: Tensor | None,
    t_head: Tensor | None, t_bias: Tensor | None, indices: Tensor | None, log_probs: Tensor | None, tail: Tensor | None,
    mask: Tensor | None, labels: Tensor | None, kind: int, temperature: float, mix: float, factor: float, hard: float,
    scale: float, cap: float, t_scale: float, t_cap: float, to_hidden: bool, to_head: bool, to_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """grad [N] -> gradients of hidden and bias in float32, of the head in its dtype."""
    chunks = Chunks(True, hidden, head, bias, t_hidden, t_head, t_bias, indices, log_probs, tail, mask, labels, kind,
                    temperature, mix, factor, hard, scale, cap, t_scale, t_cap)  # fmt: skip
    gradients, (grad, largest) = (
        Gradients(chunks, to_hidden, to_head, to_bias),
        _over_largest(grad.contiguous(), chunks),
    )
    for part in chunks:
        gradients.add(part, chunks.run(GRADIENT, part, grad[part], stats[part], grad[part]))
    gradients.finish(largest)
    return gradients.hidden, gradients.head.to(head.dtype), gradients.bias
