"""Hinton's and DistilBERT's losses against PyTorch's own functions."""

import pytest
import torch
import torch.nn.functional as F
from fastkd.bench.baselines.divergence import eager

from cases import gradients, randn
from fastkd.losses.distilbert import DistilBERTLoss
from fastkd.losses.kd import HintonKDLoss


def test_hinton_is_its_formula():
    s, t, labels = randn(6, 5, seed=1), randn(6, 5, seed=2), torch.tensor([0, 4, 2, 1, 1, 3])
    loss, (gradient,) = gradients(lambda x: HintonKDLoss(alpha=0.7, temperature=3.0)(x, t, labels), s)
    wanted, (wanted_gradient,) = gradients(
        lambda x: 0.3 * F.cross_entropy(x, labels) + 0.7 * eager(x, t, temperature=3.0).mean(), s
    )
    assert torch.allclose(loss, wanted, rtol=1e-12) and torch.allclose(gradient, wanted_gradient, rtol=1e-11)


def test_hinton_without_labels_is_the_teacher_alone():
    s, t = randn(6, 5, seed=1), randn(6, 5, seed=2)
    assert torch.allclose(HintonKDLoss(alpha=1, temperature=3.0)(s, t), eager(s, t, temperature=3.0).mean(), rtol=1e-12)
    with pytest.raises(ValueError, match="labels"):
        HintonKDLoss(alpha=0.9)(s, t)
    for alpha in (-0.1, 1.5):
        with pytest.raises(ValueError, match="alpha"):
            HintonKDLoss(alpha=alpha)
    with pytest.raises(ValueError, match="temperature"):
        HintonKDLoss(temperature=0)


def test_hinton_counts_only_labelled_unmasked_tokens():
    s, t = randn(2, 4, 5, seed=1), randn(2, 4, 5, seed=2)
    labels, mask = torch.tensor([[1, -100, 2, 0], [3, 4, -100, -100]]), torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    rows = (labels != -100) & mask.bool()
    wanted, (wanted_gradient,) = gradients(lambda x: HintonKDLoss()(x[rows], t[rows], labels[rows]), s)
    s[~rows], t[~rows] = torch.nan, torch.nan
    loss, (gradient,) = gradients(lambda x: HintonKDLoss()(x, t, labels, mask), s)
    assert torch.allclose(loss, wanted, rtol=1e-13)
    assert torch.allclose(gradient[rows], wanted_gradient[rows], rtol=1e-12) and (gradient[~rows] == 0).all()
    loss, (gradient,) = gradients(lambda x: HintonKDLoss()(x, t, labels, torch.zeros(2, 4)), s)
    assert loss == 0 and (gradient == 0).all()


def test_hinton_in_bfloat16_returns_float32():
    s, t = randn(6, 5, seed=1, dtype=torch.bfloat16), randn(6, 5, seed=2, dtype=torch.float32)
    loss, (gradient,) = gradients(lambda x: HintonKDLoss()(x, t, torch.arange(6) % 5), s)
    assert loss.dtype == torch.float32 and gradient.dtype == torch.bfloat16


def test_distilbert_is_its_triple():
    s, t, h, g = (randn(2, 4, n, seed=i) for i, n in enumerate((9, 9, 6, 6)))
    labels, mask = torch.tensor([[1, -100, 2, -100], [3, -100, -100, -100]]), torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    keep = mask.bool()

    def triple(s, h):
        mlm = F.cross_entropy(s.flatten(0, 1), labels.flatten())
        cosine = F.cosine_embedding_loss(h[keep], g[keep], torch.ones(5))
        return 5 * eager(s[keep], t[keep], temperature=2.0).mean() + 2 * mlm + cosine

    wanted, wanted_gradients = gradients(triple, s, h)
    h[~keep], g[~keep], t[~keep] = torch.nan, torch.inf, torch.nan
    loss, got = gradients(lambda s, h: DistilBERTLoss()(s, t, h, g, labels, mask), s, h)
    assert torch.allclose(loss, wanted, rtol=1e-10)
    assert torch.allclose(got[0], wanted_gradients[0], rtol=1e-10, atol=1e-15)
    assert torch.allclose(got[1][keep], wanted_gradients[1][keep], rtol=1e-9, atol=1e-12) and (got[1][~keep] == 0).all()
    without = DistilBERTLoss()(s, t, h, g, mask=mask)
    assert torch.allclose(without, DistilBERTLoss(alpha_mlm=0)(s, t, h, g, labels, mask), rtol=1e-13)


def test_distilbert_mistakes():
    s, t, h = (randn(2, 4, n, seed=i) for i, n in enumerate((9, 9, 6)))
    with pytest.raises(ValueError, match="teacher_hidden"):
        DistilBERTLoss()(s, t, h, randn(2, 4, 8, seed=3))
    with pytest.raises(ValueError, match="teacher_hidden"):
        DistilBERTLoss()(s, t, h, h.clone().requires_grad_())
    with pytest.raises(ValueError, match="temperature"):
        DistilBERTLoss(-1)
