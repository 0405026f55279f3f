"""Rates, means and paired differences with intervals: pure functions on numbers, no model in here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

WILSON = "Wilson"
BOOTSTRAP = "bootstrap over rows (BCa)"
RESAMPLES = 9_999
# Values drawn at a time by the resampling methods: bounds their memory to about 8 MB each.
_BATCH_VALUES = 1_000_000

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A figure and its interval.

    Attributes:
        value (`float`): the figure.
        low, high (`float`): ends of the interval.
        n (`int`): rows it is made from.
        method (`str`): of the interval.
        confidence (`float`): of the interval.
    """

    value: float
    low: float
    high: float
    n: int
    method: str
    confidence: float


@dataclass(frozen=True)
class Difference(Estimate):
    """A mean difference between two measurements of the same rows.

    Attributes:
        p_value (`float`): two-sided, of the hypothesis that it makes no difference which of the two measured a row.
    """

    p_value: float


def rate(successes: int, n: int, *, confidence: float = 0.95) -> Estimate:
    """A share with its Wilson interval.

    Args:
        successes (`int`): in `0..n`.
        n (`int`): at least 1.
        confidence (`float`): in (0, 1).

    Raises:
        ValueError: if there is no row, or the counts make no share.
    """
    if n < 1:
        raise ValueError("A rate needs at least one row, got n = 0.")
    if not 0 <= successes <= n:
        raise ValueError(f"`successes` must be between 0 and n = {n}, got {successes}.")
    interval = stats.binomtest(int(successes), int(n)).proportion_ci(_checked(confidence), method="wilson")
    return Estimate(successes / n, float(interval.low), float(interval.high), n, WILSON, confidence)


def mean(
    values: ArrayLike,
    *,
    bounds: tuple[float, float] | None = None,
    confidence: float = 0.95,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Estimate:
    """A mean with its bootstrap interval.

    Args:
        values (array `[n]`): one per row.
        bounds (`tuple` of `float`, *optional*): least and largest possible value, e.g. `(0, 1)`. Rows that all have
            the same value tell a bootstrap nothing about rows of other values; with bounds, the interval then allows
            for as many of them as Wilson's interval of 0 in `n` does.
        confidence (`float`), seed (`int`), resamples (`int`): of the interval.

    Raises:
        ValueError: if there is no value, or one is not finite.
    """
    rows = _rows(values, "values")
    low, high = _interval((rows,), rows, lambda x, axis: x.mean(axis), confidence, seed, resamples)
    if bounds is not None and np.ptp(rows) == 0:
        unseen = rate(0, len(rows), confidence=confidence).high
        low, high = rows[0] - unseen * (rows[0] - bounds[0]), rows[0] + unseen * (bounds[1] - rows[0])
    return Estimate(float(rows.mean()), float(low), float(high), len(rows), BOOTSTRAP, confidence)


def ratio(
    numerators: ArrayLike,
    denominators: ArrayLike,
    *,
    confidence: float = 0.95,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Estimate:
    """The ratio of two sums over the same rows, such as summed loss by tokens, with its bootstrap interval.

    Args:
        numerators, denominators (array `[n]`): one of each per row; denominators above 0.
        confidence (`float`), seed (`int`), resamples (`int`): of the interval.

    Raises:
        ValueError: if the lengths differ, there is no row, or a value is not finite.
    """
    top, bottom = _rows(numerators, "numerators"), _rows(denominators, "denominators")
    _check_paired(top, bottom)

    def divided(a: Floats, b: Floats, axis: int) -> Floats:
        return a.sum(axis) / b.sum(axis)

    low, high = _interval((top, bottom), top / bottom, divided, confidence, seed, resamples)
    return Estimate(float(top.sum() / bottom.sum()), low, high, len(top), BOOTSTRAP, confidence)


def paired_difference(
    first: ArrayLike,
    second: ArrayLike,
    *,
    bounds: tuple[float, float] | None = None,
    confidence: float = 0.95,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Difference:
    """Mean of `first - second` over rows that both measure, with a bootstrap interval and a permutation test.

    Args:
        first, second (array `[n]`): a value per row each, in the same order of rows.
        bounds (`tuple` of `float`, *optional*): least and largest possible difference, `(-1, 1)` for rates, as
            in `mean`.
        confidence (`float`), seed (`int`), resamples (`int`): of interval and test; the test is exact where there are
            no more than `resamples` ways to swap.

    Raises:
        ValueError: if the lengths differ, there is no row, or a value is not finite.
    """
    left, right = _rows(first, "first"), _rows(second, "second")
    _check_paired(left, right)
    found = mean(left - right, bounds=bounds, confidence=confidence, seed=seed, resamples=resamples)
    # Rows without a difference are the same either way. Leaving them out keeps the test exact more often.
    differing = left != right
    count = int(differing.sum())
    # A single one is as large with either sign.
    p_value = 1.0
    if count > 1:
        test = stats.permutation_test(
            (left[differing], right[differing]),
            lambda x, y, axis: (x - y).mean(axis),
            permutation_type="samples",
            vectorized=True,
            n_resamples=resamples,
            batch=max(1, _BATCH_VALUES // count),
            random_state=np.random.default_rng(seed),
        )
        p_value = float(test.pvalue)
    return Difference(found.value, found.low, found.high, found.n, found.method, confidence, p_value)


def _interval(
    samples: tuple[Floats, ...],
    rows: Floats,
    statistic: Callable[..., Any],
    confidence: float,
    seed: int,
    resamples: int,
) -> tuple[float, float]:
    """Ends of the bootstrap interval; both at the value of rows that are all equal, of which a single one has none."""
    if np.ptp(rows) == 0:
        end = float(rows[0]) if len(rows) > 1 else float("nan")
        return end, end
    found = stats.bootstrap(
        samples,
        statistic,
        paired=True,
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, _BATCH_VALUES // len(samples[0])),
        confidence_level=_checked(confidence),
        random_state=np.random.default_rng(seed),
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def _rows(values: ArrayLike, name: str) -> Floats:
    rows = np.asarray(values, dtype=np.float64)
    if rows.ndim != 1 or len(rows) == 0:
        raise ValueError(f"`{name}` must be a list of at least one number, got shape {list(rows.shape)}.")
    if not np.isfinite(rows).all():
        raise ValueError(
            f"`{name}` has {int((~np.isfinite(rows)).sum())} values that are not finite: leave those rows out."
        )
    return rows


def _check_paired(first: Floats, second: Floats) -> None:
    if len(first) != len(second):
        raise ValueError(f"A paired comparison needs the same rows on both sides, got {len(first)} and {len(second)}.")


def _checked(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` must be between 0 and 1, got {confidence}.")
    return confidence
