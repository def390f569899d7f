"""Shapes by name and from YAML: the right cases, and mistakes that teach."""

import pytest
import torch
from fastkd.bench import check, run
from fastkd.bench.cases import case as case_module
from fastkd.bench.cases import shapes, stems

CPU = torch.device("cpu")


def names(capsys, *argv):
    assert run.main([*argv, "--list"]) == 0
    return capsys.readouterr().out.split("\n")


def test_a_named_model_gives_every_stem(capsys):
    listed = names(capsys, "--shape", "bert-large@16x512")
    assert {line.split()[0] for line in listed if line} == set(case_module.REGISTRY)
    assert "divergence forward_kl-8192x30522-float32" in listed
    assert "layer_cost hidden-12x24x16x512x1024-float32" in listed
    assert "transport exact-2x12x24-float64" in listed


def test_filters_apply_and_dtypes_follow_the_device(capsys):
    asked = ("--shape", "llama-1b,qwen-vocab", "linear_divergence")
    listed = names(capsys, *asked, "--dtype", "bfloat16")
    assert listed[0] == "linear_divergence forward_kl-1024x128256x1024x2048-bfloat16" and "151936" in listed[1]
    on_gpu = shapes.select(["gpt2"], "", torch.device("cuda"))
    assert {case.dtype for case in on_gpu if case.stem != "transport"} == {torch.bfloat16}


YAML = """
models:
  mini: {layers: 2, width: 16, heads: 2, vocabulary: 50, batch: 2, length: 6, student_layers: 1, student_width: 8}
cases:
  divergence: [{kind: jsd, N: 5, V: 31, dtype: float32}, {kind: top_k, N: 3, V: 40, K: 20}]
  gram: [{kind: token, B: 2, N: 5, Ds: 4, Dt: 6}]
  relation: [{B: 1, H: 2, L: 5, d: 4, R: 2}]
  layer_cost: [{N: 1, M: 2, B: 1, S: 3, D: 4}, {kind: attention, N: 1, M: 2, B: 1, H: 2, S: 3, d: 4}]
  transport: [{P: 2, N: 3, M: 4}]
  contrast: [{B: 3, K: 9, D: 4}, {kind: nce, B: 3, K: 5, D: 4, n: 30}]
  linear_divergence: [{kind: forward_kl, R: 6, V: 20, Ds: 4, Dt: 5}]
"""


def test_every_case_of_a_yaml_file_runs(tmp_path):
    """The builders get their sizes in the right order: each case computes its own reference."""
    path = tmp_path / "mine.yaml"
    path.write_text(YAML)
    found = shapes.select([str(path)], "", CPU)
    assert len([case for case in found if case.label == "mini"]) == 9 and len(found) == 19
    for case in found:
        inputs = case_module.build(case, CPU)
        oracle = check.make_oracle(case, inputs)
        assert oracle.loss.isfinite() and all(g.isfinite().all() for g in oracle.gradients), case.name
    assert found[9].name == "jsd-5x31-float32" and found[10].shape == {"N": 3, "V": 40, "K": 20}


def test_every_registered_kind_can_be_asked_for():
    for stem, registered in case_module.REGISTRY.items():
        for case in registered():
            assert case.kind in shapes.KINDS[stem], f"bench/cases/shapes.py does not know {stem} {case.kind}"
            again = shapes.case_from(stem, {**case.shape, "kind": case.kind}, "test", case.dtype)
            assert again.name == case.name


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("bert-bas", "there is no 'bert-bas'; did you mean bert-base?"),
        ("gpt2@big", "expected gpt2@BATCHxLENGTH, such as gpt2@16x512"),
        ("none.yaml", "none.yaml: no such file; name a shape"),
        ("bert-base@0x5", "shape: bert-base@0x5: batch must be a whole number of at least 1, got 0"),
    ],
)
def test_a_wrong_name_is_answered(text, said, capsys):
    assert run.main(["--shape", text]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", "not valid YAML"),
        ("stems: {}", "expected `models:`, `cases:` or both"),
        ("models: {x: {depth: 3}}", "model 'x': there is no 'depth'; .*there are layers, width"),
        ("models: [a]", "models: expected lines of name: .*, got \\['a'\\]"),
        ("models: {x: 3}", "model 'x': expected {layers: 12, …}, got 3"),
        (
            "models: {x: {layers: '12', width: 8, heads: 2, vocabulary: 9}}",
            "model 'x': layers must be a whole .*got '12'",
        ),
        (
            "models: {x: {layers: 2, width: 8, heads: 0, vocabulary: 9}}",
            "heads must be a whole number of at least 1, got 0",
        ),
        ("models: {x: {layers: 2, width: 8, heads: 3, vocabulary: 9}}", "heads must divide the width, got 3 heads"),
        ("cases: [a]", "cases: expected lines of stem: .*, got \\['a'\\]"),
        ("cases: {gram: 5}", "expected a list under gram, got 5"),
        ("cases: {gram: [5]}", "gram: expected a case such as {kind: fcd, …}, got 5"),
        ("cases: {gram: [{dtype: [x]}]}", "dtype of gram: there is no \\['x'\\]; there are float32"),
        ("cases: {grams: [{B: 1}]}", "cases: there is no 'grams'; did you mean gram"),
        ("cases: {gram: [{kind: row}]}", "kind of gram: there is no 'row'; there are fcd"),
        ("cases: {gram: [{B: 1, N: 2}]}", "gram fcd takes the sizes B, N, Ds, Dt"),
        ("cases: {transport: [{P: 1, N: 2, M: -3}]}", "positive integers"),
        ("cases: {divergence: [{N: 1, V: 2, dtype: half}]}", "there is no 'half'; there are float32"),
    ],
)
def test_a_wrong_yaml_file_is_answered(text, said, tmp_path):
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=said):
        shapes.select([str(path)], "", CPU)


def test_a_shape_is_a_teacher_and_half_of_it():
    assert shapes.SHAPES["bert-base"].student == (6, 384)
    assert shapes.Shape(1, 8, 2, 10).student == (1, 4)
    assert stems.KINDS[0] in shapes.KINDS["linear_divergence"]
