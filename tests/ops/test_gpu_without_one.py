"""What runs on a GPU only, with fakes in the place of one: what a peer's failed capture leaves behind, whose device is current."""

import contextlib
import csv
import dataclasses
import importlib
import math
import subprocess
import sys

import pytest
import torch
from bench_fakes import CPU, FakeTimer
from fastkd.bench import check, measure, peers, roofline
from fastkd.bench.cases import STEMS, linear_divergence
from fastkd.bench.cases import case as case_module
from fastkd.bench.evidence import sanitizer_smoke

from cases import ROOT
from fastkd import backends
from on_gpu import step_of


class FakeCuda:
    """torch.cuda as far as a capture needs it. As the real one does, `graph` that fails leaves its stream current."""

    def __init__(self):
        self.current, self.mode, self.captures = "default", "default", 0

    def install(self, monkeypatch):
        fakes = {
            "Stream": lambda: self.Stream("side"), "current_stream": lambda: self.Stream(self.current),
            "stream": self.stream, "set_stream": lambda stream: setattr(self, "current", stream.name),
            "set_sync_debug_mode": lambda mode: setattr(self, "mode", mode), "graph": self.graph, "CUDAGraph": self.Graph,
        }  # fmt: skip
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        return self

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, _):
            pass

    class Graph:
        def pool(self):
            return 0

        def replay(self):
            pass

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream.name
        try:
            yield
        finally:
            self.current = before

    @contextlib.contextmanager
    def graph(self, _, stream, pool=None):
        before, self.current = self.current, stream.name
        self.captures += 1
        yield
        self.current = before

    def wait(self):
        """What .item() does."""
        if self.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")


@pytest.mark.parametrize("mode", ["forward", "backward", "both"])
def test_a_synchronising_call_is_never_captured(mode, monkeypatch):
    cuda, x = FakeCuda().install(monkeypatch), torch.ones(3, requires_grad=True)

    def waits():
        cuda.wait()
        return x.square().sum()

    with pytest.raises(RuntimeError, match="synchronizing"):
        measure.capture_task("authors", mode, waits, [x])
    assert (cuda.captures, cuda.mode, cuda.current) == (0, "default", "default")
    measure.capture_task("ours", mode, lambda: x.square().sum(), [x])
    assert (cuda.captures, cuda.mode, cuda.current) == (2 if mode == "backward" else 1, "default", "default")


def test_a_failed_capture_releases_its_stream(monkeypatch):
    cuda, x = FakeCuda().install(monkeypatch), torch.ones(3, requires_grad=True)

    def refuses():
        if cuda.captures:
            raise RuntimeError("operation not permitted when stream is capturing")
        return x.square().sum()

    with pytest.raises(RuntimeError, match="not permitted"):
        measure.capture_task("other", "forward", refuses, [x])
    assert (cuda.captures, cuda.current) == (1, "default")


def test_the_roofline_does_not_need_the_default_generator():
    measured, before = roofline.Roofline(CPU, FakeTimer({"roofline": 1e-3, "gemm": 1e-3})), torch.get_rng_state()
    measured.measure_copy(1 << 20)
    measured.gemm_rate(torch.float32)
    measured.gemm_seconds(roofline.Gemm(3, 4, 5), torch.float32)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_product_that_does_not_fit_is_measured_in_parts(monkeypatch):
    """Twelve heads of 16k tokens: 13 GB of scores, and no memory for those who are measured next to them."""
    monkeypatch.setattr(roofline, "BATCH_BYTES", 4 * (3 * 4 + 4 * 5 + 3 * 5) * 2)  # two of them
    seen = []

    class Timer:
        def sample(self, task, calls):
            seen.append(task.run(0).shape)
            return 1e-3

    measured = roofline.Roofline(CPU, Timer())
    assert measured.gemm_seconds(roofline.Gemm(3, 4, 5, 7), torch.float32) == pytest.approx(3.5e-3)
    assert measured.gemm_seconds(roofline.Gemm(3, 4, 5, 2), torch.float32) == pytest.approx(1e-3)
    assert {*seen} == {(2, 3, 5)}


