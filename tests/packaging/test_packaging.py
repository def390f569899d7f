"""Installed, editable or not at all; with and without a compiler, triton, and Hugging Face's `kernels`."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from cases import ROOT

CALL = "import torch, fastkd; fastkd.divergence(torch.randn(2, 9), torch.randn(2, 9)).item(); "
WHERE = (
    "import fastkd.bench.run, importlib.util as u; print(fastkd.__file__, u.find_spec('fastkd.kernels') is not None)"
)


def python(code, cwd, **env):
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=os.environ | env, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def checkout(tmp_path, built=False):
    """The tracked files as they are now, without anything built, or beside the object files of this checkout."""
    files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if files.returncode:
        pytest.skip("not a git checkout")
    for name in files.stdout.splitlines():
        target = tmp_path / "checkout" / name
        if (ROOT / name).is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target)
    if built:
        for objects in (ROOT / "build").glob("temp.*"):
            shutil.copytree(objects, tmp_path / "checkout/build" / objects.name)
    return tmp_path / "checkout"


def install(source, target, build, editable=False):
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    command += ["--disable-pip-version-check", *(["-e"] if editable else []), str(source)]
    if not editable:
        command += ["--target", str(target)]
    return subprocess.run(
        command, env=os.environ | {"FASTKD_BUILD": build}, capture_output=True, text=True, timeout=600
    )


def wheel(source, out, build, **env):
    result = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(out), str(source)],
        env=os.environ | {"FASTKD_BUILD": build} | env, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    (found,) = out.glob("*.whl")
    return found, result.stderr


def test_uninstalled_without_a_build(tmp_path):
    """A bare clone, nothing compiled: the reference runs, and the reason for it is one sentence."""
    tree = checkout(tmp_path)
    code = "import warnings; warnings.simplefilter('error'); " + CALL + "print(fastkd.backends.UNAVAILABLE['cpu'])"
    said = python(code, tmp_path, PYTHONPATH=str(tree))
    assert said.splitlines() == [
        "it is not built (FASTKD_BUILD=none, or not installed); reinstall with FASTKD_BUILD=cpu"
    ]
    assert str(tree) in python(WHERE, tmp_path, PYTHONPATH=str(tree))


@pytest.mark.long
def test_wheel_with_the_compiled_library(tmp_path):
    found, _ = wheel(checkout(tmp_path, built=True), tmp_path / "out", "cpu")
    names = zipfile.ZipFile(found).namelist()
    for wanted in ("fastkd/_cpu.so", "fastkd/kernels/gram/launch.py", "fastkd/bench/run.py", "fastkd/py.typed"):
        assert wanted in names
    assert not [name for name in names if "test" in name.lower().split("/")[0] or "results" in name.split("/")]
    site = tmp_path / "site"
    zipfile.ZipFile(found).extractall(site)
    code = CALL + "print(fastkd.backends.UNAVAILABLE['cpu']); import fastkd._C;" + WHERE
    assert python(code, tmp_path, PYTHONPATH=str(site)).split() == ["None", str(site / "fastkd/__init__.py"), "True"]


def test_wheel_without_a_build_is_pure_python(tmp_path):
    found, _ = wheel(checkout(tmp_path), tmp_path / "out", "none")
    assert found.name.endswith("-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(found).namelist() if name.endswith(".so")]


@pytest.mark.parametrize("compiler", ["fails", "is missing"])
def test_an_install_without_a_working_compiler_says_so_at_import(tmp_path, compiler):
    """Under auto the install succeeds; pip hides what the build printed, so the first import repeats it."""
    fake = tmp_path / "bad-c++"
    fake.write_text("#!/bin/sh\necho no such luck >&2\nexit 1\n")
    fake.chmod(0o755)
    env = {"CXX": str(fake)} if compiler == "fails" else {"CXX": "", "PATH": str(tmp_path / "empty")}
    found, _ = wheel(checkout(tmp_path), tmp_path / "out", "auto", **env)
    zipfile.ZipFile(found).extractall(tmp_path / "site")
    why = "the compiler failed" if compiler == "fails" else "no C++ compiler was found"
    warned = "import warnings; w = warnings.catch_warnings(record=True); seen = w.__enter__(); import fastkd; "
    said = python(warned + "print(*[x.message for x in seen])", tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert said.startswith(f"fastkd runs without its C++ kernels, so losses on a CPU are plain PyTorch: {why}")
    code = CALL + "print(fastkd.backends.UNAVAILABLE['cpu'])"
    assert f"it is not built ({why}" in python(code, tmp_path, PYTHONPATH=str(tmp_path / "site"))


def test_build_cpu_with_a_failing_compiler_is_an_error(tmp_path):
    fake = tmp_path / "bad-c++"
    fake.write_text("#!/bin/sh\nexit 1\n")
    fake.chmod(0o755)
    tree = checkout(tmp_path)
    env = os.environ | {"FASTKD_BUILD": "cpu", "CXX": str(fake)}
    result = subprocess.run(
        [sys.executable, "setup.py", "build_ext"], cwd=tree, env=env, capture_output=True, text=True
    )
    assert result.returncode != 0


@pytest.mark.long
def test_editable(tmp_path):
    """In a virtual environment of its own that sees this one's packages, so that nothing here is overwritten."""
    tree = checkout(tmp_path, built=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    inside = tmp_path / "venv/bin/python"
    purelib = subprocess.run(
        [str(inside), "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"], capture_output=True, text=True
    ).stdout.strip()
    import sysconfig

    (Path(purelib) / "outer.pth").write_text(sysconfig.get_paths()["purelib"])
    command = [
        str(inside),
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-e",
        str(tree),
    ]
    result = subprocess.run(
        command, env=os.environ | {"FASTKD_BUILD": "cpu"}, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr
    code = CALL + "print(fastkd.backends.UNAVAILABLE['cpu']);" + WHERE
    result = subprocess.run([str(inside), "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout.split() == ["None", str(tree / "fastkd/__init__.py"), "True"], result.stderr


def test_beside_hugging_face_kernels(tmp_path):
    """Their package is called `kernels`; run from our root it must still be theirs."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/__init__.py").write_text("WHOSE = 'theirs'\n")
    assert python("import kernels, fastkd; print(kernels.WHOSE)", ROOT, PYTHONPATH=str(tmp_path)) == "theirs"


def test_without_triton(tmp_path):
    block = (
        "import sys, importlib.util as u; find = u.find_spec; "
        "u.find_spec = lambda name, *a: None if name == 'triton' else find(name, *a); sys.modules['triton'] = None; "
    )
    out = python(block + CALL + "print(fastkd.backends.UNAVAILABLE['triton'])", tmp_path, PYTHONPATH=str(ROOT))
    assert out == "triton is not installed; pip install 'fastkd[triton]'"


@pytest.mark.long
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_cuda_library_compiles_and_links_without_a_gpu(tmp_path):
    """FASTKD_BUILD=cuda builds regardless of what is visible, for both chips; a CPU torch says what it lacks on loading."""
    for objects in (ROOT / "build").glob("temp.*/_cpu"):
        shutil.copytree(objects, tmp_path / "obj/_cpu")
    command = [sys.executable, "setup.py", "-q", "build_ext", "-b", str(tmp_path / "lib"), "-t", str(tmp_path / "obj")]
    env = os.environ | {"FASTKD_BUILD": "cuda"}
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    library = tmp_path / "lib/fastkd/_cuda.so"
    assert b"sm_80" in library.read_bytes() and b"sm_90" in library.read_bytes()
    if torch.version.cuda is None:
        with pytest.raises(OSError, match=r"undefined symbol|Could not load"):
            torch.ops.load_library(library)
