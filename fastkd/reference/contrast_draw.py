"""contrast's random numbers, and the shuffle made from them.

They are a hash of (seed, step, example, draw) instead of the stream of a generator: the same on every device, correct in a
captured graph, and saved by saving two integers.
"""

import torch
import torch.nn.functional as F


def first_of_shuffle(target):
    """The contents of places 0..K-1 after the K swaps (k, target_k >= k) of a Fisher-Yates shuffle, all K in parallel.

    At swap k, place k holds what the last earlier swap into it put there, which is the content of that swap's own place at
    its time. These chains lead to ever smaller k, so pointer doubling resolves them in log K rounds.
    """
    B, K = target.shape
    steps = torch.arange(K, device=target.device).expand(B, K)
    into = torch.where((target > steps) & (target < K), target, K)  # [B, K]; column K collects all other targets
    content = torch.arange(K + 1, device=target.device).repeat(B, 1)
    content = content.scatter_reduce(1, into, steps, "amax", include_self=False)[:, :K]
    for _ in range(K.bit_length()):
        content = content.gather(1, content)
    place, order = target.sort(dim=1, stable=True)  # equal targets are adjacent, in the order of their swaps
    repeated = F.pad(place[:, 1:] == place[:, :-1], (1, 0))
    taken = torch.where(repeated, content.gather(1, order.roll(1, 1)), place)
    return torch.empty_like(taken).scatter(1, order, taken)


def random_bits(index, count, state):
    """Uniform in [0, 2^63): splitmix64 streams, one per (seed, step, place in the batch, id)."""
    place = torch.arange(index.shape[0], device=index.device)
    stream = _mix(_mix(_mix(_mix(state[0]) + state[1]) + place) + index)  # [B]
    draw = torch.arange(1, count + 1, device=index.device) * -0x61C8864680B583EB
    return _mix(stream[:, None] + draw) & 0x7FFFFFFFFFFFFFFF


def _mix(x):
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ ((x >> shift) & ((1 << 64 - shift) - 1))) * factor  # int64 wraps; the mask makes the shift logical
    return x ^ ((x >> 31) & ((1 << 33) - 1))
