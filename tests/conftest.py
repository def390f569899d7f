"""Every test runs with uninitialised memory filled with NaN, and the markers say why a test is skipped."""

import os

import pytest
import torch

# Two cores: two workers with a thread each (make test), or one process with both.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty returns NaN (the C++ ops' allocations too), so that reading what was never written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def fake_measure(monkeypatch):
    import bench_fakes

    return bench_fakes.fake_measure(monkeypatch)


def pytest_collection_modifyitems(config, items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU; run `make gpu` on a machine that has one")
    for item in items:
        if item.get_closest_marker("gpu"):  # the keywords would include the names of folders
            item.add_marker(skip)
