"""What the numbers depend on: device, versions, commit, and whether anybody else was computing meanwhile."""

import datetime
import importlib.util
import os
import pathlib
import platform
import re
import shlex
import subprocess
import sys
import time
from importlib import metadata

import psutil
import torch
from torch.utils import cpp_extension

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESTARTED = "FASTKD_BENCH_RESTARTED"
FOREIGN_CORES = 0.1  # more than this, averaged over the measurement, is a busy machine
OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "Cannot allocate memory")


def passive_threads(argv: list[str], environ=os.environ, execute=os.execve) -> None:
    """Waiting OpenMP threads must sleep, not spin; libgomp reads that once, so the process starts again."""
    if environ.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE":
        return
    if environ.get(RESTARTED):  # a launcher that strips the variable must not send us round in circles
        return
    environment = {**environ, "OMP_WAIT_POLICY": "PASSIVE", RESTARTED: "1"}
    execute(sys.executable, [sys.executable, *argv], environment)


def quote_library_path() -> None:
    """torch.compile where the path of torch has a space: its linker's -L is not quoted (PyTorch 191010)."""
    cpp_extension.TORCH_LIB_PATH = shlex.quote(os.path.join(os.path.dirname(torch.__file__), "lib"))


def slug(text: str) -> str:
    """A folder name: lower case, words joined by hyphens, no trademark signs."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", text.lower())).strip("-")


def device_name(device) -> str:
    if device.type == "cuda":
        return slug(torch.cuda.get_device_name(device))
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.*)$", cpuinfo.read_text() if cpuinfo.exists() else "", re.M | re.I)
    name = found[1] if found else platform.processor() or platform.machine()
    return slug(f"{name} {torch.get_num_threads()} threads")


def output_of(*command: str) -> str:
    """What a program prints; empty where it is not there, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def is_checkout() -> bool:
    """Whether we are a repository of our own. Installed inside somebody's project, git would answer for theirs."""
    top = output_of("git", "-C", str(ROOT), "rev-parse", "--show-toplevel")
    return bool(top) and pathlib.Path(top).resolve() == ROOT.resolve()


def git(*arguments: str) -> str:
    return output_of("git", "-C", str(ROOT), *arguments) if is_checkout() else ""


def facts(device) -> dict:
    """The columns that are the same for every row of a run."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "driver": driver(device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "triton": metadata.version("triton") if importlib.util.find_spec("triton") else "",
        "python": platform.python_version(),
        "commit": git("rev-parse", "--short=12", "HEAD") or "unknown",
        "dirty": bool(git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results")),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def query_gpu(device, fields: str) -> str:
    """One line of nvidia-smi about this device. It is named by its UUID: CUDA_VISIBLE_DEVICES gives torch other numbers."""
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    index = f"GPU-{uuid}" if uuid else str(device.index or 0)
    return output_of("nvidia-smi", "-i", index, f"--query-gpu={fields}", "--format=csv,noheader,nounits")


def driver(device) -> str:
    """Driver and clocks of a GPU as they are now, so ask when it has just worked; no setting is touched."""
    return query_gpu(device, "driver_version,clocks.sm,clocks.mem") if device.type == "cuda" else ""


def available_bytes(device) -> int:
    """Free memory where the case would live."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def too_large(case, available: int) -> str:
    """Why a case is left out here: its inputs in float64 and what a reference makes of them would not fit. Of an oracle in
    pieces the inputs and their gradients remain."""
    needed = (3 if case.oracle else 6) * case.bytes.of("forward") * 8 / case.dtype.itemsize
    if needed <= available:
        return ""
    return f"left out: it needs about {needed / 2**30:.0f} GiB with its float64 check, {available / 2**30:.0f} are free"


def ran_out(error: BaseException) -> bool:
    """Whether an exception says that there was no memory left."""
    return isinstance(error, MemoryError) or any(text in str(error) for text in OUT_OF_MEMORY)


class LoadMeter:
    """Cores that others kept busy between its making and `stop`: what the machine did, less what we did, by the second."""

    def __init__(self):
        self.begin = self.read()

    def read(self) -> tuple[float, float]:
        """CPU seconds of others, over all cores, stolen ones included; and the time."""
        all_cores, own = psutil.cpu_times(), sum(psutil.Process().cpu_times()[:4])  # our ended children's too
        fields = ("user", "nice", "system", "irq", "softirq", "steal")
        return sum(getattr(all_cores, name, 0.0) for name in fields) - own, time.perf_counter()

    def stop(self) -> float:
        others, seconds = (b - a for a, b in zip(self.begin, self.read(), strict=True))
        return max(0.0, others / seconds)


def load_before(seconds: float = 1.0) -> float:
    meter = LoadMeter()
    time.sleep(seconds)
    return meter.stop()


def busy_reason(foreign: float, when: str, device=None) -> str:
    """Empty where the machine was ours, or the work a GPU's, else the sentence that refuses to publish."""
    limit = FOREIGN_CORES
    if foreign > limit and (device is None or device.type == "cpu"):
        return f"other processes used {foreign:.2f} cores {when} (limit {limit:g}): the machine is busy"
    return ""


def is_busy(device, force: bool) -> bool:
    """Whether others compute here, so that nothing is measured, unless by `force`; it is said in any case. Beside a GPU they
    may: `foreign_cores` records it."""
    reason = gpu_busy_reason(device) if device.type == "cuda" else busy_reason(load_before(), "before the run")
    if reason:
        print(f"{reason}. " + ("Measuring anyway (--force); nothing is published." if force else
              "Wait, or pass --force to see numbers that are not published."))  # fmt: skip
    return bool(reason) and not force


def gpu_busy_reason(device=None, limit: int = 10) -> str:
    """A GPU (the current one, unless it is named) that computes before we start is somebody else's."""
    answer = query_gpu(device or torch.device("cuda"), "utilization.gpu")
    if answer.isdigit() and int(answer) > limit:
        return f"the GPU was {answer} % busy before the run"
    return ""
