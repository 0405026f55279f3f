"""Weights as visits: draw rows in proportion to their weights in place of multiplying their losses."""

import torch
from torch import Tensor


def systematic_resample(weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` indices (int64), index `i` about `count * weights[i] / sum(weights)` times, in random order.

    Systematic resampling: every index is drawn the floor or the ceiling of its expected number of times, in
    expectation exactly that often. Equal weights draw every index once when `count` is their number: an ordinary
    epoch.

    The expected gradient is that of the weighted loss, but no forward is spent on rows of weight near zero and the
    variance is far lower: the batch is full of rows that count.

    Raises:
        ValueError: if weights `[N]` are negative, not finite, or all zero.
    """
    weights = weights.double().cpu()
    total = weights.sum()
    if not bool(torch.isfinite(total)) or float(total) <= 0 or bool((weights < 0).any()):
        raise ValueError("Resampling needs finite weights of at least 0, and not all 0.")
    # A random order of the rows first: which of them share a stretch of the cumulative sum must not depend on theirs.
    shuffle = torch.randperm(len(weights), generator=generator)
    edges = torch.cumsum(weights[shuffle] * (count / total), 0)
    edges[-1] = count
    points = torch.arange(count, dtype=torch.float64) + torch.rand(1, generator=generator, dtype=torch.float64)
    drawn = torch.searchsorted(edges, points, right=True).clamp(max=len(weights) - 1)
    return shuffle[drawn][torch.randperm(count, generator=generator)]
