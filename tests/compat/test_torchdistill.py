"""torchdistill's losses here and there: values, gradients and state over seeded cases, and the registry."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from cases import assert_same, gradients, randn, relative_error

why = "compares with the package: pip install --no-deps torchdistill==1.1.5"
mid_level = pytest.importorskip("torchdistill.losses.mid_level", reason=why)

from torchdistill.losses import registry  # noqa: E402 - where it is installed

from fastkd import thresholds  # noqa: E402
from fastkd.compat import torchdistill as compat  # noqa: E402

PATHS = {
    "student_module_path": "head", "student_module_io": "output",
    "teacher_module_path": "head", "teacher_module_io": "output",
}  # fmt: skip
TOLERANCES = {torch.float64: 1e-11, torch.float32: 1e-5}


@pytest.fixture(autouse=True)
def kernels_at_every_size(monkeypatch):
    monkeypatch.setitem(thresholds.UP_TO, "soft_labels", thresholds.NEVER)


def outputs(x):
    return {"head": {"output": x}}


def both(name, **options):
    return [getattr(module, name)(**PATHS, **options) for module in (compat, mid_level)]


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", ["KDLoss", "LogitStdKDLoss"])
def test_soft_and_hard_labels(name, dtype):
    """Every reduction, alpha (of the labels here) and beta; T² only where there is a hard term; images of logits, too."""
    weights = [{"alpha": 0.3}, {"alpha": 0.0}, {"alpha": None, "beta": 1.0}, {"alpha": 0.5, "beta": 9.0}]
    cases = itertools.product(weights, ("batchmean", "mean", "sum", "none"), ((6, 50), (3, 11, 4, 5)))
    for seed, (weight, reduction, shape) in enumerate(cases):
        labelled = seed % 3 > 0
        if reduction == "none" and labelled and weight["alpha"]:
            continue  # losses per element and per example: torchdistill cannot add them either
        student, teacher = randn(*shape, seed=seed, dtype=dtype), 3 * randn(*shape, seed=seed + 1, dtype=dtype)
        targets = torch.arange(student[:, 0].numel()).reshape(student[:, 0].shape) % shape[1] if labelled else None
        ours, theirs = both(name, temperature=1.0 + seed % 4, reduction=reduction, **weight)
        calls = [lambda x, f=f, t=teacher, y=targets: f(outputs(x), outputs(t), y) for f in (ours, theirs)]
        assert_same(*calls, student, tolerance=TOLERANCES[dtype])


def test_the_teacher_may_learn_and_half_precision_stays():
    ours, theirs = both("KDLoss", temperature=2.0, alpha=0.5)
    targets = torch.arange(6) % 50
    student, teacher = randn(6, 50, dtype=torch.float32), randn(6, 50, seed=1, dtype=torch.float32)
    calls = [lambda s, t, f=f: f(outputs(s), outputs(t), targets) for f in (ours, theirs)]
    assert_same(*calls, student, teacher)
    half = [x.bfloat16() for x in (student, teacher)]
    oracle = theirs(outputs(half[0].double()), outputs(half[1].double()), targets)
    values = [f(outputs(half[0]), outputs(half[1]), targets) for f in (ours, theirs)]
    assert values[0].dtype == values[1].dtype == torch.bfloat16
    assert relative_error(values[0], oracle) <= max(relative_error(values[1], oracle), 2**-8)


@pytest.mark.parametrize("mode", ["paper", "code"])
def test_streamlined_kd(mode):
    for seed, shape in enumerate(((7, 30), (8, 5), (4, 6, 3, 3))):
        student, teacher = randn(*shape, seed=seed, dtype=torch.float32), randn(*shape, seed=9, dtype=torch.float32)
        ours, theirs = both("SKDInstanceLoss", temperature=4.0, mode=mode)
        assert_same(*(lambda x, f=f, t=teacher: f(outputs(x), outputs(t)) for f in (ours, theirs)), student)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_crd_over_three_steps(dtype):
    """Losses and both sides' gradients, the frozen Z, and the memories after each step."""
    options = {"input_size": 8, "output_size": 16, "num_negative_samples": 5, "num_samples": 40}
    paths = {"student_norm_module_path": "s", "student_empty_module_path": "e", "teacher_norm_module_path": "t"}
    ours, theirs = (module.CRDLoss(**paths, **options).to(dtype) for module in (compat, mid_level))
    ours.load_state_dict(theirs.state_dict())
    for step in range(3):
        pos_idx = torch.tensor([1, 6, 11, 15 - step])
        contrast_idx = torch.cat([pos_idx[:, None], torch.arange(20).reshape(4, 5) % (13 + step)], 1)
        extra = {"e": {"input": {"pos_idx": pos_idx, "contrast_idx": contrast_idx}}}
        inputs = [F.normalize(randn(4, 8, seed=10 * step + k, dtype=dtype), dim=1) for k in (0, 1)]
        calls = [
            lambda s, t, f=f, extra=extra: f({"s": {"output": s}, **extra}, {"t": {"output": t}})
            for f in (ours, theirs)
        ]
        (value, grads), (expected, expected_grads) = (gradients(call, *inputs) for call in calls)
        assert value.shape == expected.shape == (1,)
        pairs = [(value, expected), *zip(grads, expected_grads, strict=True)]
        pairs += [(getattr(ours, name), getattr(theirs, name)) for name in ("params", "memory_v1", "memory_v2")]
        assert max(relative_error(*pair) for pair in pairs) < 10 * TOLERANCES[dtype]


def test_the_registry_gives_ours_until_undo():
    config = {"key": "KDLoss", "kwargs": {**PATHS, "temperature": 2.0, "alpha": 0.5}}
    with compat.register() as registered:
        assert type(registry.get_mid_level_loss(config)) is compat.KDLoss
        assert "MIDDLE_LEVEL_LOSS_DICT.KDLoss → fastkd.compat.torchdistill.KDLoss" in repr(registered)
        with pytest.raises(RuntimeError, match="replaced already"):
            compat.register()
    assert type(registry.get_mid_level_loss(config)) is mid_level.KDLoss
