"""`python -m fastkd.bench.evidence.vocab_parallel`: linear_divergence with its heads on two processes of one thread each.

Milliseconds of wall time and of CPU time, forward and backward, the medians of rounds in which these take turns:

    two processes    each has half of the vocabulary, and all rows
    half             a process's share: the same half by itself, without an exchange, in both processes at a time
    all / 2          half of the time of a process that has the whole vocabulary, in both processes at a time
"""

import argparse
import os
import statistics
import tempfile
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import fastkd

RANKS = 2
CASES = ("forward_kl", "jsd", "reverse_kl", "TopK")


def milliseconds(student, teacher, **how) -> list[float]:
    """(wall, CPU), from the moment when all ranks are ready; student: (hidden, head)."""
    hidden, head = (x.detach().requires_grad_() for x in student)
    dist.barrier()
    clocks = time.perf_counter, time.process_time
    begun = [clock() for clock in clocks]
    fastkd.linear_divergence(hidden, head, *teacher, **how).backward()
    return [1e3 * (clock() - begin) for clock, begin in zip(clocks, begun, strict=True)]


def measure(rank: int, folder: str, options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    generator, half = torch.Generator().manual_seed(0), options.vocabulary // RANKS
    sizes = (options.rows, options.dim), (RANKS * half, options.dim)
    normal = lambda size: torch.randn(size, generator=generator) * options.dim**-0.25  # noqa: E731
    student, teacher = ([normal(size).to(getattr(torch, options.dtype)) for size in sizes] for _ in range(2))
    log_p, ids = (teacher[0] @ teacher[1].t()).float().log_softmax(-1).topk(64, -1)
    own = slice(rank * half, (rank + 1) * half)
    mine = student[0], student[1][own]
    for case in CASES:
        how = {"kind": "forward_kl" if case == "TopK" else case, "temperature": 2.0}
        whole, of_half, share = teacher, (teacher[0], teacher[1][own]), (teacher[0], teacher[1][own])
        if case == "TopK":  # whole on every rank
            whole, of_half, share = ((fastkd.TopK(x, log_p, True),) for x in (ids, ids, ids % half))
        took = {"two processes": [], "half": [], "all / 2": []}
        for _ in range(options.rounds + 1):  # the first one warms up
            group = {"process_group": dist.group.WORLD, "backend": options.backend}
            took["two processes"].append(milliseconds(mine, of_half, **how, **group))
            took["half"].append(milliseconds(mine, share, **how))
            took["all / 2"].append([x / RANKS for x in milliseconds(student, whole, **how)])
        if rank == 0:
            found = [[statistics.median(x) for x in zip(*rows[1:], strict=True)] for rows in took.values()]
            times = (f"{wall:.0f} ({cpu:.0f})" for wall, cpu in found)
            ratios = (f"{found[0][0] / wall:.2f} ({found[0][1] / cpu:.2f})" for wall, cpu in found[1:])
            print(f"| {case} | {' | '.join((*times, *ratios))} |", flush=True)
    dist.barrier()
    os._exit(0)  # gloo's threads do not always survive an interpreter's shutdown


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name, default in (("rows", 256), ("vocabulary", 32000), ("dim", 512), ("rounds", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--backend", default="auto", help="of the two processes; reference is PyTorch")
    print(
        "| wall (CPU) | two processes | half | all / 2 | over half | over all / 2 |\n|---|---|---|---|---|---|",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(measure, (folder, parser.parse_args()), RANKS, start_method="spawn")
