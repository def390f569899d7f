"""Sentence Transformers' losses here and there: values and gradients of the embeddings over seeded cases."""

import itertools

import pytest
import torch

import fastkd
from cases import assert_same, randn

why = "compares with the package: pip install sentence-transformers==6.2.0"
losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses", reason=why)

from sentence_transformers.util import cos_sim, dot_score, euclidean_sim, pairwise_cos_sim  # noqa: E402

from fastkd import compat, thresholds  # noqa: E402
from fastkd.compat import sentence_transformers as ours  # noqa: E402

OTHER = ("query_to_query", "doc_to_query", "doc_to_doc")
DIRECTIONS = [("query_to_doc", *some) for k in range(4) for some in itertools.combinations(OTHER, k)]
TOLERANCES = {torch.float64: 1e-11, torch.float32: 1e-5}


@pytest.fixture(autouse=True)
def kernels_at_every_size(monkeypatch):
    monkeypatch.setitem(thresholds.UP_TO, "soft_labels", thresholds.NEVER)


def both(name, **options):
    return [getattr(module, name)(torch.nn.Identity(), **options) for module in (ours, losses)]


def calls(name, labels=None, **options):
    return [lambda *xs, f=f: f.compute_loss_from_embeddings(list(xs), labels) for f in both(name, **options)]


def in_float64(call):
    """Near convergence the original's float32 has four digits less than the kernels'; its float64 has none too few."""
    return lambda *xs: call(*(x.double() for x in xs)).to(xs[0].dtype)


def embeddings(columns, batch, seed, dtype=torch.float32):
    return [randn(batch, 24, seed=seed + k, dtype=dtype) for k in range(columns)]


def by_kernels(directions):
    return "doc_to_query" in directions or "doc_to_doc" not in directions


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("directions", DIRECTIONS, ids=lambda some: "+".join(some[1:]) or "default")
def test_ranking_with_every_direction(directions, dtype, monkeypatch):
    """Pairs, triplets and more, both partitions and similarities; the original is called only where it must be."""
    if by_kernels(directions):
        monkeypatch.setattr(compat, "original", None)
    partitions = ["joint"] if set(directions) & {"query_to_query", "doc_to_doc"} else ["joint", "per_direction"]
    cases = itertools.product(partitions, (2, 4), (cos_sim, dot_score), (1, 7))
    for seed, (partition, columns, similarity, batch) in enumerate(cases):
        options = {"similarity_fct": similarity, "partition_mode": partition, "directions": directions}
        scale = 20.0 if similarity is cos_sim else 0.2
        inputs = embeddings(columns, batch, seed, dtype)
        mine, theirs = calls("MultipleNegativesRankingLoss", scale=scale, **options)
        theirs = in_float64(theirs) if by_kernels(directions) else theirs
        assert_same(mine, theirs, *inputs, tolerance=TOLERANCES[dtype])


def test_ranking_by_default(monkeypatch):
    monkeypatch.setattr(compat, "original", None)
    assert_same(*calls("MultipleNegativesRankingLoss"), *embeddings(2, 16, 0))


@pytest.mark.parametrize(
    "options",
    [
        {"hardness_mode": "in_batch_negatives", "hardness_strength": 5.0},
        {"hardness_mode": "hard_negatives", "hardness_strength": 5.0},
        {"hardness_mode": "all_negatives", "hardness_strength": 5.0},
        {"hardness_mode": "all_negatives", "hardness_strength": 0.0},
        {"similarity_fct": euclidean_sim},
    ],
    ids=lambda options: "+".join(options) or "default",
)
def test_ranking_by_the_original(options):
    assert_same(*calls("MultipleNegativesRankingLoss", **options), *embeddings(3, 6, 0))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 2.0},
        {"temperature": 2.0, "teacher_temperature": 0.5},
        {"similarity_fct": pairwise_cos_sim, "student_temperature": 0.05},
    ],
    ids=lambda options: "+".join(options) or "default",
)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_kl_of_scores(options, dtype):
    for seed, columns in enumerate((3, 4, 9)):
        labels = randn(8, columns - 1, seed=50 + seed, dtype=dtype)
        inputs = embeddings(columns, 8, seed, dtype)
        assert_same(*calls("DistillKLDivLoss", labels, **options), *inputs, tolerance=TOLERANCES[dtype])
    for wrong in (embeddings(2, 8, 0), embeddings(6, 8, 0)):
        for call in calls("DistillKLDivLoss", labels):
            with pytest.raises(ValueError, match="DistillKLDivLoss expects"):
                call(*wrong)


def test_what_has_no_kernel_is_the_original():
    assert ours.MarginMSELoss is losses.MarginMSELoss and ours.EmbedDistillLoss is losses.EmbedDistillLoss


def test_patched_classes_compute_by_kernels_until_undo():
    inputs, name = embeddings(3, 6, 0), "MultipleNegativesRankingLoss"
    expected = both(name)[1].compute_loss_from_embeddings(inputs, None)
    with fastkd.patch("sentence_transformers") as patched:
        assert losses.MultipleNegativesRankingLoss.compute_loss_from_embeddings is ours.multiple_negatives_ranking
        value = both(name)[1].compute_loss_from_embeddings(inputs, None)
        hard = both(name, hardness_mode="all_negatives", hardness_strength=5.0)[1]
        assert hard.compute_loss_from_embeddings(inputs, None).isfinite()  # the original, also while it is replaced
        assert "DistillKLDivLoss.compute_loss_from_embeddings" in repr(patched)
    torch.testing.assert_close(value, expected)
    assert losses.MultipleNegativesRankingLoss.compute_loss_from_embeddings is not ours.multiple_negatives_ranking
