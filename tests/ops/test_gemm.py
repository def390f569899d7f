"""The shared CPU GEMM tile: every size, type, layout and instruction set against float64, and its bitwise promises."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from cases import AWKWARD_SIZES, ROOT, randn, relative_error
from fastkd import backends
from fastkd.ops.gemm import DIRECT, FLOAT32_ONLY, ROUND, SPLIT, gemm_nt

pytestmark = pytest.mark.skipif(backends.UNAVAILABLE["cpu"] is not None, reason=str(backends.UNAVAILABLE["cpu"]))

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("rows", "columns", "gaps", "inside")
# Around a vector, a panel, and a block of k (256 units; a bfloat16 unit is two).
DEPTHS = (1, 2, 7, 33, 129, 257, 515)
# Rows, columns, depth past every block of the macro tile and of the op.
LARGE = ((131, 1061, 300), (300, 70, 1025), (67, 530, 4096), (9, 33, 4097))
PROCESSOR = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
BFLOAT16_MULTIPLIED = "avx512_bf16" in PROCESSOR and "GenuineIntel" not in PROCESSOR  # Intel's multiply float32 faster
BFLOAT16_MULTIPLIED = BFLOAT16_MULTIPLIED and os.environ.get("FASTKD_MAX_ISA") not in ("plain", "avx2")


def whole_numbers(rows, columns, seed, dtype):
    """Products and sums of these are exact in float32, so that a result is right or wrong, never close."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, (rows, columns), generator=generator).to(dtype)


def laid_out(x, layout):
    """The same values: transposed in memory, with both strides above 1, or surrounded by NaN."""
    rows, columns = x.shape
    if layout == "columns":
        return x.t().contiguous().t()
    if layout == "gaps":
        buffer = x.new_full((rows, 3, columns, 2), torch.nan)
        buffer[:, 1, :, 1] = x
        return buffer[:, 1, :, 1]
    if layout == "inside":
        buffer = x.new_full((rows + 2, columns + 5), torch.nan)
        buffer[1:-1, 3:-2] = x
        return buffer[1:-1, 3:-2]
    return x.contiguous()


