"""Liger-Kernel's own tests of the losses that fastkd replaces, from its sdist, with fastkd in Liger's place.

The sdists of the other packages have no tests; docs/migrate.md says what became of the tests of their repositories.
"""

import os
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree

import pytest

from cases import ROOT

pytest.importorskip("liger_kernel", reason="runs the package's tests: pip install liger-kernel==0.8.5")
VERSION = "0.8.5"
FILES = (
    "chunked_loss/test_cosine_loss.py",
    "chunked_loss/test_jsd_loss.py",
    "transformers/test_fused_linear_jsd.py",
    "transformers/test_fused_linear_kl_div.py",
    "transformers/test_jsd.py",
    "transformers/test_kl_div.py",
)
# On a CPU: Liger's functions, which are Triton and not replaced; a test that counts calls of nll_loss; compiled bit for bit as
# eager, which PyTorch is not; and half a gigabyte of logits, which takes minutes.
LEFT_OUT = ("functional", "torch_kl_div_parity", "hard_loss_computed_only_when_used", "compile_matches_eager", "32000")


@pytest.mark.long
def test_ligers_own_tests_pass(tmp_path):
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "--no-build-isolation"]
    got = subprocess.run([*pip, f"liger-kernel=={VERSION}"], cwd=tmp_path, capture_output=True, text=True)
    if got.returncode:
        pytest.skip(f"the sdist of liger-kernel {VERSION} cannot be fetched: {got.stderr.strip().splitlines()[-1]}")
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        archive.extractall(tmp_path, filter="data")
    sources = tmp_path / f"liger_kernel-{VERSION}"
    (sources / "patched.py").write_text("import fastkd\n\nfastkd.patch('liger')\n")
    options = ["-p", "patched", "-p", "no:randomly", "-q", "--junitxml=results.xml", "--durations=15"]
    options += ["-k", f"not ({' or '.join(LEFT_OUT)})"]
    paths = {"PYTHONPATH": os.pathsep.join((str(sources), str(ROOT)))}
    tests = [f"test/{name}" for name in FILES]
    run = subprocess.run([sys.executable, "-m", "pytest", *options, *tests], cwd=sources, env={**os.environ, **paths},
                         capture_output=True, text=True)  # fmt: skip
    assert run.returncode == 0, run.stdout[-4000:]
    suite = ElementTree.parse(sources / "results.xml").find("testsuite")
    ran = int(suite.get("tests")) - int(suite.get("skipped"))
    assert ran > 170, f"only {ran} of Liger's tests ran"
