"""`python -m fastkd.bench.evidence.vocab_parallel`: linear_divergence with its heads on two processes of one thread each.

Milliseconds of forward and backward, the medians of rounds in which these take turns:

    two processes    each has half of the vocabulary, and all rows
    half             a process's share: the same half by itself, without an exchange, in both processes at a time
    all / 2          half of the time of one process that has the whole vocabulary, while the other one waits
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
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def milliseconds(backend: str, how: dict, student, teacher, group=None) -> float:
    """From the moment when all ranks are ready; student, teacher: (hidden, head)."""
    hidden, head = (x.detach().requires_grad_() for x in student)
    dist.barrier()
    begin = time.perf_counter()
    loss = fastkd.linear_divergence(hidden, head, *teacher, process_group=group, backend=backend, **how)
    loss.backward()
    return 1e3 * (time.perf_counter() - begin)


def measure(rank: int, folder: str, options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    generator, V = torch.Generator().manual_seed(0), options.vocabulary
    normal = lambda *size: torch.randn(size, generator=generator).mul(size[-1] ** -0.25).to(DTYPES[options.dtype])  # noqa: E731
    student, teacher = ((normal(options.rows, options.dim), normal(V, options.dim)) for _ in range(2))
    log_p, ids = (teacher[0] @ teacher[1].t()).float().log_softmax(-1).topk(64, -1)
    own, half = slice(rank * V // RANKS, (rank + 1) * V // RANKS), V // RANKS
    for case in CASES:
        sparse = case == "TopK"
        how = {"kind": "forward_kl" if sparse else case, "temperature": 2.0}
        of_all = (fastkd.TopK(ids, log_p, True),) if sparse else teacher
        of_half = (fastkd.TopK(ids % half, log_p, True),) if sparse else (teacher[0], teacher[1][own])
        sharded = of_all if sparse else of_half
        mine = student[0], student[1][own]
        times = {"two processes": [], "half": [], "all / 2": []}
        for _ in range(options.rounds + 1):  # the first one warms up
            times["two processes"].append(milliseconds(options.backend, how, mine, sharded, dist.group.WORLD))
            times["half"].append(milliseconds("auto", how, mine, of_half))
            dist.barrier()
            if rank == 0:
                begin = time.perf_counter()
                hidden, head = (x.detach().requires_grad_() for x in student)
                fastkd.linear_divergence(hidden, head, *of_all, **how).backward()
                times["all / 2"].append(1e3 * (time.perf_counter() - begin) / RANKS)
            dist.barrier()
        if rank == 0:
            took = {name: statistics.median(x[1:]) for name, x in times.items()}
            ratios = [took["two processes"] / took[name] for name in ("half", "all / 2")]
            print(
                f"| {case} | {' | '.join(f'{x:.0f}' for x in took.values())} | {' | '.join(f'{x:.2f}' for x in ratios)} |"
            )
    dist.barrier()
    os._exit(0)  # gloo's threads do not always survive an interpreter's shutdown


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name, default in (("rows", 256), ("vocabulary", 32000), ("dim", 512), ("rounds", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--backend", default="auto", help="of the two processes; reference is PyTorch")
    options = parser.parse_args()
    print(
        "| loss | two processes | half | all / 2 | two processes / half | two processes / (all / 2) |\n|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(measure, (folder, options), RANKS, start_method="spawn")