def exact(a, b):
    return (a.double() @ b.double().t()).float()  # [M, N]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_awkward_sizes_are_exact(dtype, layout):
    for i, m in enumerate(AWKWARD_SIZES):
        for j, n in enumerate(AWKWARD_SIZES):
            for k in DEPTHS if layout == "rows" else DEPTHS[(i + j) % 3 :: 3]:
                a, b = whole_numbers(m, k, 1, dtype), whole_numbers(n, k, 2, dtype)
                got = gemm_nt(laid_out(a, layout), laid_out(b, layout))
                assert torch.equal(got, exact(a, b)), (m, n, k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", LARGE, ids=str)
def test_many_blocks(dtype, size):
    m, n, k = size
    a, b = whole_numbers(m, k, 3, dtype), whole_numbers(n, k, 4, dtype)
    assert torch.equal(gemm_nt(a, laid_out(b, "columns")), exact(a, b))
    a, b = randn(m, k, seed=5, dtype=dtype), randn(n, k, seed=6, dtype=dtype)
    assert relative_error(gemm_nt(a, b), a.double() @ b.double().t()) < 1e-6


def test_no_rows_no_columns_no_depth():
    for m, n, k in ((0, 5, 3), (5, 0, 3), (0, 0, 0), (5, 9, 0)):
        got = gemm_nt(torch.ones(m, k), torch.ones(n, k))
        assert got.shape == (m, n) and torch.equal(got, torch.zeros(m, n))
    start = randn(5, 9, dtype=torch.float32)
    assert torch.equal(gemm_nt(torch.ones(5, 0), torch.ones(9, 0), start), start)


@pytest.mark.parametrize("how", [0, DIRECT], ids=["packed", "direct"])
def test_start_is_added(how):
    for m, n, k in ((1, 1, 1), (33, 129, 7), (130, 600, 515)):
        a, b = whole_numbers(m, k, 1, torch.float32), whole_numbers(n, k, 2, torch.float32)
        start = whole_numbers(m, n, 3, torch.float32)
        assert torch.equal(gemm_nt(a, b, start, -0.5, how), exact(a, b) * -0.5 + start), (m, n, k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_reading_in_place_changes_no_bit(dtype):
    if dtype == torch.bfloat16 and not BFLOAT16_MULTIPLIED:
        with pytest.raises(RuntimeError):
            gemm_nt(torch.ones(2, 2, dtype=dtype), torch.ones(2, 2, dtype=dtype), how=DIRECT)
        return
    for m in AWKWARD_SIZES:
        for k in DEPTHS:
            a, b = randn(m, k, seed=1, dtype=dtype), randn(67, k, seed=2, dtype=dtype)
            assert torch.equal(gemm_nt(laid_out(a, "inside"), b, how=DIRECT), gemm_nt(a, b)), (m, k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_value_depends_on_its_row_and_column_only(dtype):
    a, b = randn(131, 1030, seed=1, dtype=dtype), randn(610, 1030, seed=2, dtype=dtype)
    start = randn(131, 610, seed=3, dtype=torch.float32)
    whole = gemm_nt(a, b, start, 0.3)
    for i, j in ((0, 0), (1, 3), (5, 37), (126, 593)):
        part = gemm_nt(a[i:], b[j : j + 17], start[i:, j : j + 17], 0.3)
        assert torch.equal(part, whole[i:, j : j + 17]), (i, j)
    square = gemm_nt(a, a)
    assert torch.equal(square, square.t())


def test_bitwise_the_same_again_and_on_one_thread():
    a, b = randn(259, 515, seed=1, dtype=torch.float32), randn(301, 515, seed=2, dtype=torch.float32)
    torch.set_num_threads(2)
    first = gemm_nt(a, b)
    assert torch.equal(gemm_nt(a, b), first)
    torch.set_num_threads(1)
    assert torch.equal(gemm_nt(a, b), first)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity_stay_in_their_row(dtype):
    a, b = whole_numbers(40, 33, 1, dtype), whole_numbers(70, 33, 2, dtype).abs() + 1
    expected = exact(a, b)
    a[7, 32], a[9, 0] = torch.nan, torch.inf
    got = gemm_nt(a, b)
    assert got[7].isnan().all() and torch.equal(got[9], torch.full((70,), torch.inf))
    keep = torch.ones(40, dtype=torch.bool)
    keep[[7, 9]] = False
    assert torch.equal(got[keep], expected[keep])


def test_every_float16_is_widened_exactly():
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16).reshape(-1, 1)
    got = gemm_nt(every, torch.ones(1, 1, dtype=torch.float16))
    assert torch.equal(got.nan_to_num(7.0), every.float().nan_to_num(7.0)) and torch.equal(got.isnan(), every.isnan())


def test_float32_is_rounded_to_bfloat16_as_torch_does():
    if not BFLOAT16_MULTIPLIED:
        pytest.skip("float32 is only rounded where the machine multiplies bfloat16")
    bits = torch.arange(0x3F7FF000, 0x3F7FF000 + (1 << 18), dtype=torch.int32)  # every tie, and across a power of two
    x = torch.cat([bits.view(torch.float32), torch.tensor([3.4e38, -3.4e38, torch.inf, -torch.inf, torch.nan])])
    for layout in ("rows", "columns"):
        column = laid_out(torch.stack([x, torch.zeros_like(x)], 1), layout)
        got = gemm_nt(column, torch.tensor([[1.0, 0.0]]), how=ROUND)[:, 0]
        expected = x.bfloat16().float()
        assert torch.equal(got[:-1], expected[:-1]) and got[-1].isnan()


def test_two_bfloat16_parts_carry_sixteen_bits():
    a, b = randn(67, 515, seed=1, dtype=torch.float32), randn(130, 515, seed=2, dtype=torch.float32).bfloat16().float()
    oracle = a.double() @ b.double().t()
    assert relative_error(gemm_nt(a, b, how=ROUND | SPLIT), oracle) < 5e-6
    rounded = relative_error(gemm_nt(a, b, how=ROUND), oracle)
    assert (rounded > 1e-3) == BFLOAT16_MULTIPLIED


def test_bfloat16_widened_to_float32():
    a, b = randn(67, 515, seed=1, dtype=torch.bfloat16), randn(130, 515, seed=2, dtype=torch.bfloat16)
    widened = gemm_nt(a, b, how=FLOAT32_ONLY)
    assert torch.equal(widened, gemm_nt(a.float(), b.float()))


GUARDED = """
import ctypes, mmap, torch
from fastkd.ops.gemm import DIRECT, FLOAT32_ONLY, gemm_nt
libc, pages = ctypes.CDLL(None, use_errno=True), 8
room = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
end = ctypes.addressof(ctypes.c_char.from_buffer(room)) + pages * mmap.PAGESIZE
assert libc.mprotect(ctypes.c_void_p(end), mmap.PAGESIZE, 0) == 0
for dtype, hows in ((torch.float32, (0, DIRECT)), (torch.bfloat16, (0, DIRECT, FLOAT32_ONLY)), (torch.float16, (0,))):
    for rows in (1, 2, 7, 9, 17, 33):
        for k in (1, 3, 15, 17, 31, 33, 65):
            size = rows * k * dtype.itemsize
            x = torch.frombuffer(room, dtype=dtype, count=rows * k, offset=pages * mmap.PAGESIZE - size).fill_(1)
            for how in hows:
                try:
                    gemm_nt(x.view(rows, k), torch.ones(5, k, dtype=dtype), how=how)
                except RuntimeError:
                    assert dtype == torch.bfloat16 and how == DIRECT
            for view in (x.view(rows, k), x.view(k, rows).t()):
                gemm_nt(torch.ones(5, k, dtype=dtype), view)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="guards a page with mprotect")
def test_nothing_is_read_past_the_end():
    """Inputs that end where memory ends: reading one element too many is a crash (of the child)."""
    result = subprocess.run([sys.executable, "-c", GUARDED], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"exit {result.returncode}: {result.stderr[-2000:]}"


def test_errors_name_the_argument():
    ones = torch.ones(3, 4)
    for call in (
        lambda: gemm_nt(ones, torch.ones(3, 5)),
        lambda: gemm_nt(ones, ones.bfloat16()),
        lambda: gemm_nt(ones.double(), ones.double()),
        lambda: gemm_nt(ones, ones, torch.ones(3, 4)),
        lambda: gemm_nt(ones.t(), ones.t(), how=DIRECT),
    ):
        with pytest.raises(RuntimeError, match=r"gemm_nt|fastkd"):
            call()


def test_opcheck_and_compile():
    a, b = randn(33, 7, seed=1, dtype=torch.bfloat16), randn(5, 7, seed=2, dtype=torch.bfloat16)
    start = randn(33, 5, seed=3, dtype=torch.float32)
    torch.library.opcheck(torch.ops.fastkd.gemm_nt.default, (a, b))
    torch.library.opcheck(torch.ops.fastkd.gemm_nt.default, (a, b, start, 0.5, 0))
    torch._dynamo.reset()
    frames = CompileCounter()
    compiled = torch.compile(lambda x, y: gemm_nt(x, y) * 2, fullgraph=True, dynamic=True, backend=frames)
    for rows in (33, 17, 4):
        part = a[:rows].clone()
        assert torch.equal(compiled(part, b), gemm_nt(part, b) * 2)
    assert frames.frame_count == 1
    inductor = torch.compile(lambda x, y: gemm_nt(x, y) * 2, fullgraph=True)
    assert torch.equal(inductor(a, b), gemm_nt(a, b) * 2)


@pytest.mark.skipif("FASTKD_MAX_ISA" in os.environ, reason="this is the run on a lower instruction set")
@pytest.mark.parametrize("ceiling", [pytest.param("plain", marks=pytest.mark.long), "avx2"])
def test_on_a_lower_instruction_set(ceiling):
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", "not compile"]
    # Passive: a parent and a child whose threads both spin at their barriers are ten times slower on two cores.
    environment = {**os.environ, "FASTKD_MAX_ISA": ceiling, "OMP_WAIT_POLICY": "PASSIVE"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]


def test_instruction_set_units_export_no_weak_symbol():
    nm, objects = shutil.which("nm"), sorted((ROOT / "build").glob("temp*/**/*_isa.*.o"))
    if nm is None or not objects:
        pytest.skip("needs nm and the build folder")
    assert any(x.name.startswith("gemm_isa") for x in objects)
    for unit in objects:
        symbols = subprocess.run([nm, unit], capture_output=True, text=True, check=True).stdout.splitlines()
        weak = [line for line in symbols if line.split()[-2] in "VvWw"]
        assert not weak, f"{unit.name}: the linker may take these from another instruction set: {weak}"
