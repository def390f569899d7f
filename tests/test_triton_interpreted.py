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


# By file: what make test runs, all of them in one process, and what is long.
PARTS = {
    "test_triton_divergence.py": ("near_convergence or first_block", "test"),
    "test_divergence_topk.py": ("triton and mutant", "triton"),
    "test_divergence_accuracy.py": ("triton and alpha_0", "triton"),
    "test_layer_cost.py": ("triton and near_convergence", "triton"),
    "test_attention_cost.py": ("triton and near_convergence", "triton and (not against_float64 or mean) and not half"),
    "test_relation_kernels.py": (
        "triton and near_convergence",
        "triton and (every_case or padding or strided or near_convergence or equal_to or extreme or flat)",
    ),
    "test_linear_divergence_kernels.py": ("triton and (near_convergence or masked_rows or frozen)", "triton"),
    "test_linear_divergence_words.py": ("triton and mass", "triton"),
    "test_triton_gram.py": ("side and not long", "test"),
    "test_triton_gram_lines.py": ("mutant and official", "test"),
    # The interpreter truncates what it rounds to bfloat16, so how good bfloat16 is cannot be seen there.
    "test_gram.py": (None, "triton and (authors or convergence or hazards or dtypes or no_mask)"),
    "test_gram_terms.py": (None, "triton and (mean and official or unreduced or frozen)"),
    "test_gram_kernels.py": (None, "triton and (convergence or mutant or zeros or outlier or equal_rows or awkward)"),
    "test_triton_contrast.py": ("near or unwritten", "test"),
    "test_triton_contrast_bank.py": ("eight_bit", "test"),
    "test_autograd.py": ("triton and refused and forward_kl", "triton"),
}


@not_interpreted
def test_the_quick_parts_in_the_interpreter():
    quick = {file: part for file, (part, _) in PARTS.items() if part is not None}
    chosen = " or ".join(f"({file} and ({part}))" for file, part in quick.items())
    interpreted(*(f"tests/{file}" for file in quick), "-k", chosen)


@not_interpreted
@pytest.mark.long
@pytest.mark.parametrize("file", PARTS)
def test_all_of_it_in_the_interpreter(file):
    interpreted(f"tests/{file}", "-k", PARTS[file][1])
