"""The far ends of the curves: oracles in pieces are the reference, names are unique, and running out of memory is a result."""

import dataclasses

import pytest
import torch
from fastkd.bench import check, machine, results_io, run
from fastkd.bench.baselines import Absent, Provider
from fastkd.bench.cases import case as case_module
from fastkd.bench.cases import scale
from fastkd.bench.evidence import targets

CPU = torch.device("cpu")
WIDTHS = {"Ds": 4, "Dt": 6}
SMALL = {
    "gram": {"B": 2, "N": 11, **WIDTHS},
    "relation": {"B": 2, "H": 2, "L": 11, "d": 4, "R": 2},
    "linear_divergence": {"R": 11, "V": 9, **WIDTHS},
    "contrast": {"B": 11, "K": 5, "D": 4, "n": 9},
}


def test_oracles_in_pieces_are_the_reference(monkeypatch):
    monkeypatch.setattr(scale, "PIECE", 4)  # 11 rows: two whole pieces and a short one
    found = [case for case in case_module.select(scale=True) if case.oracle]
    assert {case.stem for case in found} == SMALL.keys()
    for case in {case.stem: case for case in found}.values():
        small = dataclasses.replace(case, shape=SMALL[case.stem])
        inputs = case_module.build(small, CPU)
        pieces = check.make_oracle(small, inputs)
        whole = check.make_oracle(dataclasses.replace(small, oracle=None), inputs)
        torch.testing.assert_close(pieces.loss, whole.loss, rtol=1e-12, atol=1e-14)
        for a, b in zip(pieces.gradients, whole.gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_curves_reach_far_and_only_when_asked():
    usual, far = list(case_module.select()), list(case_module.select(scale=True))
    assert all(case.sweep for case in far)
    ends: dict = {}
    for case in far:
        key = (case.stem, case.sweep)
        ends[key] = max(case.shape[case.sweep], ends.get(key, 0))
    asked = {("gram", "N"): 16384, ("relation", "L"): 16384, ("divergence", "V"): 262144, ("layer_cost", "N"): 48,
             ("linear_divergence", "V"): 262144, ("contrast", "K"): 1048576}  # fmt: skip
    assert asked.items() <= ends.items()
    assert {(stem, axis) for stem, axis in ends if axis == "B"} >= {("gram", "B"), ("relation", "B"), ("contrast", "B")}
    assert not any(case.shape.get(case.sweep, 0) > 8000 and case.stem in ("gram", "relation") for case in usual)


def test_names_are_unique_over_all_tables():
    """A curve's point with the name of a case of the table would replace it in the CSV."""
    for stem in case_module.REGISTRY:
        tables = [case_module.REGISTRY, case_module.ON_GPU, case_module.SCALE]
        names = [case.name for table in tables if stem in table for case in table[stem]()]
        assert len(names) == len(set(names)), sorted(names)


def test_every_target_reads_a_case_that_exists():
    there = {f"{case.stem} {case.name}" for case in case_module.select(gpu=True)}
    names = {
        value
        for value in vars(targets).values()
        if isinstance(value, str) and value.split(" ")[0] in case_module.REGISTRY
    }
    assert len(names) == 25 and not names - there, names - there


def hungry(x):
    torch.empty(2 << 30, dtype=torch.uint8)
    return x["student"].sum()


def test_running_out_of_memory_is_a_result():
    case = dataclasses.replace(next(iter(case_module.select(["divergence"]))), shape={"N": 3, "V": 7})
    inputs = case_module.build(case, CPU)
    ours = Provider("fastkd", lambda x: case.ours(x, "reference"), served_by="reference")
    passed, absent, refused = run.checked(case, [ours, Provider("eager", hungry)], inputs, memory=1.0)
    assert refused == "" and [provider.name for provider in passed] == ["fastkd"]
    assert absent == [Absent("eager", "out of memory at 1 GiB beyond its inputs")]
    assert absent[0].reason.startswith(results_io.OOM)
    torch.empty(2 << 30, dtype=torch.uint8)  # the limit is gone again


@pytest.mark.parametrize(
    ("error", "out"),
    [
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB"), True),
        (RuntimeError("shapes differ"), False),
    ],
)
def test_what_counts_as_out_of_memory(error, out):
    assert machine.ran_out(error) == out


def test_on_a_gpu_the_targets_come_first():
    """make gpu stops a stem's bench when its seconds are over."""
    for stem in case_module.REGISTRY:
        goals = [bool(case.goal) for case in case_module.select([stem], gpu=True)]
        assert goals == sorted(goals, reverse=True) and (goals[0] or stem == "transport")


def test_on_a_cpu_the_curves_have_a_limit_and_other_cases_none(monkeypatch):
    seen = []
    monkeypatch.setattr(machine, "load_before", lambda: 0.0)
    monkeypatch.setattr(run, "run_cases", lambda chosen, settings, *_: seen.append(settings.memory) or 0)
    for flags in (["--scale"], [], ["--scale", "--memory", "3"]):
        assert run.run(run.parser().parse_args(["gram", "--device", "cpu", *flags])) == 0
    assert seen[0] >= 1 and seen[1:] == [0.0, 3.0]


def test_a_case_that_dies_does_not_take_the_others_with_it(tmp_path, monkeypatch, capsys):
    def bench(case, *_):
        if case.name.startswith("reverse"):
            raise RuntimeError("CUDA out of memory. Tried to allocate 9 GiB")
        return run.Outcome(absent=[Absent("eager", "not today")])

    monkeypatch.setattr(run, "bench_case", bench)
    monkeypatch.setattr(
        run, "Roofs", lambda *_: type("R", (), {"copy_rate": lambda s, x: 1.0, "gemm_rate": lambda s, d: 1.0})()
    )
    chosen = [case for case in case_module.select(["divergence"]) if case.kind in ("reverse_kl", "jsd")]
    assert run.run_cases(chosen, run.Settings(CPU), {}, tmp_path, False) == 1
    out = capsys.readouterr().out
    assert "reverse_kl-512x30522-float32: no speed is shown, the check failed: out of memory" in out
    assert "eager (divergence): not today" in out
