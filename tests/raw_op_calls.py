"""Valid calls of every compiled op, and the many ways of getting one wrong: `python tests/raw_op_calls.py SEED STEP FROM TO`.

Runs calls FROM to TO of those that SEED and STEP give, and says so line by line, so that after a crash the last line is the culprit.
A call must end in an exception or in a valid result: of the shapes that the fake implementation promises, and the same
from contiguous copies of its arguments.
"""

import itertools
import os
import random
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

if "FASTKD_LIBRARY" in os.environ:  # before fastkd loads its own
    torch.ops.load_library(os.environ["FASTKD_LIBRARY"])
from fastkd import functional  # noqa: F401 (its import loads the ops, and what they look like)
from fastkd.ops import gemm, probe  # noqa: F401

OPS = torch.ops.fastkd
F32, F64, BF16, FLOAT8 = torch.float32, torch.float64, torch.bfloat16, torch.float8_e4m3fn
DTYPES = (F32, F64, BF16, torch.float16, FLOAT8, torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64)
WRONG_NUMBERS = {
    "int": (-1, 0, 1, 7, 2**62, 2**63 - 1, -(2**63), 2**64, 1.5, None, "1"),
    "float": (0.0, -1.0, float("nan"), float("inf"), -float("inf"), 1e300, 1e-300, None, "1"),
    "bool": (True, False, None, "1"),
}


