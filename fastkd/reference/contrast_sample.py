"""contrast: draws the negatives of each query. Nothing here has a gradient."""

import torch

from fastkd.reference.contrast_draw import first_of_shuffle, random_bits


def sample_negatives(index, count, n_data, labels, order, bounds, state, replacement, window=0):
    """[B] ids -> [B, count] ids, uniform over the n_data ids of other labels (labels None: over the other ids).

    labels [n_data] are classes 0..C-1, order [n_data] the ids sorted by class, bounds [C+1] where each class starts in
    it; state is int64 [2]: seed, step. window > 0 (and labels None): over the 2 window nearest ids of the data set. From
    a pool smaller than `count`, draws are with replacement always.
    """
    base, extent, start, size = (x[:, None] for x in _pool(index, n_data, labels, bounds, window))  # [B, 1]
    available, steps = extent - size, torch.arange(count, device=index.device)
    bits = random_bits(index, count, state)  # [B, count]
    drawn = bits % available.clamp_min(1)
    if not replacement:
        shuffled = first_of_shuffle(steps + bits % (available - steps).clamp_min(1))
        drawn = torch.where(available < count, drawn, shuffled)
    drawn = base + drawn + torch.where(drawn >= start, size, 0)  # skip the block of the example's own class
    drawn = drawn.clamp_max(n_data - 1)
    return drawn if order is None else order[drawn]


def _pool(index, n_data, labels, bounds, window):
    """[B] each: the pool is positions base .. base + extent - 1, without `size` of them from base + start on."""
    base, extent, one = torch.zeros_like(index), torch.full_like(index, n_data), torch.ones_like(index)
    if labels is not None:
        own = labels[index]
        return base, extent, bounds[own], bounds[own + 1] - bounds[own]
    if window:
        extent = extent.clamp_max(2 * window + 1)
        base = (index - window).clamp_min(0).minimum(n_data - extent)
    return base, extent, index - base, one
