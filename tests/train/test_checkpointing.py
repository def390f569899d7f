"""Every public loss inside torch.utils.checkpoint: the same loss and gradients, bit for bit."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fastkd
from cases import gradients, randn
from fastkd import backends

pytestmark = pytest.mark.skipif(backends.INTERPRETED, reason="the C++ kernels and the reference are tested here")

MASK = torch.ones(4, 6).index_fill(1, torch.tensor([5]), 0)


def states(seed, *shape):
    return randn(*shape, seed=seed, dtype=torch.float32)


def layer_cost(cost):
    return lambda x, y, backend: cost([x, y], [states(5, *x.shape), states(6, *x.shape)], mask=MASK, backend=backend)


def attention(x, y, backend):
    teacher = states(5, *x.shape), states(6, *x.shape)
    return fastkd.attention_costs([(x, y)], [teacher], mask=MASK, causal=True, backend=backend)


def linear(memory):
    def call(hidden, head, backend):
        of_teacher = states(5, 24, 8), states(6, 50, 8)
        return fastkd.linear_divergence(hidden, head, *of_teacher, recompute_logits=memory == "low", backend=backend)

    return call


def top_k(x, y, backend):
    log_probs, indices = torch.log_softmax(states(5, 24, 50), -1).topk(4, -1)
    return fastkd.divergence(x + y, fastkd.TopK(indices, log_probs, True), backend=backend)


def info_nce(x, y, backend):
    return fastkd.info_nce_loss(x, y, states(5, 50, 8), backend=backend)


def in_batch(x, y, backend):
    return fastkd.info_nce_loss(x, y, None, backend=backend)


def nce(x, y, backend):
    index = torch.arange(24 * 5).view(24, 5) % 50
    options = {"n_data": 50, "temperature": 0.1, "z": torch.tensor(9.0), "backend": backend}
    return fastkd.nce_loss(x + y, states(5, 50, 8), index, **options)


def gram(level, pearson):
    def call(x, y, backend):
        teacher = [states(5, *x.shape), states(6, *x.shape)]
        options = {"level": level, "pearson": pearson, "mask": MASK, "backend": backend}
        return fastkd.gram_correlation_loss([x, y], teacher, **options)

    return call


def relation(pair):
    def call(x, y, backend):
        t, u = states(5, *x.shape), states(6, *x.shape)
        student, teacher = ([(x, y)], [(t, u)]) if pair else ([x, y], [t, u])
        return fastkd.relation_kl_loss(student, teacher, mask=MASK, backend=backend)

    return call


def dense(kind):
    return lambda x, y, backend: fastkd.divergence(x + y, states(5, 24, 50), kind=kind, backend=backend)


HIDDEN, HEADS, ROWS, LOGITS = ((4, 6, 8),) * 2, ((4, 2, 6, 8),) * 2, ((24, 8),) * 2, ((24, 50),) * 2
LOSSES = {
    **{f"gram {level} {pearson}": (gram(level, pearson), HIDDEN)
       for level in ("token", "sequence") for pearson in ("matrix", "row")},
    "relation": (relation(False), HEADS),
    "relation of pairs": (relation(True), HEADS),
    "layer_costs": (layer_cost(fastkd.layer_costs), HIDDEN),
    "attention_costs": (attention, HEADS),
    **{f"divergence {kind}": (dense(kind), LOGITS) for kind in fastkd.checks.KINDS},
    "divergence TopK": (top_k, LOGITS),
    **{f"linear_divergence {memory}": (linear(memory), ((24, 8), (50, 8))) for memory in ("speed", "low")},
    "info_nce": (info_nce, ROWS),
    "info_nce in the batch": (in_batch, ROWS),
    "nce": (nce, ROWS),
}  # fmt: skip


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", LOSSES)
def test_inside_a_checkpoint(name, backend):
    loss, shapes = LOSSES[name]
    inputs = [states(k, *shape) for k, shape in enumerate(shapes)]
    value, grads = gradients(lambda *x: loss(*x, backend), *inputs)
    again, other = gradients(lambda *x: checkpoint(loss, *x, backend, use_reentrant=False), *inputs)
    assert torch.equal(value, again) and all(map(torch.equal, grads, other))
