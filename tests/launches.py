"""`python tests/launches.py stem …`: every kernel launched as on a GPU, by Triton's own driver and launcher, where
libcuda is a stub that runs nothing: arguments are packed, kernels compiled for sm_90, grids looked at. Inputs are
CPU tensors, results are rubbish. The process must begin with `environment(folder)`, since libraries are found by it."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

STUB = r"""
#include "cuda.h"
#include <stdio.h>
static long launches = 0;
CUresult cuCtxGetCurrent(CUcontext *c) { *c = (CUcontext)1; return 0; }
CUresult cuCtxGetDevice(CUdevice *d) { *d = 0; return 0; }
CUresult cuCtxGetLimit(size_t *v, CUlimit l) { *v = 1 << 20; return 0; }
CUresult cuCtxSetCurrent(CUcontext c) { return 0; }
CUresult cuCtxSetLimit(CUlimit l, size_t v) { return 0; }
CUresult cuDeviceGet(CUdevice *d, int i) { *d = 0; return 0; }
CUresult cuDeviceGetAttribute(int *v, CUdevice_attribute a, CUdevice d) {
  *v = a == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN ? 232448
     : a == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK ? 49152
     : a == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR ? 233472
     : a == CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT ? 132 : a == CU_DEVICE_ATTRIBUTE_WARP_SIZE ? 32 : 65536;
  return 0;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext *c, CUdevice d) { *c = (CUcontext)1; return 0; }
CUresult cuDriverGetVersion(int *v) { *v = 13000; return 0; }
CUresult cuFuncGetAttribute(int *v, CUfunction_attribute a, CUfunction f) {
  *v = a == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return 0;
}
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute a, int v) { return 0; }
CUresult cuFuncSetCacheConfig(CUfunction f, CUfunc_cache c) { return 0; }
CUresult cuGetErrorString(CUresult r, const char **s) { *s = "refused by the stub"; return 0; }
CUresult cuModuleGetFunction(CUfunction *f, CUmodule m, const char *n) { *f = (CUfunction)3; return 0; }
CUresult cuModuleLoadData(CUmodule *m, const void *i) { *m = (CUmodule)2; return 0; }
CUresult cuModuleUnload(CUmodule m) { return 0; }
CUresult cuOccupancyMaxActiveClusters(int *n, CUfunction f, const CUlaunchConfig *c) { *n = 1; return 0; }
CUresult cuPointerGetAttribute(void *o, CUpointer_attribute a, CUdeviceptr p) { *(CUdeviceptr *)o = p; return 0; }
CUresult cuStreamIsCapturing(CUstream s, CUstreamCaptureStatus *c) { *c = 0; return 0; }
CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **p, void **e) {
  int fits = c->gridDimX <= 2147483647u && c->gridDimY <= 65535 && c->gridDimZ <= 65535 && c->blockDimX <= 1024;
  launches += fits;
  return fits && c->sharedMemBytes <= 232448 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
long stub_launches(void) { return launches; }
"""


def build(folder: Path) -> None:
    """The stub, as the library that Triton's launchers are linked with."""
    from importlib.util import find_spec

    include = Path(find_spec("triton").origin).parent / "backends/nvidia/include"
    (folder / "stub.c").write_text(STUB)
    command = ["gcc", "-shared", "-fPIC", "-w", f"-I{include}", "-o", folder / "libcuda.so.1", folder / "stub.c"]
    subprocess.run(command, check=True)


def environment(folder: Path) -> dict:
    own = {
        "TRITON_LIBCUDA_PATH": str(folder),
        "LD_LIBRARY_PATH": str(folder),
        "TRITON_CACHE_DIR": str(folder / "cache"),
    }
    return {**os.environ, **own, "TRITON_INTERPRET": "0"}


def pretend() -> None:
    """A GPU of compute capability 9.0, for Triton and for fastkd.backends; torch goes on without one."""
    import torch

    there, torch.cuda.is_available = torch.cuda.is_available, lambda: True
    torch.cuda.current_device, torch.cuda.get_device_capability = lambda: 0, lambda *_: (9, 0)
    torch._C._cuda_getCurrentRawStream = lambda _: 0

    import triton
    from triton.backends.nvidia.driver import CudaDriver

    import fastkd.functional  # noqa: F401  looks kernels up
    from fastkd import backends

    backends.INTERPRETED = True  # tensors on a CPU are welcome
    torch.cuda.is_available = there
    triton.runtime.driver.set_active(CudaDriver())


def steps(stems):
    """(name, function) of everything that launches kernels."""
    import torch
    from fastkd.bench import check
    from fastkd.bench.cases import case as case_module
    from fastkd.bench.evidence import sanitizer_smoke

    from fastkd import backends, functional

    for case in sanitizer_smoke.small_cases():
        if case.stem in stems and "triton" in backends.WRITTEN[case.stem] and case.kind != "codir_step":
            inputs = case_module.build(case, torch.device("cpu"))
            call = lambda x, case=case: case.ours(x, "triton")  # noqa: E731
            yield f"{case.stem} {case.name}", lambda call=call, inputs=inputs: check.loss_and_gradients(call, inputs)
    if "contrast" in stems:  # what codir_step does besides; nobody draws its indices here
        idx, state = torch.arange(3), torch.tensor([1, 0])
        yield "draw", lambda: functional.sample_negatives(idx, 20, state, n_data=50, backend="triton")


def main(stems) -> int:
    pretend()
    stub, failed = ctypes.CDLL("libcuda.so.1"), 0
    for name, step in steps(stems):
        before, problem = stub.stub_launches(), ""
        try:
            step()
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        count = stub.stub_launches() - before
        failed += bool(problem) or not count
        print(f"{name}: {count} launches", problem, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
