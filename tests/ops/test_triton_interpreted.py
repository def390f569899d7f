"""Triton kernels without a GPU: their arithmetic in the interpreter. Their machine code: test_triton.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cases import ROOT
from fastkd import backends

pytest.importorskip("triton")
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
    "ops/test_kernels.py": (None, "any_order and triton"),
    "ops/divergence/test_triton_divergence.py": ("near_convergence or first_block", "test"),
    "ops/divergence/test_divergence_topk.py": ("triton and mutant", "triton"),
    "ops/divergence/test_divergence_accuracy.py": ("triton and alpha_0", "triton"),
    "ops/layer_cost/test_layer_cost.py": ("triton and near_convergence", "triton"),
    "ops/layer_cost/test_attention_cost.py": (
        "triton and near_convergence",
        "triton and (not against_float64 or mean) and not half",
    ),
    "ops/relation/test_relation_kernels.py": (
        "triton and near_convergence",
        "triton and (every_case or padding or strided or near_convergence or equal_to or extreme or flat)",
    ),
    "ops/linear_divergence/test_linear_divergence_kernels.py": (
        "triton and (near_convergence or masked_rows or frozen)",
        "triton",
    ),
    "ops/linear_divergence/test_linear_divergence_vocab.py": ("triton and mass", "triton"),
    "ops/gram/test_triton_gram.py": ("either_side", "test"),
    "ops/gram/test_triton_gram_row_stats.py": ("mutant and official", "test"),
    # The interpreter truncates what it rounds to bfloat16, so how good bfloat16 is cannot be seen there.
    "ops/gram/test_gram.py": (None, "triton and (authors or convergence or hazards or dtypes or no_mask)"),
    "ops/gram/test_gram_terms.py": (None, "triton and (mean and official or unreduced or frozen)"),
    "ops/gram/test_gram_kernels.py": (
        None,
        "triton and (convergence or mutant or zeros or outlier or equal_rows or awkward)",
    ),
    "ops/contrast/test_triton_contrast.py": ("near or unwritten", "test"),
    "ops/contrast/test_contrast_step.py": ("triton and (set_already or unset)", "triton"),
    "ops/contrast/test_triton_contrast_bank.py": ("eight_bit", "test"),
    "ops/test_autograd.py": ("triton and refused and forward_kl", "triton"),
}


@not_interpreted
def test_the_quick_parts_in_the_interpreter():
    quick = {file: part for file, (part, _) in PARTS.items() if part is not None}
    chosen = " or ".join(f"({Path(file).name} and ({part}))" for file, part in quick.items())
    interpreted(*(f"tests/{file}" for file in quick), "-k", chosen)


@not_interpreted
@pytest.mark.long
@pytest.mark.parametrize("file", PARTS)
def test_every_part_in_the_interpreter(file):
    interpreted(f"tests/{file}", "-k", PARTS[file][1])
