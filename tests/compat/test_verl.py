"""verl's top-k loss here and there. verl imports ray, vllm and more, so its two modules are loaded by their paths, and what
they import for other purposes is replaced by empty names."""

import dataclasses
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from cases import assert_same, randn

where = importlib.util.find_spec("verl")
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(where is None, reason="compares with the package: pip install --no-deps verl==0.9.1"),
]

OTHERS = {
    "tensordict": ["TensorDict"],
    "verl.base_config": ["BaseConfig"],
    "verl.trainer.ppo.core_algos": ["agg_loss", "get_policy_loss_fn", "kl_penalty"],
    "verl.utils.metric": ["AggregationType", "Metric"],
    "verl.utils.ulysses": ["slice_input_tensor"],
    "verl.workers.config": ["ActorConfig", "DistillationConfig", "DistillationLossConfig"],
    "verl.workers.utils.losses": ["ppo_loss"],
    "verl.workers.utils.padding": ["no_padding_2_padding"],
}


@pytest.fixture
def modules(monkeypatch):
    """(fastkd.compat.verl, verl's fsdp losses, verl's registry), loaded for one test."""
    empty = dataclasses.make_dataclass("Empty", [])
    packages = {".".join(name.split(".")[:k]) for name in OTHERS for k in range(1, name.count(".") + 1)}
    for name in packages | {"verl.trainer.distillation", "verl.trainer.distillation.fsdp"} | OTHERS.keys():
        module = ModuleType(name)
        module.__path__ = []
        for each in OTHERS.get(name, ()):
            setattr(module, each, empty)
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["verl.utils.ulysses"].get_ulysses_sequence_parallel_world_size = lambda: 1
    loaded = []
    for name in ("verl.trainer.distillation.losses", "verl.trainer.distillation.fsdp.losses"):
        path = Path(where.submodule_search_locations[0], *name.split(".")[1:]).with_suffix(".py")
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        package, _, last = name.rpartition(".")
        setattr(sys.modules[package], last, module)
        loaded.append(module)
    monkeypatch.delitem(sys.modules, "fastkd.compat.verl", raising=False)
    ours = importlib.import_module("fastkd.compat.verl")
    yield ours, loaded[1], loaded[0]
    sys.modules.pop("fastkd.compat.verl", None)


def config(clamp, mode="forward_kl_topk"):
    return SimpleNamespace(distillation_loss=SimpleNamespace(log_prob_min_clamp=clamp, loss_mode=mode))


def example(seed, V=60, k=9, lengths=(5, 3, 8)):
    student, teacher = (
        randn(1, sum(lengths), V, seed=seed, dtype=torch.float32),
        3 * randn(sum(lengths), V, seed=seed + 1),
    )
    log_probs, ids = teacher.float().log_softmax(-1).topk(k)
    return student, *(
        torch.nested.as_nested_tensor(list(x.split(lengths)), layout=torch.jagged) for x in (log_probs, ids)
    )


@pytest.mark.parametrize("clamp", [None, -4.0])
def test_losses_and_masses(modules, clamp):
    ours, theirs, _ = modules
    for seed in range(4):
        student, *teacher = example(seed)
        functions = [module.compute_forward_kl_topk for module in (ours, theirs)]
        calls = [lambda x, f=f, t=teacher: f(x, *t, config(clamp), "thd")["distillation_losses"] for f in functions]
        assert_same(*calls, student)
        a, b = (f(student, *teacher, config(clamp), "thd") for f in functions)
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-6)


def test_the_tail_makes_it_a_divergence(modules):
    """Against the KL of k + 1 outcomes; registered until undo."""
    ours, theirs, registry = modules
    student, log_probs, ids = example(0)
    index, p = ids.values()[None], log_probs.values()[None].double().exp()

    def oracle(x):
        q = x.double().softmax(-1).gather(-1, index)
        p_all, q_all = (torch.cat([each, 1 - each.sum(-1, keepdim=True)], -1) for each in (p, q))
        return (p_all * (p_all.log() - q_all.log())).sum(-1).float()

    settings = config(-10.0, ours.TAIL)
    assert_same(
        lambda x: ours.compute_forward_kl_topk(x, log_probs, ids, settings, "thd")["distillation_losses"],
        oracle,
        student,
    )
    original = theirs.compute_forward_kl_topk
    for owner, name, replacement in (
        (theirs.__dict__, "compute_forward_kl_topk", ours.compute_forward_kl_topk),
        (registry.DISTILLATION_LOSS_REGISTRY, ours.TAIL, registry.compute_forward_kl_topk),
        (registry.DISTILLATION_SETTINGS_REGISTRY, ours.TAIL, ours.TAIL_SETTINGS),
    ):
        with ours.register():
            assert owner[name] is replacement
        assert owner.get(name) is (original if name == "compute_forward_kl_topk" else None)
