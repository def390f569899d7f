"""The suite notices mistakes in the kernels: each of mutants.toml, made in a copy of this checkout, fails the tests named
there, which pass without it. `make mutants` runs them; -k picks some by name. Of the instruction sets AVX2 alone is compiled
again, and used, where the processor has it."""

import os
import shlex
import shutil
import subprocess
import sys
from functools import cache

import pytest
import tomllib
import torch

from cases import ROOT
from fastkd import backends

AVX2 = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
MUTANTS = tomllib.loads((ROOT / "tests/mutants.toml").read_text())["mutant"]
by_name = pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant["name"])


def text_of(mutant):
    """The file with the mistake in it."""
    text = (ROOT / mutant["file"]).read_text()
    count = text.count(mutant["old"])
    assert count == 1, f"{mutant['file']}: {mutant['old']!r} is there {count} times; make mutants.toml follow the code"
    return text.replace(mutant["old"], mutant["new"])


def run(where, *command, **environment):
    environment = os.environ | {"FASTKD_BUILD": "cpu", "PYTHONDONTWRITEBYTECODE": "1"} | environment
    environment |= {"FASTKD_MAX_ISA": "avx2"} if AVX2 else {}
    for name in [name for name in environment if name.startswith("PYTEST_")]:
        del environment[name]
    return subprocess.run([sys.executable, *command], cwd=where, env=environment, capture_output=True, text=True)


@cache
def outcome_of(where, tests, interpreted):
    """(exit status, what pytest said) of the tests in the checkout `where`."""
    options = ("-x", "-p", "no:cacheprovider", "-p", "no:xdist")
    result = run(where, "-m", "pytest", *options, *shlex.split(tests), TRITON_INTERPRET=str(int(interpreted)))
    return result.returncode, result.stdout[-3000:] + result.stderr[-1000:]


@by_name
def test_the_text_to_replace_exists(mutant):
    assert text_of(mutant) != (ROOT / mutant["file"]).read_text()


@pytest.mark.mutants
@pytest.mark.skipif(backends.UNAVAILABLE["cpu"] is not None, reason="the C++ kernels are not built")
@by_name
def test_the_tests_kill_the_mutant(mutant, tmp_path):
    interpreted = mutant["file"].startswith("kernels/")
    status, said = outcome_of(ROOT, mutant["tests"], interpreted)
    assert status == 0, f"these tests must pass before they can notice anything\n{said}"
    copy = tmp_path / "checkout"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv*", "results", "__pycache__", "runs"))
    (copy / mutant["file"]).write_text(text_of(mutant))
    if not interpreted:
        for other in copy.glob("build/temp*/**/*_isa.[pa]*.o") if AVX2 else ():
            if ".avx2." not in other.name:
                other.touch()  # newer than the mistake, so that it is not compiled again
        built = run(copy, "setup.py", "-q", "build_ext", "--inplace")
        assert built.returncode == 0, f"the mutant does not compile\n{built.stderr[-3000:]}"
    try:
        status, said = outcome_of(copy, mutant["tests"], interpreted)
    finally:
        shutil.rmtree(copy)
    assert status == 1, f"survived, or did not run (pytest ended with {status})\n{said}"
