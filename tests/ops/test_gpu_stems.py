"""On a GPU, every stem in every kernel: no waiting for the device, captured and replayed bitwise, twice the same."""

import functools

import pytest
import torch
from fastkd.bench import check
from fastkd.bench.cases import case as case_module
from fastkd.bench.evidence import sanitizer_smoke

from on_gpu import never_waits, replays, step_of

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")


def kernels():
    """Nothing is imported or built at collection on a machine without a GPU."""
    if not torch.cuda.is_available():
        return [pytest.param(None, "", id="no GPU")]
    found = []
    for case in sanitizer_smoke.small_cases():
        inputs = case_module.build(case, GPU)
        for provider in sanitizer_smoke.implementations(case, inputs):
            if provider.served_by in ("triton", "cuda"):
                found.append(pytest.param(case, provider, id=f"{case.stem}-{case.name}-{provider.served_by}"))
    return found or [pytest.param(None, "", id="no kernels")]


def run(provider, inputs):
    loss, gradients = check.loss_and_gradients(provider.call, inputs)
    return [loss, *gradients]


@pytest.mark.parametrize(("case", "provider"), kernels())
def test_never_synchronises(case, provider):
    assert case is not None, "no kernel of any stem runs on this GPU: is the library built, is triton installed?"
    inputs = case_module.build(case, GPU)
    never_waits(lambda: run(provider, inputs))


@pytest.mark.parametrize(("case", "provider"), kernels())
def test_in_a_cuda_graph_and_twice_the_same(case, provider):
    inputs = case_module.build(case, GPU)
    replays(step_of(functools.partial(run, provider), inputs))
