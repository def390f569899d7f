"""Triton kernels without a GPU: their arithmetic in the interpreter. Their machine code: test_triton.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastkd import backends

pytest.importorskip("triton")
ROOT = Path(__file__).parent.parent
not_interpreted = pytest.mark.skipif(backends.INTERPRETED, reason="this starts an interpreter of its own")


def interpreted(*arguments):
    """pytest in a process of its own: TRITON_INTERPRET must be set before triton is imported."""
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *arguments],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-4000:]
    assert " passed" in result.stdout


# Of each longer file a quick part, which takes seconds, and all of it: [long].
def parts(quick, everything="test"):
    return pytest.mark.parametrize("part", [pytest.param(everything, marks=pytest.mark.long), quick])


@not_interpreted
@parts("near_convergence or mixed or equal or first_block or masked")
def test_divergence_in_the_interpreter(part):
    interpreted("tests/test_triton_divergence.py", "-k", part)


@not_interpreted
@parts("triton and (mutant or two_words or rest)", "triton")
def test_sparse_divergence_in_the_interpreter(part):
    interpreted("tests/test_divergence_topk.py", "-k", part)


@not_interpreted
@parts("triton and (ends or alpha_0)", "triton and not long")
def test_accuracy_of_divergence_in_the_interpreter(part):
    interpreted("tests/test_divergence_accuracy.py", "-k", part)


@not_interpreted
@parts("triton and (closed_form or near_convergence or does_not_matter)", "triton")
def test_layer_cost_in_the_interpreter(part):
    interpreted("tests/test_layer_cost.py", "-k", part)


@not_interpreted
@parts(
    "triton and (near_convergence or equal_to or extreme or strided)",
    "triton and (every_case or padding or strided or near_convergence or equal_to or extreme or flat)",
)
def test_relation_in_the_interpreter(part):
    interpreted("tests/test_relation_kernels.py", "-k", part)


@not_interpreted
@parts("triton and (near_convergence or masked_rows or labels_caps or frozen or mass)", "triton")
def test_linear_divergence_in_the_interpreter(part):
    interpreted("tests/test_linear_divergence_kernels.py", "tests/test_linear_divergence_words.py", "-k", part)


@not_interpreted
@parts("not long and (authors or near or side or mutant)")
def test_gram_in_the_interpreter(part):
    interpreted("tests/test_triton_gram.py", "-k", part)


@not_interpreted
@parts("mutant or references")
def test_lines_of_gram_in_the_interpreter(part):
    interpreted("tests/test_triton_gram_lines.py", "-k", part)


@not_interpreted
@pytest.mark.long
def test_what_gram_is_in_the_interpreter():
    interpreted(
        "tests/test_gram.py", "-k", "triton and (authors or corrcoef or padding or padded or too_few or forget)"
    )


@not_interpreted
@pytest.mark.long
@pytest.mark.parametrize("file", ["test_gram.py", "test_gram_terms.py", "test_gram_kernels.py"])
def test_everything_of_gram_in_the_interpreter(file):
    # The interpreter truncates what it rounds to bfloat16, so how good bfloat16 is cannot be seen there.
    interpreted(f"tests/{file}", "-k", "triton and not long_groups and not as_good_as_float32")


@not_interpreted
@parts("trained or near or mutant or unwritten")
def test_contrast_in_the_interpreter(part):
    interpreted("tests/test_triton_contrast.py", "-k", part)


@not_interpreted
@parts("out_of_range or eight_bit or launches")
def test_contrast_banks_in_the_interpreter(part):
    interpreted("tests/test_triton_contrast_bank.py", "-k", part)


@not_interpreted
@parts("triton and (near or half or mean or does_not_matter)", "triton")
def test_attention_cost_in_the_interpreter(part):
    interpreted("tests/test_attention_cost.py", "-k", part)


@not_interpreted
@parts("triton and refused", "triton")
def test_autograd_in_the_interpreter(part):
    interpreted("tests/test_autograd.py", "-k", part)
