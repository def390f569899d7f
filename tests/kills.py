"""`python tests/kills.py 20`: `fastkd distill` killed with SIGKILL at so many random moments, and the same command given again
each time. No kill may leave a run that cannot go on, and the student must be the undisturbed run's, bit for bit.

This process imports everything and computes nothing; every run is a fork of it, which saves the time of the imports."""

import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_WAIT_POLICY": "PASSIVE"}

import torch
from test_distill_cli import flags, rows, save_pair

from fastkd.cli import main as command
from fastkd.train import checkpoints

KILLS_OF_ONE_RUN = 3


def forked(call) -> int:
    """The process that runs `call` and exits with what it returns."""
    process = os.fork()
    if process == 0:
        code = 70
        try:
            code = call()
        finally:
            sys.stdout.flush()
            os._exit(code)
    return process


def ended(process: int, after: float | None = None) -> int:
    """The exit code, negative for a signal; killed after so many seconds where it is not done before."""
    if after is not None:
        time.sleep(after)
        os.kill(process, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def prepare(folder: Path) -> int:
    save_pair(folder / "teacher", "bert", "classification", dropout=0.1)
    lines = ["text\tlabel", *(f"{text}\t{label}" for text, label, *_ in rows(80))]
    (folder / "train.tsv").write_text("\n".join(lines) + "\n")
    (folder / "valid.csv").write_text("\n".join(line.replace("\t", ",") for line in lines[:41]) + "\n")
    return 0


def start(folder: Path, name: str) -> int:
    options = {
        "output_dir": folder / name, "method": "bert_emd:beta=0.5 + kd", "max_steps": 24, "save_steps": 1, "eval_steps": 6,
        "learning_rate": 1e-3, "gradient_accumulation_steps": 2,
    }  # fmt: skip

    def run() -> int:
        log = os.open(folder / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        return command(["distill", *flags(folder, **options)])

    return forked(run)


def student(folder: Path, name: str) -> bytes:
    return (folder / name / "student" / "model.safetensors").read_bytes()


def main(kills: int, seed: int) -> int:
    torch.set_num_threads(1)
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent)
        assert ended(forked(lambda: prepare(folder))) == 0
        begin = time.monotonic()
        assert ended(start(folder, "undisturbed")) == 0, (folder / "undisturbed.log").read_text()
        whole, expected = time.monotonic() - begin, student(folder, "undisturbed")
        print(f"an undisturbed run takes {whole:.1f} s", flush=True)
        done, runs = 0, 0
        while done < kills:
            name, runs = f"run-{runs}", runs + 1
            for _ in range(min(KILLS_OF_ONE_RUN, kills - done)):
                code = ended(start(folder, name), draw.uniform(0, whole))
                found, skipped = checkpoints.newest(folder / name)
                left = [
                    path.name for path in sorted((folder / name).glob("*")) if not path.name.startswith("checkpoint")
                ]
                where = Path(found).name if found else "before the first checkpoint"
                print(f"kill {done + 1}: code {code}, {where}, beside it {', '.join(left)}", flush=True)
                assert not skipped, skipped
                done += code == -signal.SIGKILL
                if code != -signal.SIGKILL:  # it was done before
                    break
            code = ended(start(folder, name)) if code == -signal.SIGKILL else code
            log = (folder / f"{name}.log").read_text()
            assert code == 0 or "it is finished" in log, log
            assert student(folder, name) == expected, f"{name} has another student"
    print(f"{kills} kills, every run went on, and every student is the undisturbed run's")
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0))
