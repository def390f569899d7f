"""What the tests share: deterministic inputs, the authors' numbers, shapes, and what counts as equal."""

import json
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
GOLDENS = json.loads((ROOT / "tests/goldens.json").read_text())

# Small, prime, one more than a block, one less: the sizes where indexing goes wrong.
AWKWARD_SIZES = (1, 2, 7, 31, 32, 33, 127, 129)

# Per dtype: relative Frobenius error allowed for (loss, gradient) against the float64 reference.
TOLERANCES = {
    torch.float64: (1e-12, 1e-11),
    torch.float32: (1e-6, 1e-5),
    torch.bfloat16: (1e-2, 1e-2),
    torch.float16: (1e-2, 1e-2),
}


def det(shape, k, dtype=torch.float64):
    """The inputs the goldens were made from: sin(0.7391 i + 1.618 k) + cos(0.2137 k i + 0.3) / 2, without any RNG."""
    size = 1
    for extent in shape:
        size *= extent
    i = torch.arange(size, dtype=torch.float64)
    return (torch.sin(0.7391 * i + 1.618 * k) + 0.5 * torch.cos(0.2137 * k * i + 0.3)).reshape(shape).to(dtype)


def randn(*shape, seed=0, dtype=torch.float64, scale=1.0):
    """Seeded normal numbers, rounded to `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def one_row_dropped(x):
    """The first of the leading axis; a single number is a row."""
    return torch.cat([x[:1] * 0, x[1:]]) if x.dim() else x * 0


# What a kernel may get wrong, of a loss or a gradient. A test of precision must fail for each of them, alone.
MUTANTS = {
    "zeroed": lambda x: x * 0,
    "sign flipped": lambda x: -x,
    "scaled by 1 %": lambda x: x * 1.01,
    "one row dropped": one_row_dropped,
}


def relative_error(value, oracle):
    """Frobenius norm of the difference over that of the oracle; of the difference itself where the oracle is 0."""
    value, oracle = value.detach().double(), oracle.detach().double()
    norm = oracle.norm()
    error = (value - oracle).norm()
    return float(error / norm) if norm > 0 else float(error)


def gradients(loss_function, *inputs, upstream_seed=7):
    """(loss, gradient of each input that is a floating leaf) under a random, never a unit, upstream gradient."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    loss = loss_function(*leaves)
    upstream = randn(*loss.shape, seed=upstream_seed).to(loss) + 1.5
    return loss.detach(), torch.autograd.grad(loss, leaves, upstream)


def assert_same(ours, theirs, *inputs, tolerance=1e-5):
    """Both functions of the inputs give the same loss, of one shape and dtype, and the same gradients."""
    (value, grads), (expected, expected_grads) = gradients(ours, *inputs), gradients(theirs, *inputs)
    assert (value.shape, value.dtype) == (expected.shape, expected.dtype)
    # A loss of 0 has no digits to compare.
    assert relative_error(value, expected) < tolerance or (value - expected).abs().max() < 1e-7
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert grad.dtype == expected_grad.dtype
        assert relative_error(grad, expected_grad) < 10 * tolerance or (grad - expected_grad).abs().max() < 1e-7
