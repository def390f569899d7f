"""The host's half of a launch without a GPU: what the interpreter does not go through, and an offline compilation neither."""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import launches
from cases import ROOT
from fastkd import backends

pytest.importorskip("triton")
HEADER = Path(sysconfig.get_paths()["include"]) / "Python.h"
pytestmark = [
    pytest.mark.skipif(backends.INTERPRETED, reason="the interpreter launches nothing"),
    pytest.mark.skipif(not (shutil.which("gcc") and HEADER.exists()), reason="needs gcc and Python.h"),
]


def launched(folder, *stems):
    launches.build(folder)
    command = [sys.executable, str(ROOT / "tests/launches.py"), *stems]
    environment = launches.environment(folder)
    paths = [str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = ":".join(paths)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.long
@pytest.mark.parametrize("stem", [stem for stem in backends.STEMS if "triton" in backends.WRITTEN[stem]])
def test_every_kernel_is_launched(stem, tmp_path):
    """Through Triton's driver and its C launcher: arguments, specialisations, options, shared memory, grids."""
    assert f"{stem} " in launched(tmp_path, stem)
