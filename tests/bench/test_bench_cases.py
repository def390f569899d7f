"""The bench's cases: floors against arithmetic by hand, inputs, and rivals that really do the same job."""

import dataclasses

import pytest
import torch
from fastkd.bench import baselines, check, roofline
from fastkd.bench.baselines import Absent, Provider
from fastkd.bench.cases import case as case_module
from fastkd.bench.cases import stems
from fastkd.bench.cases.case import Gemm

CPU = torch.device("cpu")
TINY = {"N": 7, "V": 41, "K": 5, "B": 4, "Ds": 12, "Dt": 20, "H": 2, "L": 9, "d": 8, "R": 3, "S": 6, "D": 10, "n": 50}
TINY_BY_STEM = {
    "divergence": {"K": 20},
    "transport": {"P": 3, "N": 4, "M": 6},
    "layer_cost": {"N": 2, "M": 3},
    "linear_divergence": {"R": 300},
}


class CountingTimer:
    """Each task takes a set time; the samples are counted."""

    def __init__(self, seconds):
        self.seconds, self.samples = seconds, 0

    def sample(self, task, number):
        self.samples += 1
        return self.seconds[task.provider]


# Floors -----------------------------------------------------------------------------------------------------------


def test_the_floor_is_the_higher_of_two_roofs():
    assert roofline.floor(flops=1e9, moved=1e9, copy_rate=1e10, gemm_rate=1e12) == (0.1, "copy")
    assert roofline.floor(flops=1e12, moved=1e9, copy_rate=1e10, gemm_rate=1e12) == (1.0, "gemm")


@pytest.mark.parametrize(("moved", "size"), [(1, 2**20), (2**20 + 1, 2**21), (3e8, 2**29), (1e12, 2**30)])
def test_the_copy_that_stands_for_a_case_is_about_its_size(moved, size):
    assert roofline.copy_size(moved) == size


def test_roofs_count_reads_and_writes_and_measure_once():
    timer = CountingTimer({"roof": 0.5, "gemm": 2.0})
    measured = roofline.Roofs(CPU, timer)
    assert measured.copy_rate(1 << 20) == (1 << 20) / 0.5
    taken = timer.samples
    measured.copy_rate(1000.0)
    assert timer.samples == taken
    gemms = (Gemm(4, 5, 6), Gemm(4, 5, 6), Gemm(6, 4, 5, 2, ("backward", "both")))
    case = dataclasses.replace(stems.divergence_case("mse", 3, 5, torch.float32), gemms=gemms)
    assert measured.gemms_of(case) == {"forward": 4.0, "backward": 2.0, "both": 6.0}
    assert gemms[2].flops == 2 * 2 * 6 * 4 * 5


def test_a_roof_measured_again_stays_the_best_that_was_seen():
    timer = CountingTimer({"roof": 0.5})
    measured, case = roofline.Roofs(CPU, timer), stems.divergence_case("mse", 3, 5, torch.float32)
    for seconds, best in ((0.5, 0.5), (2.0, 0.5), (0.25, 0.25)):
        timer.seconds["roof"] = seconds
        measured.again(case, "both")
        assert measured.copy_rate(1000.0) == (1 << 20) / best
        assert measured.gemm_rate(torch.float32) == 2.0 * 2048**3 / best


def test_declared_work_agrees_with_arithmetic_by_hand():
    """Figures of the physical floors, worked out independently: FLOPs over 788 TFLOP/s, bytes as they are."""
    linear = stems.linear_case("forward_kl", 8192, 128256, 4096, 4096, torch.bfloat16)
    assert linear.flops.forward / 788e12 == pytest.approx(21.8e-3, rel=5e-3)
    assert linear.flops.both / 788e12 == pytest.approx(43.7e-3, rel=5e-3)
    assert sum(gemm.flops for gemm in linear.gemms) == linear.flops.both
    divergence = stems.divergence_case("forward_kl", 8192, 128256, torch.bfloat16)
    assert divergence.bytes.both / 4.3e12 == pytest.approx(1.47e-3, rel=5e-3)
    queue = stems.queue_case(32, 65536, 768, torch.bfloat16)
    assert queue.flops.both == pytest.approx(6.4e9, rel=1e-2) and queue.bytes.both == pytest.approx(101e6, rel=1e-2)
    token = stems.gram_case("token", 32, 128, 768, 768, torch.bfloat16)
    assert token.flops.forward == pytest.approx(0.8e9, rel=1e-2) and token.bytes.forward == pytest.approx(
        12.6e6, rel=1e-2
    )
    layers = stems.layer_case(6, 12, 32, 128, 768, torch.float32)
    assert layers.bytes.forward == 18 * 32 * 128 * 768 * 4
    nce = stems.gather_case(32, 4096, 128, 262144)
    assert nce.bytes.forward == pytest.approx(2 * 67e6, rel=1e-2)


