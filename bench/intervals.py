"""How sure a number is: 95 % intervals of medians and of ratios, without assuming a distribution."""

import math
from collections.abc import Sequence

import torch

CONFIDENCE = 0.95
LEAST_SAMPLES = 6  # the whole range of five samples holds the median in 93.75 % of cases only


def quantile(samples: Sequence[float], share: float) -> float:
    """Linear interpolation between order statistics."""
    ordered = sorted(samples)
    position = share * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def rank(count: int, confidence: float = CONFIDENCE) -> int:
    """How many samples may be dropped at either end so that the rest still holds the median with this confidence: the
    number below the median is binomial with probability 1/2."""
    outside, dropped = 0.5**count, 0
    while True:
        outside += math.comb(count, dropped + 1) * 0.5**count
        if 2 * outside > 1 - confidence:
            return dropped
        dropped += 1


def median_interval(samples: Sequence[float]) -> tuple[float, float]:
    """Two order statistics; the whole range where the samples are too few for anything narrower."""
    ordered, dropped = sorted(samples), rank(len(samples))
    return ordered[dropped], ordered[-1 - dropped]


def ratio_interval(above: Sequence[float], below: Sequence[float], draws: int = 2000) -> tuple[float, float]:
    """Of the ratio of two medians whose samples came in pairs, one of each per round: whole rounds are drawn again
    (bootstrap, always the same draws), so that a slow moment of the machine, which hits both, cancels as it should."""
    generator = torch.Generator().manual_seed(0)
    rounds = torch.randint(len(above), (draws, len(above)), generator=generator)
    medians = [torch.tensor(x, dtype=torch.float64)[rounds].quantile(0.5, dim=-1) for x in (above, below)]
    ratios = (medians[0] / medians[1]).tolist()  # [draws]
    tail = (1 - CONFIDENCE) / 2
    return quantile(ratios, tail), quantile(ratios, 1 - tail)
