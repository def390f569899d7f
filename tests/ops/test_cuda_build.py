"""CUDA C++ without a GPU: nvcc compiles and links it for the chips we ship, its report is read, and loading says why not."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import torch

from cases import ROOT

NVCC = os.environ.get("NVCC") or shutil.which("nvcc")
CHIPS = ("80", "90")
pytestmark = pytest.mark.skipif(NVCC is None, reason="needs nvcc (on PATH or as $NVCC)")

# Per source: registers of a thread, and bytes of its local memory (stack frame and spills), at most, on any chip. probe runs
# four warps a block; transport one, and its shared memory bounds how many fit.
LIMITS = {"probe": (64, 0), "transport": (96, 0)}

ONLY_CUDA = """
import runpy, setuptools, sys
setup = setuptools.setup
setuptools.setup = lambda **k: setup(**k | {"ext_modules": [e for e in k["ext_modules"] if e.name == "fastkd._cuda"]})
sys.argv = ["setup.py", "build_ext", "--build-temp", sys.argv[1] + "/objects", "--build-lib", sys.argv[1]]
runpy.run_path("setup.py", run_name="__main__")
"""
REPORTING_NVCC = """#!/bin/sh
for word in "$@"; do case "$word" in *.cu) name=$(basename "$word" .cu);; esac; done
if [ -n "$name" ]; then exec {nvcc} -Xptxas -v "$@" 2>"{folder}/$name.report"; else exec {nvcc} "$@"; fi
"""


def build(folder):
    """(library, ptxas' report per source): setup.py's own build, with nvcc told to report, in a folder of its own."""
    reporting = folder / "nvcc"
    reporting.write_text(REPORTING_NVCC.format(nvcc=NVCC, folder=folder))
    reporting.chmod(0o755)
    environment = os.environ | {"FASTKD_BUILD": "cuda", "FASTKD_CUDA_ARCHS": ";".join(CHIPS), "NVCC": str(reporting)}
    command = [sys.executable, "-c", ONLY_CUDA, str(folder)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return folder / "fastkd/_cuda.so", {path.stem: path.read_text() for path in folder.glob("*.report")}


@pytest.mark.long
def test_compiles_links_and_says_why_it_does_not_load(tmp_path):
    triton_tools = pathlib.Path(pytest.importorskip("triton").__file__).parent / "backends/nvidia/bin"
    library, reports = build(tmp_path)
    sources = {path.stem for path in (ROOT / "csrc/cuda").glob("*.cu")}
    assert sources == set(LIMITS), "declare the limits of every csrc/cuda/*.cu in this file"
    assert library.exists() and set(reports) == sources
    for source, (registers, local) in LIMITS.items():
        entries = re.split(r"Compiling entry function", reports[source])[1:]
        assert {chip for entry in entries for chip in re.findall(r"for 'sm_(\d+)'", entry)} == set(CHIPS)
        for entry in entries:
            name = entry.split("'")[1]
            memory = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
            found = re.search(memory, entry)
            assert max(map(int, found.groups())) <= local, f"{source}: {name}: {found[0]}"
            used = int(re.search(r"Used (\d+) registers", entry)[1])
            assert used <= registers, f"{source}: {name}: {used} registers, declared limit {registers}"
    listing = [triton_tools / "cuobjdump", "--list-ptx", library]
    listed = subprocess.run(listing, capture_output=True, text=True, check=True).stdout
    assert f"sm_{CHIPS[-1]}.ptx" in listed and f"sm_{CHIPS[0]}.ptx" not in listed  # PTX, for GPUs to come
    if torch.version.cuda is None:  # it wants symbols that only a CUDA build of torch has: hence a library of its own
        assert re.search(r"undefined symbol: \w*cuda\w*", why_it_does_not_load(library))


def why_it_does_not_load(library):
    with pytest.raises(OSError, match=r"_cuda\.so") as caught:
        torch.ops.load_library(library)
    return str(caught.value.__cause__ or caught.value)


@pytest.mark.gpu
def test_the_library_loads_and_runs_on_a_gpu():
    x = torch.arange(12.0, device="cuda").reshape(3, 4)
    assert torch.equal(torch.ops.fastkd.probe(x), x.sum(1))