def test_checkpointed_chunks_can_be_captured(monkeypatch):
    """The state of random numbers, on a GPU, cannot be read meanwhile."""
    case = linear_divergence.case("forward_kl", 300, 11, 4, 5)
    run, inputs = peers.checkpointed_chunks(case), case_module.build(case, CPU)
    for name in ("get_rng_state", "set_rng_state"):
        monkeypatch.setattr(torch, name, lambda *_: pytest.fail("reads the state of random numbers"))
    torch.autograd.grad(run(inputs, inputs.options), inputs.leaves)


GREAT = [(case.stem, case.name) for stem in ("divergence", "linear_divergence", "relation")
         for case in STEMS[stem].ON_GPU]  # fmt: skip


@pytest.mark.parametrize(("stem", "name"), GREAT)
def test_oracles_of_the_largest_cases_store_no_logits(stem, name, monkeypatch):
    """Sixteen times the logits in float64 is more than a GPU has; the numbers are those of the whole reference."""
    monkeypatch.setattr(case_module, "PIECE", 4)
    sizes = {"N": 11, "R": 11, "V": 50, "Ds": 4, "Dt": 6, "B": 2, "H": 2, "L": 11, "d": 4}
    sizes |= {"R": 3} if stem == "relation" else {}
    case = next(case for case in STEMS[stem].ON_GPU if case.name == name)
    case = dataclasses.replace(case, shape={axis: sizes[axis] for axis in case.shape}, dtype=torch.float32)
    inputs, kept = case_module.build(case, CPU).to(torch.float64), []
    own = {x.untyped_storage().data_ptr() for value in inputs.values() for x in case_module.as_list(value)}

    def keep(tensor):
        kept.append(0 if tensor.untyped_storage().data_ptr() in own else tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        case.oracle(inputs)
    assert sum(kept) < 11 * 11, "the graph of the float64 check holds score or logit matrices"
    pieces = check.make_oracle(case, inputs)
    whole = check.make_oracle(dataclasses.replace(case, oracle=None), inputs)
    torch.testing.assert_close(pieces.loss, whole.loss, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(pieces.gradients, whole.gradients, rtol=1e-9, atol=1e-12)


def test_profiles_are_imported_without_datasets(monkeypatch):
    pytest.importorskip("transformers")
    package, loaded = map(importlib.import_module, ("fastkd.profile", "fastkd.profile.models"))
    monkeypatch.setattr(package, "models", loaded)  # what the import below changes is undone afterwards
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.delitem(sys.modules, "fastkd.profile.models")
    models = importlib.import_module("fastkd.profile.models")
    rows = models.tokens(models.config_of("bert-base"), "classification", 2, 8)
    assert (
        set(rows[3]) == {"input_ids", "attention_mask", "example_id", "labels"}
        and rows[3]["labels"] == 1
        and len(rows) == 512
    )


PROFILE = """
import sys
for name in ("datasets", "ot", "liger_kernel", "cut_cross_entropy", "ruff", "expecttest"):
    sys.modules[name] = None  # importing it is an error
from fastkd.bench import machine
from fastkd.cli import main
machine.load_before = machine.LoadMeter.stop = lambda *_: 0.0  # no number of this run is kept
sizes = "num_hidden_layers=4,hidden_size=96,num_attention_heads=4,intermediate_size=32,vocab_size=50"
options = ["--method", "all", "--batch", "4", "--length", "8", "--steps", "6", "--no-trace", "--device", "cpu"]
for model in ("bert-base:", "llama-1b:num_key_value_heads=1,"):
    assert main(["profile", "--from-config", model + sizes, *options, "--out", sys.argv[1]]) == 0, model
"""


@pytest.mark.long
def test_a_profile_needs_no_more_packages_than_a_machine_with_a_gpu_has(tmp_path):
    pytest.importorskip("transformers")
    done = subprocess.run([sys.executable, "-c", PROFILE, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (table,) = tmp_path.rglob("profile.csv")
    assert {"kd", "bert_emd", "codir", "glmd"} <= {row["method"] for row in csv.DictReader(table.open())}


@pytest.mark.parametrize("arguments", ["x", "[x]", "(x, x), None", "None, [], (2.0,), [x, x], 2.0"])
def test_kernels_are_launched_on_the_device_of_their_tensors(arguments, monkeypatch):
    """Pointers of cuda:1 and the current stream of cuda:0 are no pair."""
    current, x = [0], torch.ones(2)

    @contextlib.contextmanager
    def device_of(tensor):
        assert tensor is x
        current[0] = 1  # where x would be
        yield
        current[0] = 0

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    seen = []
    launch = backends._on_the_tensors_device(lambda *_: seen.append(current[0]))
    launch(*eval(f"({arguments},)", {"x": x}))
    assert seen == [1] and current == [0]


def test_every_triton_op_has_the_guard(monkeypatch):
    def host_of_this_test(x: torch.Tensor) -> torch.Tensor:
        """What torch.library reads of a host function, its annotations, stays."""
        return x + 1

    guarded = []
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: guarded.append(x) or contextlib.nullcontext())
    op, x = backends._triton_op(host_of_this_test, ()), torch.ones(2)
    assert torch.equal(op(x), x + 1) and torch.equal(torch.ops.fastkd.host_of_this_test_triton(x), x + 1)
    assert len(guarded) == 2


def test_a_step_that_moves_a_bank_is_the_same_twice():
    """Bitwise, which a captured graph's replay is compared for."""
    case = next(case for case in sanitizer_smoke.small_cases() if case.kind == "codir_step_given")
    inputs = case_module.build(case, CPU)
    for side in "st":  # the case's own banks move by a bit or two
        inputs[f"bank_{side}"].normal_(generator=torch.Generator().manual_seed(1))
    step = step_of(lambda inputs: check.loss_and_gradients(lambda x: case.ours(x, "reference"), inputs), inputs)
    (loss, gradients), moved = step(), inputs["bank_s"].clone()
    again, gradients_again = step()
    assert torch.equal(loss, again) and all(map(torch.equal, gradients, gradients_again))
    assert torch.equal(inputs["bank_s"], moved)
    once_more, _ = check.loss_and_gradients(lambda x: case.ours(x, "reference"), inputs)
    assert not torch.equal(loss, once_more)  # without putting it back


class Launches:
    """In the place of a kernel: the grids it is launched with."""

    def __init__(self):
        self.grids = []

    def __getitem__(self, grid):
        self.grids.append(grid)
        return lambda *_, **__: None


MANY = 65536 + 3  # one more than a grid may have programs along y and z


@pytest.mark.parametrize(("where", "name"), [("relation", "forward_kernel"), ("relation", "backward_kernel"),
                                            ("layer_cost.attention", "partial_kernel"), ("layer_cost.attention", "gradient_kernel"),
                                            ("contrast.loss", "gathered_kernel")])  # fmt: skip
def test_many_heads_and_examples_fit_into_a_grid(where, name, monkeypatch):
    pytest.importorskip("triton")
    module, launches = importlib.import_module(f"fastkd.kernels.{where}"), Launches()
    for other in vars(module):
        if other.endswith("_kernel"):
            monkeypatch.setattr(module, other, launches if other == name else Launches())
    x, grad = torch.empty(MANY, 1, 5, 16, device="meta"), torch.empty(1, 1, device="meta")
    if where == "relation":
        x = torch.empty(4099, 17, 5, 16, device="meta")
        rows, stats, *nothing = module.relation_fwd(x, None, x, None, None, False, 1.0, 1.0, False)
        module.relation_bwd(rows, x, None, x, None, None, stats, *nothing, False, 1.0, 1.0)
    elif where == "layer_cost.attention":
        module.attention_cost_fwd([x], [x], [x], [x], [1.0, 1.0], None, False)
        module.attention_cost_bwd(grad, [x], [x], [x], [x], [1.0, 1.0], None, False)
    else:
        nce = importlib.import_module("fastkd.kernels.contrast.nce")
        query, index = torch.empty(MANY, 16, device="meta"), torch.zeros(MANY, 2, dtype=torch.int64, device="meta")
        monkeypatch.setattr(module, "empty_partials", lambda query, *_: module.Partials(*3 * (query[:2],)))
        nce.nce_fwd(query, torch.empty(9, 16, device="meta"), index, grad, 0.1, False)
    assert launches.grids and all(
        math.prod(grid) >= MANY and max(grid[1:], default=1) <= 65535 for grid in launches.grids
    )
