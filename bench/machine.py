"""What the numbers depend on: device, versions, commit, and whether anybody else was computing meanwhile."""

import contextlib
import datetime
import os
import pathlib
import platform
import re
import shlex
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESTARTED = "FASTKD_BENCH_RESTARTED"
FOREIGN_CORES = 0.1  # more than this, averaged over the measurement, is a busy machine


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
    import torch
    from torch.utils import cpp_extension

    cpp_extension.TORCH_LIB_PATH = shlex.quote(os.path.join(os.path.dirname(torch.__file__), "lib"))


def cpu_name(path: str = "/proc/cpuinfo") -> str:
    try:
        with open(path) as handle:
            for line in handle:
                if line.lower().startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def slug(text: str) -> str:
    """A folder name: lower case, words joined by hyphens, no trademark signs."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", text.lower())).strip("-")


def device_name(device) -> str:
    import torch

    if device.type == "cuda":
        return slug(torch.cuda.get_device_name(device))
    return slug(f"{cpu_name()} {torch.get_num_threads()} threads")


def version_of(package: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def device_of(text: str, kinds: tuple[str, ...] = (), here: bool = True):
    """The device of that name, one of `kinds` where they are given; `here`: it must be usable, not only a name."""
    import torch

    try:
        device = torch.device(text)
        if here:
            torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # each build of torch has its own way
        why = str(error).strip().splitlines()[0]
        raise ValueError(f"device: {text!r} cannot be used here: {why}; name cpu, cuda or cuda:N") from error
    if kinds and device.type not in kinds:
        raise ValueError(f"device: expected {' or '.join(kinds)}, got {text!r}")
    return device


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
    import torch

    dirty = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results")
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "driver": driver(device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "triton": version_of("triton"),
        "python": platform.python_version(),
        "commit": git("rev-parse", "--short=12", "HEAD") or "unknown",
        "dirty": bool(dirty),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def query_gpu(device, fields: str) -> str:
    """One line of nvidia-smi about this device. It is named by its UUID: CUDA_VISIBLE_DEVICES gives torch other numbers."""
    import torch

    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    index = f"GPU-{uuid}" if uuid else str(device.index or 0)
    return output_of("nvidia-smi", "-i", index, f"--query-gpu={fields}", "--format=csv,noheader,nounits")


def driver(device) -> str:
    """Driver and clocks of a GPU as they are now, so ask when it has just worked; no setting is touched."""
    return query_gpu(device, "driver_version,clocks.sm,clocks.mem") if device.type == "cuda" else ""


def available_bytes(device) -> int | None:
    """Free memory where the case would live; None where the system does not say."""
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as handle:
            fields = dict(line.split(":", 1) for line in handle)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def too_large(case, available: int | None) -> str:
    """Why a case is left out here: its inputs in float64 and what a reference makes of them would not fit. Of an oracle in
    pieces the inputs and their gradients remain."""
    copies = 3.0 if case.oracle else 6.0
    needed = copies * case.bytes.of("forward") * 8 / case.dtype.itemsize
    if available is None or needed <= available:
        return ""
    return f"left out: it needs about {needed / 2**30:.0f} GiB with its float64 check, {available / 2**30:.0f} are free"


@contextlib.contextmanager
def memory_limit(gib: float | None):
    """Within it, a CPU allocation that would take the process `gib` beyond what it has now fails; nothing without one."""
    if not gib:
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as handle:
        now = int(handle.readline().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + int(gib * 2**30), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def ran_out(error: BaseException) -> bool:
    """Whether an exception says that there was no memory left."""
    return isinstance(error, MemoryError) or any(
        words in str(error) for words in ("can't allocate memory", "out of memory", "Cannot allocate memory")
    )


# Load -------------------------------------------------------------------------------------------------------------


def busy_seconds(path: str = "/proc/stat") -> float:
    """CPU seconds that were not idle, over all cores, stolen ones included."""
    with open(path) as handle:
        fields = [int(field) for field in handle.readline().split()[1:9]]
    user, nice, system, _idle, _wait, interrupts, soft, steal = fields
    return (user + nice + system + interrupts + soft + steal) / os.sysconf("SC_CLK_TCK")


def own_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def foreign_share(busy: float, own: float, wall: float) -> float:
    """Cores that others kept busy: what the machine did, less what we did, per second of wall time."""
    return max(0.0, (busy - own) / wall) if wall > 0 else 0.0


class LoadMeter:
    """Cores used by others between `start` and `stop`; None where the system does not tell."""

    def __init__(self, busy=busy_seconds, own=own_seconds, clock=time.perf_counter):
        self.busy, self.own, self.clock = busy, own, clock
        self.start()

    def read(self):
        try:
            return self.busy(), self.own(), self.clock()
        except (OSError, ValueError):
            return None

    def start(self) -> None:
        self.begin = self.read()

    def stop(self) -> float | None:
        now = self.read()
        if now is None or self.begin is None:
            return None
        return foreign_share(*(b - a for a, b in zip(self.begin, now, strict=True)))


def load_before(seconds: float = 1.0, meter_type=LoadMeter, sleep=time.sleep) -> float | None:
    meter = meter_type()
    sleep(seconds)
    return meter.stop()


def busy_reason(foreign: float | None, when: str, limit: float = FOREIGN_CORES) -> str:
    """Empty where the machine was ours, else the sentence that refuses to publish."""
    if foreign is None:
        return f"the load {when} is unknown (no /proc/stat), so nothing is published"
    if foreign > limit:
        return f"other processes used {foreign:.2f} cores {when} (limit {limit:g}): the machine is busy"
    return ""


def gpu_busy_reason(device=None, limit: int = 10) -> str:
    """A GPU (the current one, unless it is named) that computes before we start is somebody else's."""
    import torch

    answer = query_gpu(device or torch.device("cuda"), "utilization.gpu")
    if answer.isdigit() and int(answer) > limit:
        return f"the GPU was {answer} % busy before the run"
    return ""
