"""contrast, around the loss: which rows of the bank are a query's negatives, and what the bank keeps of the query.

A file of its own beside contrast.py, which has the losses' maths: nothing here has a gradient.
Random numbers are a hash of (seed, step, example, draw), not a generator's stream: the same on every device, safe in a
captured graph, and saved by saving two integers.
"""

import torch
import torch.nn.functional as F


def sample_negatives(index, count, n_data, labels, order, bounds, state, replacement, window=0):
    """[B] ids -> [B, count] ids, uniform over the n_data ids of other labels (labels None: over the other ids).

    labels [n_data] are classes 0..C-1, order [n_data] the ids sorted by class, bounds [C+1] where each class starts in
    it; state is int64 [2]: seed, step. window > 0 (and labels None): over the 2 window ids nearest by, on both sides as
    far as the data set goes. A pool smaller than `count` is drawn from with replacement whatever was asked.
    """
    extent, base = n_data, torch.zeros_like(index)
    if labels is None:
        if window:
            extent = min(2 * window + 1, n_data)
            base = (index - window).clamp(0, n_data - extent)  # [B]
        start, size = index - base, torch.ones_like(index)
    else:
        own = labels[index]
        start, size = bounds[own], bounds[own + 1] - bounds[own]  # [B]
    rest, start, size = (extent - size)[:, None], start[:, None], size[:, None]  # [B, 1]
    words = _random_words(index, count, state)  # [B, count]
    drawn = words % rest.clamp_min(1)
    if not replacement:
        steps = torch.arange(count, device=index.device)
        shuffled = _first_of_shuffle(steps + words % (rest - steps).clamp_min(1))
        drawn = torch.where(rest < count, drawn, shuffled)
    drawn = base[:, None] + drawn + torch.where(drawn >= start, size, 0)  # skip the own class's block
    drawn = drawn.clamp_max(n_data - 1)
    return drawn if order is None else order[drawn]


def _first_of_shuffle(target):
    """What stands in places 0..K-1 after the K swaps (k, target_k >= k) of a Fisher-Yates shuffle, all K at once.

    Place k holds, when its turn comes, what the last earlier swap into it put there: the content of that swap's own
    place at its turn. These chains lead to ever smaller k, so doubling the pointers resolves them in log K rounds.
    """
    B, K = target.shape
    steps = torch.arange(K, device=target.device).expand(B, K)
    into = torch.where((target > steps) & (target < K), target, K)  # [B, K]; column K collects the rest
    content = torch.arange(K + 1, device=target.device).repeat(B, 1)
    content = content.scatter_reduce(1, into, steps, "amax", include_self=False)[:, :K]
    for _ in range(K.bit_length()):
        content = content.gather(1, content)
    place, order = target.sort(dim=1, stable=True)  # equal targets stand together, in order of their swaps
    repeated = F.pad(place[:, 1:] == place[:, :-1], (1, 0))
    taken = torch.where(repeated, content.gather(1, order.roll(1, 1)), place)
    return torch.empty_like(taken).scatter(1, order, taken)


def _random_words(index, count, state):
    """Uniform in [0, 2^63): splitmix64 streams, one per (seed, step, place in the batch, id)."""
    place = torch.arange(index.shape[0], device=index.device)
    stream = _mix(_mix(_mix(_mix(state[0]) + state[1]) + place) + index)  # [B]
    draw = torch.arange(1, count + 1, device=index.device) * -0x61C8864680B583EB
    return _mix(stream[:, None] + draw) & 0x7FFFFFFFFFFFFFFF


def _mix(x):
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ ((x >> shift) & ((1 << 64 - shift) - 1))) * factor  # int64 wraps; the mask makes the shift logical
    return x ^ ((x >> 31) & ((1 << 33) - 1))


@torch.no_grad()
def update_bank(bank, index, rows, momentum):
    """bank[index] = normalise(momentum · bank[index] + (1 - momentum) · rows), in place, no gradient.

    Of equal ids in a batch the last one counts, whatever the device: every copy writes that one's row. A row that came
    out not finite is not written: one overflow in half precision would otherwise stay in the bank for good.
    """
    dtype = torch.float64 if bank.dtype == torch.float64 else torch.float32
    ordered, order = index.sort(stable=True)
    last = order[torch.searchsorted(ordered, index, right=True) - 1]  # [B]
    old = bank[index].to(dtype)
    new = F.normalize(momentum * old + (1 - momentum) * rows.to(dtype)[last], dim=-1)
    new = torch.where(new.isfinite().all(-1, keepdim=True), new, old)
    bank.index_copy_(0, index, new.to(bank.dtype))
