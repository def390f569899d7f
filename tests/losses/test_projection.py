"""Projection: one linear map with bias per level, or one for all."""

import pytest
import torch

from cases import randn, relative_error
from fastkd.losses.projection import Projection


def test_projection_is_one_linear_with_bias_per_level():
    project = Projection(4, 6, levels=3, shared=False)
    hidden = [randn(2, 5, 4, seed=i, dtype=torch.float32) for i in range(3)]
    for linear, x, y in zip(project.linear, hidden, project(hidden), strict=True):
        assert torch.equal(y, x @ linear.weight.T + linear.bias) or relative_error(y, linear(x)) == 0
    one = Projection(4, 6)
    assert torch.equal(one(hidden[0]), one(hidden)[0]) and len(one(hidden)) == 3
    with pytest.raises(ValueError, match="expected 3 layers"):
        project(hidden[:2])
    with pytest.raises(ValueError, match="student_dim"):
        Projection(0, 6)
