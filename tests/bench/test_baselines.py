"""The authors' way of each function computes the number that ours does, and its gradient. For eager see test_bench_cases.py."""

import pytest
import torch
from fastkd.bench.baselines import RELEASED
from torch.utils._pytree import tree_leaves

from cases import randn
from fastkd import checks, functional


def relation_pair(heads=2):
    return [randn(2, heads, 5, 4, seed=i) for i in (1, 2)], [randn(2, heads, 5, 6, seed=i) for i in (3, 4)]


MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
LOGITS = (randn(2, 5, 11, seed=1), randn(2, 5, 11, seed=2))
HIDDEN = ([randn(2, 5, 6, seed=i) for i in (1, 2)], [randn(2, 5, 6, seed=i) for i in (3, 4, 5)])
HEADS = tuple(
    [(randn(2, h, 5, 4, seed=s + i), randn(2, 2, 5, 4, seed=s + 10 + i)) for i in range(n)]
    for h, s, n in ((2, 1, 2), (4, 3, 3), (2, 6, 3))
)
NCE = {"n_data": 20, "temperature": 0.2, "z": 30.0}
QUERY, BANK, INDEX = randn(4, 6, seed=1), randn(20, 6, seed=2), torch.arange(24).view(4, 6) % 20
CALLS = [
    *[("divergence", LOGITS, {"kind": kind, "temperature": 2.0, "mask": MASK}) for kind in checks.KINDS],
    ("divergence", LOGITS, {"labels": torch.tensor([[1, -100, 2, 3, 4]] * 2), "t_squared": False}),
    ("gram_correlation_loss", HIDDEN[0], {"level": "token"}),
    ("gram_correlation_loss", HIDDEN[0], {"level": "sequence", "grouping": "official"}),
    ("gram_correlation_loss", HIDDEN[0], {"level": "token", "pearson": "row", "normalize": False}),
    ("gram_correlation_loss", (HIDDEN[0], HIDDEN[1][:2]), {"level": {"token": 0.5, "sequence": 2.0}}),
    ("relation_kl_loss", relation_pair(), {"mask": MASK}),
    ("relation_kl_loss", relation_pair(), {"causal": True, "heads": 1}),
    ("layer_costs", HIDDEN, {"mask": MASK}),
    ("layer_costs", HIDDEN, {"clamp": -0.3}),
    ("attention_costs", (HEADS[0], HEADS[2]), {"mask": MASK}),
    ("attention_costs", HEADS[:2], {"causal": True, "heads": "mean"}),
    ("transport", (randn(3, 4, 5, seed=1).abs(),), {}),
    ("transport_with_cost_attention", (randn(2, 4, 5, seed=1).abs(), torch.full((2, 4), 0.25), torch.full((2, 5), 0.2)), {}),
    ("nce_loss", (QUERY, BANK, INDEX), NCE),
    ("nce_pair_loss", ((QUERY, QUERY.flip(0)), (BANK, BANK.flip(0)), INDEX),
     {**NCE, "z": (torch.tensor(0.0), torch.tensor(30.0))}),
    ("info_nce_loss", (QUERY, randn(4, 6, seed=5), BANK), {"temperature": 0.3}),
    ("info_nce_loss", (QUERY, randn(4, 6, seed=5), BANK, INDEX), {"temperature": 0.3}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "args", "options"), CALLS, ids=lambda x: x if isinstance(x, str) else "")
def test_the_authors_way_computes_our_number(name, args, options):
    leaf, found = tree_leaves(args)[0].requires_grad_(), []
    for function, more in ((getattr(functional, name), {"backend": "reference"}), (RELEASED[name], {})):
        value = tree_leaves(function(*args, **options, **more))[0]
        found.append((value.detach(), torch.autograd.grad(value.square().sum(), leaf)[0]))
    leaf.requires_grad_(False)
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(theirs.float(), ours.float(), rtol=2e-4, atol=2e-5)


def test_everything_released_is_called_above():
    assert {name for name, _, _ in CALLS} == set(RELEASED)