def test_the_floor_of_attention_is_the_cheaper_way():
    """Two student layers, three teachers, so four flows; by hand, one head."""
    short = stems.attention_work(
        2, 3, 4, 8
    )  # scores: 2·4·4·8 = 256 FLOPs a layer, and the same for each of 2 gradients
    assert (short.forward, short.both) == (5 * 256, 5 * 256 + 2 * 2 * 256)
    far = stems.attention_work(2, 3, 1024, 8)  # X^T Y: 2·1024·8·8 = 131072 FLOPs, half of that where Y is X
    own, cross = 2 * 65536, 2 * 131072  # of queries and of keys
    assert far.forward == 5 * own + 6 * cross
    pulls = 2 * (2 + 4) * 131072  # q (k^T k), r (l^T k) of four flows, and the keys' side
    assert far.both == far.forward + pulls
    assert far.backward == 2 * own + 4 * cross + pulls  # of what the flows touch
    many = stems.attention_work(20, 20, 64, 8)  # 400 pairs: scores forward, products backward
    assert many.forward == 40 * 2 * 64 * 64 * 8
    assert many.both == many.forward + min(2 * 20 * 2 * 64 * 64 * 8, (20 * 1 + 39 * 2 + 2 * 59) * 2 * 64 * 64)
    case = stems.attention_case(3, 6, 1, 12, 2048, 64, torch.float32)
    assert case.flops.both == 12 * stems.attention_work(3, 6, 2048, 64).both < case.gemms[0].flops / 3


def test_sparse_flow_is_a_vertex_with_uniform_marginals():
    flow = stems.sparse_flow(6, 12)
    assert (flow > 0).sum() <= 17
    assert torch.allclose(flow.sum(1), torch.full((6,), 1 / 6)) and torch.allclose(
        flow.sum(0), torch.full((12,), 1 / 12)
    )


# Cases and rivals -------------------------------------------------------------------------------------------------


def every_kind():
    """One small case for each kind of each stem."""
    found = {}
    for case in case_module.select():
        small = {axis: TINY_BY_STEM.get(case.stem, {}).get(axis, TINY.get(axis, 3)) for axis in case.shape}
        found.setdefault((case.stem, case.kind), dataclasses.replace(case, shape=small, dtype=tiny_dtype(case)))
    return list(found.values())


def tiny_dtype(case):
    return torch.float64 if case.stem == "transport" else torch.float32


def test_every_stem_has_cases_and_names_are_unique():
    assert list(case_module.REGISTRY) == [
        "divergence", "gram", "relation", "layer_cost", "transport", "contrast", "linear_divergence"
    ]  # fmt: skip
    for stem in case_module.REGISTRY:
        names = [case.name for case in case_module.select([stem])]
        assert len(names) == len(set(names)) and any(case.quick for case in case_module.select([stem]))
    with pytest.raises(ValueError, match="stem: there is no 'gramm'; did you mean gram"):
        list(case_module.select(["gramm"]))


def test_inputs_are_seeded_cast_and_only_leaves_have_gradients():
    case = dataclasses.replace(stems.queue_case(4, 16, 8, torch.bfloat16))
    first, again, other = (case_module.build(case, CPU, seed) for seed in (0, 0, 1))
    assert torch.equal(first["bank"], again["bank"]) and not torch.equal(first["bank"], other["bank"])
    assert first["bank"].dtype == torch.bfloat16 and first["query"].dtype == torch.float32
    assert [name for name in first if first[name].requires_grad] == ["query"]
    wide = first.to(torch.float64)
    assert {tensor.dtype for tensor in wide.values()} == {torch.float64} and wide.leaves[0].is_leaf


@pytest.mark.parametrize("case", every_kind(), ids=lambda case: f"{case.stem}-{case.kind}")
def test_every_rival_does_the_same_job(case):
    """In float32 (transport: float64) each rival agrees with the float64 reference, loss and gradients."""
    inputs = case_module.build(case, CPU)
    oracle = check.make_oracle(case, inputs)
    names = []
    for rival in baselines.rivals(case, CPU):
        if isinstance(rival, Absent):
            assert rival.reason
            continue
        names.append(rival.name)
        if rival.name in ("compile", "liger", "autochunker"):  # a minute of compilation each; the bench checks them
            continue
        errors = check.errors_of(rival.call, inputs, oracle)
        assert check.verdict(errors, (1e-4, 1e-4)) == "", rival.name
    assert "eager" in names or case.kind in ("exact", "emd_step")  # PyTorch has no solver


@pytest.mark.parametrize("case", every_kind(), ids=lambda case: f"{case.stem}-{case.kind}")
def test_ours_passes_its_own_check(case):
    inputs = case_module.build(case, CPU)
    oracle = check.make_oracle(case, inputs)
    found = {p.name: p for p in baselines.rivals(case, CPU) if isinstance(p, Provider)}
    eager = check.errors_of(found["eager"].call, inputs, oracle) if "eager" in found else None
    for ours in baselines.ours(case, inputs):
        if isinstance(ours, Provider):
            assert check.verdict_on_ours(case, check.errors_of(ours.call, inputs, oracle), eager) == "", ours.name


def test_what_is_not_there_is_named():
    absent = {rival.name: rival.reason for rival in baselines.rivals(stems.top_k_case(4, 9, 2, torch.float32, None), CPU)
              if isinstance(rival, Absent)}  # fmt: skip
    assert "authors" in absent and "liger" in absent
