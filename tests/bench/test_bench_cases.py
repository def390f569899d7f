"""The bench's cases: floors against arithmetic by hand, inputs, and providers that really do the same job."""

import dataclasses

import pytest
import torch
from bench_fakes import CPU, FakeTimer
from fastkd.bench import baselines, check, roofline
from fastkd.bench.baselines import Absent, Provider
from fastkd.bench.cases import STEMS, contrast, divergence, gram, layer_cost, linear_divergence, listed, shapes
from fastkd.bench.cases import case as case_module
from fastkd.bench.cases.case import BF16, Gemm

MSE = divergence.case("mse", 3, 5)
TINY = {"N": 7, "V": 41, "K": 5, "B": 4, "Ds": 12, "Dt": 20, "H": 2, "L": 9, "d": 8, "R": 3, "S": 6, "D": 10, "n": 50}
TINY_BY_STEM = {
    "divergence": {"K": 20},
    "transport": {"P": 3, "N": 4, "M": 6},
    "layer_cost": {"N": 2, "M": 3},
    "linear_divergence": {"R": 300},
}


# Floors -----------------------------------------------------------------------------------------------------------


def test_the_floor_is_the_higher_of_two_bounds():
    assert roofline.floor(flops=1e9, moved=1e9, copy_rate=1e10, gemm_rate=1e12) == (0.1, "copy")
    assert roofline.floor(flops=1e12, moved=1e9, copy_rate=1e10, gemm_rate=1e12) == (1.0, "gemm")


@pytest.mark.parametrize(("moved", "size"), [(1, 2**20), (2**20 + 1, 2**21), (3e8, 2**29), (1e12, 2**30)])
def test_the_copy_that_stands_for_a_case_is_about_its_size(moved, size):
    assert roofline.copy_size(moved) == size


def test_bounds_count_reads_and_writes_and_measure_once():
    timer = FakeTimer({"roofline": 0.5, "gemm": 2.0})
    measured = roofline.Roofline(CPU, timer)
    assert measured.copy_rate(1 << 20) == (1 << 20) / 0.5
    taken = len(timer.order)
    measured.copy_rate(1000.0)
    assert len(timer.order) == taken
    gemms = (Gemm(4, 5, 6), Gemm(4, 5, 6), Gemm(6, 4, 5, 2, ("backward", "both")))
    case = dataclasses.replace(MSE, gemms=gemms)
    assert measured.gemms_of(case) == {"forward": 4.0, "backward": 2.0, "both": 6.0}


def test_a_bound_measured_again_stays_the_best_that_was_seen():
    timer = FakeTimer({"roofline": 0.5})
    measured = roofline.Roofline(CPU, timer)
    for seconds, best in ((0.5, 0.5), (2.0, 0.5), (0.25, 0.25)):
        timer.seconds["roofline"] = seconds
        measured.again(MSE, "both")
        assert measured.copy_rate(1000.0) == (1 << 20) / best
        assert measured.gemm_rate(torch.float32) == 2.0 * 2048**3 / best


def test_declared_work_agrees_with_arithmetic_by_hand():
    """Figures of the physical floors, worked out independently: FLOPs over 788 TFLOP/s, bytes as they are."""
    linear = linear_divergence.case("forward_kl", 8192, 128256, 4096, 4096, BF16)
    assert linear.flops.forward / 788e12 == pytest.approx(21.8e-3, rel=5e-3)
    assert linear.flops.both / 788e12 == pytest.approx(43.7e-3, rel=5e-3)
    assert sum(2 * gemm.batch * gemm.rows * gemm.inner * gemm.columns for gemm in linear.gemms) == linear.flops.both
    rows = divergence.case("forward_kl", 8192, 128256, dtype=BF16)
    assert rows.bytes.both / 4.3e12 == pytest.approx(1.47e-3, rel=5e-3)
    queue = contrast.case("info_nce", 32, 65536, 768, dtype=BF16)
    assert queue.flops.both == pytest.approx(6.4e9, rel=1e-2) and queue.bytes.both == pytest.approx(101e6, rel=1e-2)
    token = gram.case("token", 32, 128, 768, 768, BF16)
    assert token.flops.forward == pytest.approx(0.8e9, rel=1e-2)
    assert token.bytes.forward == pytest.approx(12.6e6, rel=1e-2)
    assert layer_cost.case("hidden", 6, 12, 32, 128, 768).bytes.forward == 18 * 32 * 128 * 768 * 4
    assert contrast.case("nce", 32, 4096, 128, 262144).bytes.forward == pytest.approx(2 * 67e6, rel=1e-2)


