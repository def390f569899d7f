"""Every test runs with uninitialised memory filled with NaN, and the markers say why a test is skipped."""

import os
import signal

import pytest
import torch

if "FASTKD_LIBRARY" in os.environ:  # the sanitized one (make asan): fastkd takes ops that are there already
    torch.ops.load_library(os.environ["FASTKD_LIBRARY"])

from fastkd.bench import machine

from fastkd import backends, thresholds

THREADS = (
    1 if "PYTEST_XDIST_WORKER" in os.environ else 2
)  # two cores: two workers (make test), or one process with both
machine.quote_library_path()
if "FASTKD_THRESHOLDS" not in os.environ:  # the tests are small, and about kernels; PyTorch's products would serve them
    thresholds.UP_TO["linear_divergence"] = thresholds.NEVER


def summed_in_one_order(self, a, b, d, input_precision, max_num_imprecise_acc):
    """The interpreter's tl.dot, with one order of the sum over k for every entry, as on a GPU: what NumPy's BLAS returns for
    one entry depends on the processor, the width of the tile and the order of the factors."""
    from triton.runtime.interpreter import TensorHandle

    dtype = d.data.dtype
    products = a.data.astype(dtype)[..., :, None, :] * b.data.astype(dtype).swapaxes(-1, -2)[..., None, :, :]
    return TensorHandle(products.sum(-1, dtype=dtype) + d.data, d.dtype.scalar)


if backends.INTERPRETED:
    from triton.runtime.interpreter import InterpreterBuilder

    InterpreterBuilder.create_dot = summed_in_one_order


def defaults():
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True


defaults()


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty returns NaN (the C++ ops' allocations too), so that reading what was never written shows. Restored after
    the test as well: a module's fixtures are set up before this one."""
    defaults()
    yield
    defaults()


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


@pytest.fixture
def interruptible():
    """A process that was started in the background ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