def normal(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(shape).to(dtype)


def ids(*shape: int, below: int) -> Tensor:
    return torch.randint(below, shape)


def mask(*shape: int) -> Tensor:
    return torch.rand(shape) < 0.7


def _number(x: float, dtype: torch.dtype = F64) -> Tensor:
    return torch.tensor(x, dtype=dtype)


def _divergence(dtype: torch.dtype, kind: int):
    return normal(3, 5, dtype=dtype), normal(3, 5, dtype=BF16), mask(3), (kind, 2.0, 0.9)


def _divergence_bwd(dtype, kind):
    s, t, kept, options = _divergence(dtype, kind)
    return normal(3), s, t, kept, OPS.divergence_fwd(s, t, kept, *options)[1], *options


def _shard_terms(kind):
    s, t, _, options = _divergence(F32, kind)
    return s, t.float(), OPS.divergence_fwd(s, t.float(), None, *options)[1], *options


def _topk(dtype, kind):
    log_probs = normal(3, 3, dtype=F64).log_softmax(-1) - 0.1
    tail = torch.log(-torch.expm1(log_probs.logsumexp(-1)))
    return normal(3, 5, dtype=dtype), ids(3, 3, below=5), log_probs, tail, mask(3), (kind, 2.0, 0.9)


def _topk_bwd(dtype, kind):
    *inputs, options = _topk(dtype, kind)
    return normal(3), *inputs, OPS.divergence_topk_fwd(*inputs, *options)[1], *options


def _linear(dtype, sparse: bool):
    s = normal(3, 4, dtype=dtype), normal(7, 4, dtype=dtype), normal(7)
    teacher = (
        (None, None, None, *_topk(dtype, 0)[1:4])
        if sparse
        else (normal(3, 6), normal(7, 6), normal(7), None, None, None)
    )
    return *s, *teacher, mask(3), ids(3, below=7), 0, 2.0, 0.9, 4.0, 0.5, 1.5, 30.0, 1.0, 0.0


def _linear_bwd(dtype, sparse):
    inputs = _linear(dtype, sparse)
    return normal(3), OPS.linear_divergence_fwd(*inputs)[1], *inputs, True, True, True


def layers(dtype, count: int, *shape: int) -> list[Tensor]:
    return [normal(*shape, dtype=dtype) for _ in range(count)]


def _attention(dtype, length: int):
    sides = [layers(dtype, n, 2, 2, length, d) for n, d in ((2, 3), (2, 3), (3, 4), (3, 4))]
    return *sides, [0.5] * 5, mask(2, length), False


def _info_nce(gathered: bool, bank_dtype=F32):
    index = ids(3, 6, below=9) if gathered else None
    scale = torch.rand(9) if bank_dtype == FLOAT8 else None
    both = ids(3, below=9), torch.arange(9)
    return normal(3, 5), normal(3, 5), normal(9, 5).to(bank_dtype), index, _number(14.0), *both, True, scale


def _unit_bwd():
    x, weight = normal(3, 5), normal(4, 5)
    return normal(3, 4), *OPS.unit_linear_fwd(x, weight, normal(4)), x, weight, True


def _sample(labels: bool, replacement: bool, window: int = 0):
    table = None, None, None
    if labels:
        classes = torch.arange(9) % 3
        table = classes, classes.argsort(stable=True), torch.tensor([0, 3, 6, 9])
    return ids(4, below=9), 3, 9, *table, torch.tensor([5, 1]), replacement, window


def _gram(dtype, levels: list[int], row: bool):
    kept = None if 2 in levels else mask(4, 5)
    return layers(dtype, 2, 4, 5, 3), layers(F32, 2, 4, 5, 6), kept, levels, row, True, 1e-6


def _gram_bwd(dtype, levels, row):
    question = _gram(dtype, levels, row)
    values, _, saved = OPS.gram_fwd(*question, True)
    return [torch.rand_like(x) for x in values], *question[:3], saved, *question[3:]


def _gram_rescale_grads(dtype, levels, row):
    question, expected = _gram(dtype, levels, row), ([0.5] * len(levels), True)
    values, valid, found = OPS.gram_fwd_grad(*question, *expected)
    return found, [torch.rand_like(x) for x in values], valid, *question, *expected


def _relation(dtype, pairs: bool):
    ys, yt = (normal(2, 2, 5, 3, dtype=dtype), normal(2, 2, 5, 4)) if pairs else (None, None)
    return normal(2, 2, 5, 3, dtype=dtype), ys, normal(2, 2, 5, 4), yt, mask(2, 5), (True, 0.5, 0.4)


def _relation_bwd(dtype, pairs, gradient_in_forward):
    *inputs, options = _relation(dtype, pairs)
    return normal(2, 2, 5), *inputs, *OPS.relation_fwd(*inputs, *options, gradient_in_forward)[1:], *options


def _transport(dtype, start: bool):
    hints = (torch.rand(2, 3, 4, dtype=F64), torch.rand(2, 4, dtype=F64)) if start else (None, None)
    return (
        torch.rand(2, 3, 4, dtype=dtype),
        torch.full((2, 3), 4.0, dtype=dtype),
        torch.full((2, 4), 3.0, dtype=dtype),
        *hints,
    )


def _linear_rows(dtype, sparse):
    """All rows count: the mask of `_linear` is left out."""
    inputs = [*_linear(dtype, sparse)]
    inputs[9] = None  # the mask
    logits = [normal(len(inputs[0]), len(inputs[1])) for _ in range(2)]
    return *logits, normal(len(inputs[0])), *inputs, True


def _cost_attention(dtype):
    return *_transport(dtype, False)[:3], True, 1.0, False, True, False


# Of every op some valid calls; arguments that are the same three numbers everywhere come as a tuple of their own.
VALID: dict[str, list[Callable[[], tuple]]] = {
    "probe": [lambda: (normal(3, 5),)],
    "transport": [lambda: _transport(F64, True), lambda: _transport(F32, False)],
    "transport_emulated": [lambda: _transport(F64, True), lambda: _transport(F32, False)],
    "cost_attention": [lambda: _cost_attention(F64), lambda: _cost_attention(F32)],
    "cost_attention_emulated": [lambda: _cost_attention(F64)],
    "divergence_fwd": [lambda: _divergence(F32, 2), lambda: _divergence(BF16, 3)],
    "divergence_bwd": [lambda: _divergence_bwd(F32, 2), lambda: _divergence_bwd(BF16, 3)],
    "divergence_fwd_grad": [lambda: (*_divergence(F32, 0), True, 4.0), lambda: (*_divergence(F32, 6), False, 1.0)],
    "divergence_rescale_grad": [lambda: (normal(3, 5), normal(3), mask(3), True, 4.0), lambda: (normal(3, 5), normal(3), None, False, 1.0)],
    "divergence_shard_terms": [lambda: _shard_terms(1), lambda: _shard_terms(3)],
    "divergence_log_sum_exp": [lambda: (normal(3, 5), 2.0)],
    "divergence_topk_fwd": [lambda: _topk(F32, 2), lambda: _topk(BF16, 3)],
    "divergence_topk_bwd": [lambda: _topk_bwd(F32, 0), lambda: _topk_bwd(BF16, 4)],
    "linear_divergence_fwd_grad": [
        lambda: (normal(3), *_linear(F32, False), True, True, True),
        lambda: (normal(3), *_linear(BF16, True), True, True, True),
    ],
    "linear_divergence_rows": [lambda: _linear_rows(F32, False), lambda: _linear_rows(BF16, True)],
    "linear_divergence_fwd": [lambda: _linear(F32, False), lambda: _linear(BF16, True)],
    "linear_divergence_bwd": [lambda: _linear_bwd(F32, False), lambda: _linear_bwd(BF16, True)],
    "linear_divergence_scale": [lambda: (normal(3, 5), _number(2.0, F32), normal(0)), lambda: (normal(3, 5), _number(1.0, F32), normal(0, dtype=BF16))],
    "linear_divergence_rescale_grad": [lambda: (normal(3, 5), _number(2.0, F32)), lambda: (normal(3, 5, dtype=BF16), _number(1.0, F32))],
    "gemm_nt": [lambda: (normal(3, 5), normal(4, 5), normal(3, 4), 0.5, 0), lambda: (normal(3, 5, dtype=BF16), normal(4, 5, dtype=BF16), None, 1.0, 0)],
    "layer_cost_fwd": [
        lambda: (layers(F32, 2, 2, 5, 3), layers(BF16, 3, 2, 5, 3), mask(2, 5), None),
        lambda: (layers(BF16, 2, 2, 2, 5, 5), layers(BF16, 1, 2, 2, 5, 5), None, -100.0),
    ],
    "layer_cost_bwd": [
        lambda: (normal(2, 3), layers(F32, 2, 2, 5, 3), layers(BF16, 3, 2, 5, 3), mask(2, 5), None),
        lambda: (normal(2, 1), layers(BF16, 2, 2, 2, 5, 5), layers(BF16, 1, 2, 2, 5, 5), None, -100.0),
    ],
    "attention_cost_fwd": [lambda: _attention(F32, 5), lambda: _attention(BF16, 64)],
    "attention_cost_bwd": [lambda: (normal(2, 3), *_attention(F32, 5)), lambda: (normal(2, 3), *_attention(BF16, 64))],
    "info_nce_fwd": [lambda: _info_nce(False), lambda: _info_nce(True, FLOAT8)],
    "info_nce_softmax": [lambda: (normal(3, 9), normal(3, 5), normal(3, 5), _number(14.0), ids(3, below=9), torch.arange(9))],
    "nce_fwd": [
        lambda: (normal(3, 5), normal(9, 5), ids(3, 6, below=9), _number(2.0), 0.1, True, None),
        lambda: (normal(3, 5), normal(9, 5).to(FLOAT8), ids(3, 6, below=9), _number(2.0), 0.1, True, torch.rand(9)),
    ],
    "nce_pair": [
        lambda: (*layers(F32, 2, 3, 5), *layers(F32, 2, 9, 5), ids(3, 6, below=9), _number(0, F32), _number(1, F32), 0.01, 0.1, 9),
    ],
    "unit_linear_fwd": [lambda: (normal(3, 5), normal(4, 5), normal(4))],
    "unit_linear_bwd": [_unit_bwd],
    "sample_negatives": [lambda: _sample(True, False), lambda: _sample(False, True), lambda: _sample(False, False, 2)],
    "update_bank": [
        lambda: (normal(9, 5), ids(3, below=9), normal(3, 5), 0.5, None),
        lambda: (normal(9, 5).to(FLOAT8), ids(3, below=9), normal(3, 5), 0.5, torch.rand(9)),
    ],
    "nce_partition": [
        lambda: (normal(3, 5), normal(9, 5), ids(3, 6, below=9), _number(0, F32), 0.1, 9, None),
        lambda: (normal(3, 5), normal(9, 5).to(FLOAT8), ids(3, 6, below=9), _number(1, F32), 0.1, 9, torch.rand(9)),
    ],
    "gram_fwd": [lambda: (*_gram(F32, [0, 1], False), True), lambda: (*_gram(BF16, [2], False), True)],
    "gram_bwd": [lambda: _gram_bwd(F32, [0, 1], False), lambda: _gram_bwd(BF16, [0, 1], True)],
    "gram_fwd_grad": [lambda: (*_gram(F32, [0, 1], False), [0.5, 2.0], True), lambda: (*_gram(BF16, [1], True), [1.0], False)],
    "gram_rescale_grads": [lambda: _gram_rescale_grads(F32, [0, 1], False), lambda: _gram_rescale_grads(BF16, [2], False)],
    "relation_fwd": [lambda: (*_relation(F32, True), True), lambda: (*_relation(BF16, False), False)],
    "relation_bwd": [lambda: _relation_bwd(F32, True, True), lambda: _relation_bwd(BF16, False, False)],
}  # fmt: skip


def flat(args: tuple) -> list:
    """A tuple within the arguments stands for several of them."""
    return [x for arg in args for x in (arg if isinstance(arg, tuple) else (arg,))]


def _strided(x: Tensor) -> Tensor:
    """The same numbers with gaps between them."""
    wide = torch.zeros(*x.shape, 2, dtype=x.dtype)
    wide[..., 0] = x
    return wide[..., 0]


def _resized(x: Tensor, axis: int, by: int) -> Tensor:
    shape = list(x.shape)
    shape[axis] = max(shape[axis] + by, 0)
    return torch.ones(shape).to(x.dtype)


def _wrong_tensors(x: Tensor) -> Iterator[tuple[str, object]]:
    yield from {"with another axis": x[None], "flat": x.reshape(-1), "a number": torch.ones(()).to(x.dtype)}.items()
    for axis in range(x.dim()):
        yield f"axis {axis} longer", _resized(x, axis, 1)
        yield f"axis {axis} shorter", _resized(x, axis, -1)
        yield f"axis {axis} empty", _resized(x, axis, -(2**20))
        yield f"axis {axis} expanded", x.narrow(axis, 0, 1).expand(x.shape) if x.shape[axis] else x
    for dtype in DTYPES:
        if dtype != x.dtype:
            yield f"of {dtype}", (x.float() if x.dtype == FLOAT8 else x).to(dtype)
    yield from {"with gaps": _strided(x), "None": None, "a float": 1.0, "on meta": x.to("meta"), "a list": [x]}.items()
    if x.dim() > 1:
        yield "transposed", x.transpose(-1, -2)
    whole, fractions = (-1, 0, 1, 9, 2**40, 2**62, -(2**63)), (float("nan"), float("inf"), 1e30, -1e30, 0.0)
    for value in whole if x.dtype == torch.int64 else fractions if x.is_floating_point() else (0, 1):
        yield (
            f"all {value}",
            torch.full(x.shape, value, dtype=F64 if x.is_floating_point() else torch.int64).to(x.dtype),
        )
        if x.numel():
            some = (x.float() if x.dtype == FLOAT8 else x).clone(memory_format=torch.contiguous_format)
            some.view(-1)[-1] = value
            yield f"its last {value}", some.to(x.dtype)


def _wrong_lists(xs: list) -> Iterator[tuple[str, object]]:
    more = xs[-1] if xs else torch.ones(3)
    yield from {"empty": [], "one short": xs[:-1], "one long": [*xs, more], "None": None, "no list": more}.items()
    for place in {0, len(xs) - 1} if xs else ():
        for how, x in wrong_values(xs[place]):
            yield f"[{place}] {how}", [*xs[:place], x, *xs[place + 1 :]]


def wrong_values(x) -> Iterator[tuple[str, object]]:
    """(what is wrong with it, the value) for an argument of any type."""
    if isinstance(x, Tensor):
        yield from _wrong_tensors(x)
    elif isinstance(x, (list, tuple)):
        remade = type(x)._make if hasattr(x, "_make") else type(x)  # a named tuple keeps its length
        for how, y in _wrong_lists(list(x)):
            whole = not isinstance(y, list) or (hasattr(x, "_make") and len(y) != len(x))
            yield how, y if whole else remade(y)
    elif x is None:
        yield from {
            "1": torch.ones(()),
            "ones": torch.ones(3),
            "ids": ids(3, below=3),
            "1.0": 1.0,
            "-1": -1,
            "'no'": "no",
        }.items()
    elif isinstance(x, str):
        yield from {"''": "", "'no'": "no", "None": None, "1": 1, "a list": [x]}.items()
    elif isinstance(x, dict):
        yield from {"empty": {}, "unknown": {"no": 1.0}, "None": None, "a list": list(x)}.items()
        yield from ((f"of {how}", dict.fromkeys(x, y)) for y0 in x.values() for how, y in wrong_values(y0))
    else:
        yield from ((repr(y), y) for y in WRONG_NUMBERS.get(type(x).__name__, (None, 1)))


def wrong_calls(seed: int, step: int = 1) -> Iterator[tuple[str, str, list]]:
    """(op, what is wrong, arguments) without end: each argument of each valid call alone (every `step`-th mistake), then two
    at a time by chance."""
    numbers = itertools.count()
    names = {op: [a.name for a in getattr(OPS, op).default._schema.arguments] for op in VALID}
    torch.manual_seed(seed)
    for op, calls in VALID.items():
        for build in calls:
            for place, name in enumerate(names[op]):
                for how, wrong in wrong_values(flat(build())[place]):
                    if next(numbers) % step:
                        continue
                    args = flat(build())  # fresh ones: some ops write to theirs
                    args[place] = wrong
                    yield op, f"{name} {how}", args
    rng = random.Random(seed)
    while True:
        op = rng.choice(list(VALID))
        args, said = flat(rng.choice(VALID[op])()), []
        for place in rng.sample(range(len(args)), min(2, len(args))):
            how, args[place] = rng.choice(list(wrong_values(args[place])))
            said.append(f"{names[op][place]} {how}")
        yield op, ", ".join(said), args


def _each(x, change: Callable[[Tensor], Tensor]):
    if isinstance(x, (list, tuple)):
        return [_each(y, change) for y in x]
    return change(x) if isinstance(x, Tensor) else x


def tensors(x) -> list[Tensor]:
    return [x] if isinstance(x, Tensor) else [t for y in x for t in tensors(y)] if isinstance(x, (list, tuple)) else []


def outcome(op: str, args: list) -> str:
    """The class of the exception that the call ends in, or "valid"."""
    call = getattr(OPS, op)
    dense = _each(args, lambda x: x.clone(memory_format=torch.contiguous_format))
    schema = call.default._schema.arguments
    meta = [
        _each(x, lambda y: y.to("meta")) if "Tensor" in str(a.type) else x for a, x in zip(schema, args, strict=True)
    ]
    on_meta = any(x.is_meta for x in tensors(args))
    expected = Exception if on_meta else (RuntimeError, TypeError, ValueError)  # fake implementations check nothing
    try:
        found = tensors(call(*args))
    except expected as error:
        words = str(error)
        own = "csrc/cpu/runtime/tensors.h" in words
        named = any(a.name in words for a in schema)
        assert not own or (f"{op}: " in words and named), words
        return f"{type(error).__name__}{' of our own' if own else ''}"
    if on_meta:
        return "valid"
    shapes = [(x.shape, x.dtype) for x in found]
    assert shapes == [(x.shape, x.dtype) for x in tensors(call(*meta))], f"{shapes} is not what the fake says"
    again = tensors(call(*dense))
    assert all(torch.equal(x.nan_to_num(7), y.nan_to_num(7)) for x, y in zip(found, again, strict=True)), (
        "depends on strides"
    )
    return "valid"


def main(seed: int, step: int, first: int, last: int) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # and NaN in memory that an op never writes, as in tests/conftest.py
    for i, (op, wrong, args) in enumerate(itertools.islice(wrong_calls(seed, step), first, last), first):
        print(f"{i} {op}: {wrong}", end="", flush=True)
        print(f" -> {outcome(op, args)}", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