def test_the_floor_of_attention_is_the_cheaper_way():
    """Two student layers, three teachers, so four flows; by hand, one head."""
    short = layer_cost.attention_work(
        2, 3, 4, 8
    )  # scores: 2·4·4·8 = 256 FLOPs a layer, and the same for each of 2 gradients
    assert (short.forward, short.both) == (5 * 256, 5 * 256 + 2 * 2 * 256)
    far = layer_cost.attention_work(2, 3, 1024, 8)  # X^T Y: 2·1024·8·8 = 131072 FLOPs, half of that where Y is X
    own, cross = 2 * 65536, 2 * 131072  # of queries and of keys
    assert far.forward == 5 * own + 6 * cross
    pulls = 2 * (2 + 4) * 131072  # q (k^T k), r (l^T k) of four flows, and the keys' side
    assert far.both == far.forward + pulls
    assert far.backward == 2 * own + 4 * cross + pulls  # of what the flows touch
    many = layer_cost.attention_work(20, 20, 64, 8)  # 400 pairs: scores forward, products backward
    assert many.forward == 40 * 2 * 64 * 64 * 8
    assert many.both == many.forward + min(2 * 20 * 2 * 64 * 64 * 8, (20 * 1 + 39 * 2 + 2 * 59) * 2 * 64 * 64)
    case = layer_cost.case("attention", 3, 6, 1, 12, 2048, 64)
    assert case.flops.both == 12 * layer_cost.attention_work(3, 6, 2048, 64).both < 12 * 9 * 2 * 2048 * 2048 * 64 / 3


def test_sparse_flow_is_a_vertex_with_uniform_marginals():
    flow = layer_cost.sparse_flow(6, 12)
    assert (flow > 0).sum() <= 17
    assert torch.allclose(flow.sum(1), torch.full((6,), 1 / 6)) and torch.allclose(
        flow.sum(0), torch.full((12,), 1 / 12)
    )


# Cases and providers ----------------------------------------------------------------------------------------------


def tiny(stem, kind):
    axes = STEMS[stem].AXES[kind]
    return STEMS[stem].case(kind, *(TINY_BY_STEM.get(stem, {}).get(axis, TINY.get(axis, 3)) for axis in axes))


EVERY_KIND = [pytest.param(tiny(stem, kind), id=f"{stem}-{kind}") for stem in STEMS for kind in STEMS[stem].AXES]


@pytest.mark.parametrize("stem", STEMS)
def test_names_are_unique_over_all_lists(stem):
    """A case with the name of another would replace it in the CSV."""
    names = [case.name for case in listed(stem, gpu=True)]
    assert len(names) == len(set(names)) and any(case.quick for case in listed(stem))
    goals = [
        bool(case.goals) for case in listed(stem, gpu=True)
    ]  # make gpu stops a stem's bench when its seconds are over
    assert goals == sorted(goals, reverse=True) and goals[0]


def test_inputs_are_seeded_cast_and_only_leaves_have_gradients():
    case = contrast.case("info_nce", 4, 16, 8, dtype=BF16)
    first, again, other = (case_module.build(case, CPU, seed) for seed in (0, 0, 1))
    assert torch.equal(first["bank"], again["bank"]) and not torch.equal(first["bank"], other["bank"])
    assert first["bank"].dtype == torch.bfloat16 and first["query"].dtype == torch.float32
    assert [name for name in first if first[name].requires_grad] == ["query"]
    wide = first.to(torch.float64)
    assert {tensor.dtype for tensor in wide.values()} == {torch.float64} and wide.leaves[0].is_leaf


@pytest.mark.parametrize("case", EVERY_KIND)
def test_every_provider_does_the_same_job(case):
    """Loss and gradients, against the float64 reference: others to 1e-4 in float32 (transport: float64), ours to its limits."""
    inputs = case_module.build(case, CPU)
    oracle, errors = check.make_oracle(case, inputs), {}
    for other in baselines.others(case, CPU):
        assert other.name in baselines.names()
        if isinstance(other, Absent):
            assert other.reason
        elif other.name not in (
            "compile",
            "liger",
            "autochunker",
        ):  # a minute of compilation each; the bench checks them
            errors[other.name] = check.errors_of(other.call, inputs, oracle)
            assert check.verdict(errors[other.name], (1e-4, 1e-4)) == "", other.name
    assert "eager" in errors or case.kind in ("exact", "emd_step")  # PyTorch has no solver
    for ours in baselines.ours(case, inputs):
        if isinstance(ours, Provider):
            found, allowed = check.errors_of(ours.call, inputs, oracle), check.limits(case.dtype, errors.get("eager"))
            assert check.verdict(found, allowed) == "", ours.name


def test_what_is_not_there_is_named():
    absent = {other.name for other in baselines.others(tiny("divergence", "top_k"), CPU) if isinstance(other, Absent)}
    assert {"authors", "liger"} <= absent


# Shapes by name ------------------------------------------------------------------------------------------


def test_a_named_model_gives_every_stem():
    found = shapes.select(["bert-large@16x512"], "", CPU)
    assert {case.stem for case in found} == STEMS.keys() and {case.label for case in found} == {"bert-large@16x512"}
    names = {"forward_kl-8192x30522-float32", "hidden-12x24x16x512x1024-float32", "exact-2x12x24-float64"}
    assert names <= {case.name for case in found}
    on_gpu = shapes.select(["llama-1b", "qwen-vocab"], "", torch.device("cuda"), stems=["linear_divergence"])
    assert [case.name for case in on_gpu] == ["forward_kl-1024x128256x1024x2048-bfloat16",
                                              "forward_kl-1024x151936x1792x3584-bfloat16"]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("bert-bas", "shape: expected one of 'bert-base', .*got 'bert-bas'"),
        ("gpt2@big", "expected gpt2@BATCHxLENGTH, such as gpt2@16x512"),
        ("bert-base@0x5", "expected bert-base@BATCHxLENGTH"),
    ],
)
def test_a_wrong_shape_is_answered(text, said):
    with pytest.raises(ValueError, match=said):
        shapes.select([text], "", CPU)
