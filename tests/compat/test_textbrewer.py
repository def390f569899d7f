"""TextBrewer's losses here and there: values and gradients over seeded cases, and its maps."""

import pytest
import torch

from cases import assert_same, randn

why = "compares with the package: pip install --no-deps textbrewer==0.2.1.post1"
theirs = pytest.importorskip("textbrewer.losses", reason=why)

from textbrewer import presets  # noqa: E402 - where it is installed

from fastkd import thresholds  # noqa: E402
from fastkd.compat import textbrewer as ours  # noqa: E402

TOLERANCES = {torch.float64: 1e-11, torch.float32: 1e-5}


@pytest.fixture(autouse=True)
def kernels_at_every_size(monkeypatch):
    monkeypatch.setitem(thresholds.UP_TO, "soft_labels", thresholds.NEVER)


MASK = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])  # [B, L]


def both(name):
    return [getattr(module, name) for module in (ours, theirs)]


def scores(*shape, seed, dtype):
    """Attention scores, of which about half are masked or negative."""
    x = randn(*shape, seed=seed, dtype=dtype)
    x[..., -1] = -10000
    return x


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", ["kd_ce_loss", "kd_mse_loss"])
def test_logits(name, dtype):
    """Classes and tokens; temperatures as numbers, one tensor, and one per row as the schedulers give them."""
    temperatures = {
        (7, 50): (1, 2.5, torch.tensor(3.0), torch.linspace(1, 4, 7)),
        (3, 5, 30): (4, torch.linspace(1, 4, 15).reshape(3, 5)),
    }
    for shape, each in temperatures.items():
        student, teacher = randn(*shape, dtype=dtype), 3 * randn(*shape, seed=1, dtype=dtype)
        for T in each:
            T = T.to(dtype) if isinstance(T, torch.Tensor) else T
            calls = [lambda x, f=f, t=teacher, T=T: f(x, t, T) for f in both(name)]
            assert_same(*calls, student, tolerance=TOLERANCES[dtype])
        calls = [lambda x, t, f=f: f(x, t) for f in both(name)]
        assert_same(*calls, student, teacher, tolerance=TOLERANCES[dtype])  # a teacher that learns


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(
    "mask",
    [None, MASK, MASK.bool(), MASK.double(), MASK * 0.5, MASK * 2],
    ids=["none", "integers", "booleans", "floats", "halves", "twos"],
)
def test_hidden_states(mask, dtype):
    mask = mask.to(dtype) if mask is not None and mask.is_floating_point() else mask
    student, teacher = randn(3, 5, 16, dtype=dtype), randn(3, 5, 16, seed=1, dtype=dtype)
    calls = [lambda x, f=module.hid_mse_loss: f(x, teacher, mask) for module in (ours, theirs)]
    assert_same(*calls, student, tolerance=TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "mask"])
@pytest.mark.parametrize("name", ["att_mse_loss", "att_mse_sum_loss"])
def test_attention(name, mask, dtype):
    student, teacher = (scores(3, 4, 5, 5, seed=k, dtype=dtype) for k in (0, 1))
    calls = [lambda x, f=f: f(x, teacher, mask) for f in both(name)]
    assert_same(*calls, student, tolerance=TOLERANCES[dtype])
    if name == "att_mse_sum_loss":  # more heads in the teacher, and heads that are summed already
        more = scores(3, 6, 5, 5, seed=2, dtype=dtype)
        assert_same(*(lambda x, f=f: f(x, more, mask) for f in both(name)), student, tolerance=1e-4)
        calls = [lambda x, f=f: f(x, teacher[:, 0], mask) for f in both(name)]
        assert_same(*calls, student[:, 0], tolerance=TOLERANCES[dtype])


def test_small_losses_are_the_originals(monkeypatch):
    """Where a kernel would not be faster; beyond its threshold it computes them."""
    monkeypatch.undo()
    student, teacher, called = randn(4, 16, dtype=torch.float32), randn(4, 16, seed=1, dtype=torch.float32), []
    for name in ("kd_ce_loss", "kd_mse_loss", "hid_mse_loss", "att_mse_loss"):
        monkeypatch.setattr(theirs, name, lambda *args, name=name: called.append(name))
        getattr(ours, name)(student, teacher)
        getattr(ours, name)(student.repeat(64, 16), teacher.repeat(64, 16))
    assert called == ["kd_ce_loss", "kd_mse_loss", "hid_mse_loss", "att_mse_loss"]


def test_the_maps_hold_ours_until_undo():
    originals = dict(presets.KD_LOSS_MAP), dict(presets.MATCH_LOSS_MAP)
    registered = ours.register()
    assert presets.KD_LOSS_MAP["ce"] is ours.kd_ce_loss and presets.MATCH_LOSS_MAP["hidden_mse"] is ours.hid_mse_loss
    assert "presets.KD_LOSS_MAP.mse → fastkd.compat.textbrewer.kd_mse_loss" in repr(registered)
    registered.undo()
    assert originals == (presets.KD_LOSS_MAP, presets.MATCH_LOSS_MAP)
