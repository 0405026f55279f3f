"""Small statistics of weights and results, with numpy alone: a report loads no torch.

Weights may be arrays, lists, or tensors on the CPU; NaN stands for a row that is not trained on, and is left out.
"""

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray


def effective_sample_size(weights: ArrayLike) -> float:
    """`(sum w)^2 / (n sum w^2)` of weights `[n]`: 1 if all are equal, `1/n` of a single one, 0 without any weight."""
    live = _live(weights)
    squares = float((live**2).sum())
    return float(live.sum()) ** 2 / (len(live) * squares) if squares > 0 else 0.0


def rows_carrying(weights: ArrayLike, share: float = 0.8) -> int:
    """The least number of rows that hold `share` of the weight `[N]`; 0 without any weight."""
    held = np.cumsum(np.sort(_live(weights))[::-1])
    if not len(held) or held[-1] <= 0:
        return 0
    return int(np.searchsorted(held, share * held[-1] * (1 - 1e-9)) + 1)


def data_ranks(weights: ArrayLike) -> NDArray[np.int64]:
    """Rank of each weight, int64 `[N]`: 0 is the highest; ties in row order; NaN last."""
    order = np.argsort(-np.asarray(weights, dtype=np.float64), kind="stable")
    return np.argsort(order)


def evenly_spaced(count: int, limit: int) -> NDArray[np.int64]:
    """At most `limit` indices spread evenly over `range(count)`, int64, both ends included."""
    return np.linspace(0, count - 1, min(count, limit)).round().astype(np.int64)


def paired_standard_error(first: ArrayLike, second: ArrayLike) -> float | None:
    """Standard error of the mean of `first - second`, `[n]` each; None if lengths differ, or below two rows."""
    left, right = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if len(left) != len(right) or len(left) < 2:
        return None
    return float((left - right).std(ddof=1)) / math.sqrt(len(left))


def gap_recovered(uniform: float, selected: float, oracle: float) -> float:
    """Share of the gap in held-out loss between uniform mixing and the clean-only oracle that a method wins back.

    1 means as good as the oracle, 0 as uniform mixing; NaN if the oracle is not better than uniform mixing (there is
    nothing to win).
    """
    gap = uniform - oracle
    return (uniform - selected) / gap if gap > 0 else float("nan")


def auc_standard_error(auc: float, positives: int, negatives: int) -> float:
    """Standard error of an area under the ROC curve, from as many scores of either class (Hanley and McNeil, 1982)."""
    if positives < 1 or negatives < 1:
        raise ValueError(f"Both classes need scores, got {positives} and {negatives}.")
    first, second = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    variance = auc * (1 - auc) + (positives - 1) * (first - auc**2) + (negatives - 1) * (second - auc**2)
    return math.sqrt(max(0.0, variance) / (positives * negatives))


def _live(weights: ArrayLike) -> NDArray[np.float64]:
    values = np.asarray(weights, dtype=np.float64)
    return values[~np.isnan(values)]
