"""Small statistics of weights and results."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def gap_recovered(uniform: float, selected: float, oracle: float) -> float:
    """Share of the gap in held-out loss between uniform mixing and the clean-only oracle that a method wins back.

    1 means as good as the oracle, 0 as uniform mixing; NaN if the oracle is not better than uniform mixing (there is
    nothing to win).
    """
    gap = uniform - oracle
    return (uniform - selected) / gap if gap > 0 else float("nan")


def weight_quantiles(weights: Tensor, probabilities: tuple[float, ...] = (0.05, 0.25, 0.5, 0.75, 0.95)) -> Tensor:
    """Quantiles of weights `[N]`, `[len(probabilities)]` float32, without NaN entries."""
    weights = weights[~torch.isnan(weights)].float()
    return torch.quantile(weights, torch.tensor(probabilities, device=weights.device))


def evenly_spaced(count: int, limit: int) -> Tensor:
    """At most `limit` indices spread evenly over `range(count)`, int64: a fixed sample for statistics of O(limit)
    cost.
    """
    return torch.linspace(0, count - 1, min(count, limit), dtype=torch.float64).round().long()


def auc_standard_error(auc: float, positives: int, negatives: int) -> float:
    """Standard error of an area under the ROC curve, from as many scores of either class (Hanley and McNeil, 1982).

    Raises:
        ValueError: if a class is empty.
    """
    if positives < 1 or negatives < 1:
        raise ValueError(f"Both classes need scores, got {positives} and {negatives}.")
    first, second = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    variance = auc * (1 - auc) + (positives - 1) * (first - auc**2) + (negatives - 1) * (second - auc**2)
    return math.sqrt(max(0.0, variance) / (positives * negatives))
