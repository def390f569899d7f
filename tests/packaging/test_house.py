"""Rules of the repository: which part may import which, and what a hot path may not do."""

import ast
import re
import subprocess
import sys

import pytest
import torch

import fastkd
from cases import ROOT
from fastkd import backends

HOT_PATHS = [
    *(ROOT / "fastkd/ops").glob("*.py"),
    *(ROOT / "fastkd/losses").glob("*.py"),
    *(ROOT / "kernels").rglob("*.py"),
    *(ROOT / "fastkd/functional").glob("*.py"),
    ROOT / "fastkd/vocab/alignment.py",
]
SYNCHRONISING = {"item", "cpu", "tolist", "numpy", "nonzero", "synchronize"}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("path", HOT_PATHS, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_host_synchronisation_in_a_hot_path(path):
    found = [
        f"{path.name}:{node.lineno}: .{node.func.attr}() waits for the device"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in SYNCHRONISING
    ]
    assert not found, "\n".join(found)


def nested_targets(function: ast.FunctionDef):
    """Assignments with a tuple within the tuple on their left."""
    for node in ast.walk(function):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.For) else []
        for target in targets:
            if isinstance(target, ast.Tuple | ast.List) and any(
                isinstance(x, ast.Tuple | ast.List) for x in target.elts
            ):
                yield node


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").rglob("*.py")), ids=lambda p: p.name)
def test_kernels_unpack_one_tuple_at_a_time(path):
    """The frontend of triton 3.6 refuses `(a, b), c = x, y`, at the first launch; 3.9 takes it."""
    compiled = [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and "triton.jit" in map(ast.unparse, node.decorator_list)
    ]
    found = [f"{path.name}:{node.lineno}: write two statements" for each in compiled for node in nested_targets(each)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("path", HOT_PATHS, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_deterministic_scatter_add_synchronises(path):
    """There, torch copies strides from the host for scatter_add, which waits for the device; for index_put_ it does not."""
    found = [
        f"{path.name}:{node.lineno}: .{node.func.attr}(): index_put_(…, accumulate=True) does the same"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        and node.func.attr.startswith(("scatter_add", "scatter_reduce"))
    ]  # fmt: skip
    assert not found, "\n".join(found)


# Arrows point down only: cli → {bench, profile} → train → losses → functional → ops → {kernels, csrc, reference}, and compat →
# losses. Of the two in braces profile may import bench, whose baselines and tables it shares, and bench never profile.
FORBIDDEN = {
    "fastkd/reference/*.py": ["fastkd.(?!reference)"],
    "kernels/**/*.py": ["fastkd"],
    "fastkd/ops/*.py": ["fastkd.(functional|losses|train|profile|bench|cli)"],
    "fastkd/functional/*.py": ["fastkd.(losses|compat|train|profile|bench|cli)"],
    "fastkd/vocab/*.py": ["fastkd.(losses|compat|train|profile|bench|cli)"],
    "fastkd/losses/*.py": ["fastkd.(ops|reference|kernels|backends|compat|train|profile|bench|cli)"],
    "fastkd/compat/*.py": ["fastkd.(ops|reference|kernels|backends|train|profile|bench|cli)"],
    "fastkd/train/**/*.py": ["fastkd.(ops|kernels|profile|bench|cli)"],
    "fastkd/profile/**/*.py": ["fastkd.(bench.evidence|cli)"],
    "fastkd/cli/doctor.py": ["fastkd.(bench|profile|train)"],
    "bench/*.py": ["fastkd.(train|profile|bench.evidence|cli)"],
    "bench/cases/*.py": ["fastkd.(train|profile|bench.(?!cases)|cli)"],
    "bench/baselines/*.py": ["fastkd.(profile|train|losses|bench.evidence|cli)"],
}


@pytest.mark.parametrize("pattern", FORBIDDEN)
def test_arrows_point_down_only(pattern):
    for path in ROOT.glob(pattern):
        for name in imports(path):
            for forbidden in FORBIDDEN[pattern]:
                assert not re.match(forbidden, name), f"{path.relative_to(ROOT)} may not import {name}"


def test_no_two_files_define_one_name():
    """Two structs of one name in one namespace are one to the linker, which keeps the functions of either."""
    places: dict[str, list[str]] = {}
    for path in sorted([*(ROOT / "csrc").rglob("*.h"), *(ROOT / "csrc").rglob("*.cpp")]):
        inside: list[str] = []
        for line in path.read_text().splitlines():
            if opened := re.match(r"namespace ?([\w:]*) {$", line):
                inside.append(opened[1])
            elif line.startswith("}  // namespace"):
                inside.pop()
            elif (defined := re.match(r"(?:struct|class) (?:alignas\S+ )?(\w+)[^;]*{", line)) and "" not in inside:
                places.setdefault("::".join([*inside, defined[1]]), []).append(path.name)
    assert "fastkd::layer_cost::Layers" in places  # the search finds something
    assert not {name: files for name, files in places.items() if len(files) > 1}


def test_references_are_short():
    for path in (ROOT / "fastkd/reference").glob("*.py"):
        lines = len(path.read_text().splitlines())
        assert lines <= 100, f"{path.name} has {lines} lines; a definition fits on a page"


def test_every_stem_has_its_file_in_every_layer():
    for stem in backends.STEMS:
        assert (ROOT / f"fastkd/reference/{stem}.py").exists()
        assert (ROOT / f"fastkd/ops/{stem}.py").exists()
        assert (ROOT / f"fastkd/functional/{stem}.py").exists()
        for backend, path in (
            ("cpu", f"csrc/cpu/{stem}/op.cpp"),
            ("triton", f"kernels/{stem}.py"),
            ("cuda", f"csrc/cuda/{stem}.cu"),
        ):
            assert any((ROOT / p).exists() for p in (path, path.removesuffix(".py"))) == (
                backend in backends.WRITTEN[stem]
            ), f"{path} against backends.WRITTEN"


def test_kernels_is_not_a_package():
    assert not (ROOT / "kernels/__init__.py").exists(), "it would shadow Hugging Face's package of that name"


def test_import_fastkd_imports_only_torch():
    code = (
        "import sys, fastkd; "
        "print([m for m in ('triton', 'transformers', 'datasets', 'scipy', 'ot', 'matplotlib', 'rich') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_backend_that_cannot_run_says_why():
    x = torch.randn(2, 5)
    with pytest.raises(
        RuntimeError, match=r"divergence: backend='cuda' cannot run here: divergence has no cuda kernel"
    ):
        fastkd.divergence(x, x, backend="cuda")
    with pytest.raises(ValueError, match="backend: expected one of"):
        fastkd.divergence(x, x, backend="tpu")
    with pytest.raises(RuntimeError, match="kernels take float32, bfloat16 and float16"):
        fastkd.divergence(x.double(), x.double(), backend="cpu")


def test_doctor_lists_every_stem(capsys):
    from fastkd.cli import main

    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for stem in backends.STEMS:
        assert re.search(rf"{stem} +-> ", out)
    assert "WRONG" not in out


def test_unknown_command_is_refused(capsys):
    from fastkd.cli import main

    assert main(["disitl"]) == 2
    assert "doctor" in capsys.readouterr().err


@pytest.mark.skipif(backends.UNAVAILABLE["cpu"] is not None, reason=f"C++ kernels: {backends.UNAVAILABLE['cpu']}")
def test_probe_walks_the_whole_path():
    from fastkd.ops.probe import probe

    x = torch.randn(7, 33)
    torch.testing.assert_close(probe(x), x.sum(1))
    torch.library.opcheck(torch.ops.fastkd.probe.default, (x,))
    compiled = torch.compile(probe, fullgraph=True, dynamic=True)
    for rows in (3, 5):
        torch.testing.assert_close(compiled(x[:rows]), x[:rows].sum(1))
