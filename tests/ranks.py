"""Two gloo processes on this machine: what a loss does when its batch is spread over ranks."""

import os
import subprocess
import sys
import tempfile

import torch

PREAMBLE = """
import os, torch, torch.distributed as dist
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method={rendezvous!r}, rank={rank}, world_size=2)
rank, group = {rank}, dist.group.WORLD
"""
# Straight out, once both are done: gloo's threads, unlike the result, do not always survive an interpreter's shutdown.
LEAVE = "dist.barrier()\nos._exit(0)"


def on_two_ranks(script, seconds=120):
    """Run `script` (it sees rank and group, and leaves a `result`) in two processes; both results, within so many seconds."""
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(2):
            preamble = PREAMBLE.format(rendezvous=f"file://{folder}/rendezvous", rank=rank)
            save = f"torch.save(result, {f'{folder}/{rank}.pt'!r})"
            source = "\n".join([preamble, script, save, LEAVE])
            path = os.pathsep.join([*filter(None, sys.path), os.environ.get("PYTHONPATH", "")])
            process = subprocess.Popen(
                [sys.executable, "-c", source], env=os.environ | {"PYTHONPATH": path}, stderr=subprocess.PIPE, text=True
            )
            processes.append(process)
        try:
            errors = [process.communicate(timeout=seconds)[1] for process in processes]
        finally:
            for process in processes:
                process.kill()
        assert all(process.returncode == 0 for process in processes), "\n".join(errors)
        return [torch.load(f"{folder}/{rank}.pt") for rank in range(2)]
