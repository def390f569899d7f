"""What `make try-wheel` runs in a fresh environment: the installed wheel has its kernels, computes right, and finds no compiler."""

import shutil
import sys
from pathlib import Path

import numpy
import torch

import fastkd
from fastkd import backends
from fastkd.cli import main

assert not [name for name in ("cc", "gcc", "g++", "c++", "clang") if shutil.which(name)], "there is a compiler here"
assert Path(fastkd.__file__).is_relative_to(sys.prefix), f"this is not the installed fastkd: {fastkd.__file__}"
assert backends.UNAVAILABLE["cpu"] is None, backends.UNAVAILABLE["cpu"]
assert main(["doctor"]) == 0

torch.manual_seed(0)
student, teacher = torch.randn(64, 501, requires_grad=True), torch.randn(64, 501)
(ours,) = torch.autograd.grad(fastkd.divergence(student, teacher, kind="jsd", backend="cpu"), student)
exact = fastkd.divergence(student.double(), teacher.double(), kind="jsd", backend="reference")
(wanted,) = torch.autograd.grad(exact, student)
error = float((ours - wanted).norm() / wanted.norm())
assert error < 1e-5, error

cost = numpy.random.default_rng(0).random((6, 9))
flow, found = fastkd.emd(None, None, cost, log=True)
value = float(fastkd.transport(torch.from_numpy(cost)).value)
assert abs(found["cost"] - value) < 1e-12 and numpy.allclose(flow.sum(1), 1 / 6)
print(f"\nPython {sys.version.split()[0]}: the wheel works; the gradient's error is {error:.1e}")
