"""Rates, means, paired differences and win rates with intervals: pure functions on numbers, no model in here."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TypedDict, Unpack

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

# Values drawn at a time by the resampling methods: bounds their memory to about 8 MB each.
_BATCH_VALUES = 1_000_000

Bounds = tuple[float, float]
# Verdicts of a judge on a pair.
FIRST, SECOND, UNDECIDED = 0, 1, -1


class Resampling(TypedDict, total=False):
    """How intervals are made: `confidence` in (0, 1), .95 by default; `seed`, 0; `resamples`, 9,999."""

    confidence: float
    seed: int
    resamples: int


@dataclass(frozen=True)
class Estimate:
    """A figure, the ends of its interval, the rows `n` it is made from, and how the interval is made."""

    value: float
    low: float
    high: float
    n: int
    method: str
    confidence: float


@dataclass(frozen=True)
class Difference(Estimate):
    """A mean difference between two measurements of the same rows.

    `p_value` is two-sided, of the hypothesis that it makes no difference which of the two measured a row.
    """

    p_value: float


def rate(successes: int, n: int, *, confidence: float = 0.95) -> Estimate:
    """A share of `n` rows, at least one, with its Wilson interval.

    Raises:
        ValueError: if there is no row, `successes` is not in `0..n`, or `confidence` not in (0, 1).
    """
    if n < 1:
        raise ValueError("A rate needs at least one row, got n = 0.")
    if not 0 <= successes <= n:
        raise ValueError(f"`successes` must be between 0 and n = {n}, got {successes}.")
    interval = stats.binomtest(int(successes), int(n)).proportion_ci(_checked(confidence), method="wilson")
    return Estimate(successes / n, float(interval.low), float(interval.high), n, "Wilson", confidence)


def mean(values: ArrayLike, *, bounds: Bounds | None = None, **resampling: Unpack[Resampling]) -> Estimate:
    """A mean with its bootstrap interval.

    Args:
        values (array `[n]`): one per row; finite, else a `ValueError`.
        bounds (`tuple`, *optional*): least and largest possible value. Rows that are all equal tell a bootstrap
            nothing of others; with bounds, the interval then allows for as many as Wilson's of 0 in `n` does.
        resampling: `confidence`, `seed`, `resamples`, see `Resampling`.
    """
    (rows,) = _columns(values=values)
    found = ratio(rows, np.ones_like(rows), **resampling)
    if bounds is None or np.ptp(rows) > 0:
        return found
    unseen, value = rate(0, found.n, confidence=found.confidence).high, found.value
    return replace(found, low=value - unseen * (value - bounds[0]), high=value + unseen * (bounds[1] - value))


def ratio(numerators: ArrayLike, denominators: ArrayLike, **resampling: Unpack[Resampling]) -> Estimate:
    """The ratio of two sums over the same rows, such as summed loss by tokens, with its bootstrap interval.

    Args:
        numerators, denominators (array `[n]`): one of each per row, finite, denominators above 0; a `ValueError` if
            they are not, or if the lengths differ.
        resampling: `confidence`, `seed`, `resamples`, see `Resampling`.
    """
    top, bottom = _columns(numerators=numerators, denominators=denominators)
    confidence = _checked(resampling.get("confidence", 0.95))
    value = float(top.sum() / bottom.sum())
    if np.ptp(top / bottom) == 0:
        # The bootstrap of rows that are all equal has no width, that of a single one does not exist.
        low = high = value if len(top) > 1 else float("nan")
    else:
        low, high = stats.bootstrap(
            (top, bottom),
            lambda x, y, axis: x.sum(axis) / y.sum(axis),
            paired=True,
            vectorized=True,
            n_resamples=resampling.get("resamples", 9_999),
            batch=max(1, _BATCH_VALUES // len(top)),
            confidence_level=confidence,
            random_state=np.random.default_rng(resampling.get("seed", 0)),
        ).confidence_interval
    return Estimate(value, float(low), float(high), len(top), "bootstrap over rows (BCa)", confidence)


def paired_difference(
    first: ArrayLike, second: ArrayLike, *, bounds: Bounds | None = None, **resampling: Unpack[Resampling]
) -> Difference:
    """Mean of `first - second` over rows that both measure, with a bootstrap interval and a permutation test.

    Args:
        first, second (array `[n]`): a finite value per row each, in the same order of rows; a `ValueError` if the
            lengths differ.
        bounds (`tuple`, *optional*): least and largest possible difference, `(-1, 1)` for rates, as in `mean`.
        resampling: see `Resampling`; the test is exact where there are no more than `resamples` ways to swap.
    """
    left, right = _columns(first=first, second=second)
    found = mean(left - right, bounds=bounds, **resampling)
    # Rows without a difference are the same either way. Leaving them out keeps the test exact more often.
    changes = (left - right)[left != right]
    # A single one is as large with either sign.
    p_value = 1.0
    if len(changes) > 1:
        test = stats.permutation_test(
            (changes,),
            lambda x, axis: x.mean(axis),
            permutation_type="samples",
            vectorized=True,
            n_resamples=resampling.get("resamples", 9_999),
            batch=max(1, _BATCH_VALUES // len(changes)),
            random_state=np.random.default_rng(resampling.get("seed", 0)),
        )
        p_value = float(test.pvalue)
    return Difference(**asdict(found), p_value=p_value)


@dataclass(frozen=True)
class WinRate:
    """Outcome of a comparison in which the judge saw every pair in both orders; shares of rows, unless said."""

    # Mean of `scores`: 1 if both orders chose the model, 0.5 if they disagree or are both undecided, 0.75 or 0.25 if
    # one of them is undecided.
    win_rate: Estimate
    wins: Estimate
    ties: Estimate
    losses: Estimate
    # Both orders chose the same response, or both none.
    consistent: Estimate
    # Share of the decided verdicts that chose the position shown first; 0.5 without bias. The interval takes verdicts
    # for independent. None if none was decided.
    first_position: Estimate | None
    scores: list[float]


def win_rate_with_swap(forward: Sequence[int], backward: Sequence[int], **resampling: Unpack[Resampling]) -> WinRate:
    """Win rate of a model from verdicts in both orders; a judge that always picks the same position gives 0.5.

    Args:
        forward, backward (`list[int]` `[n]`): 0 the first, 1 the second, -1 undecided; with the model's response
            first, and with the baseline's; a `ValueError` if a verdict is none of the three, or the lengths differ.
        resampling: `confidence`, `seed`, `resamples` of the intervals, see `Resampling`.
    """
    if len(forward) != len(backward) or not forward:
        raise ValueError(f"Both orders need a verdict for each row, got {len(forward)} and {len(backward)}.")
    unknown = {*forward, *backward} - {FIRST, SECOND, UNDECIDED}
    if unknown:
        raise ValueError(f"Verdicts must be 0 (first), 1 (second) or -1 (undecided), got {sorted(unknown)}.")
    credit = {FIRST: 1.0, SECOND: 0.0, UNDECIDED: 0.5}
    pairs = [(credit[a], 1 - credit[b]) for a, b in zip(forward, backward, strict=True)]
    scores = [sum(pair) / 2 for pair in pairs]
    decided = [verdict for verdict in (*forward, *backward) if verdict != UNDECIDED]

    def share(found: Sequence[bool]) -> Estimate:
        return rate(sum(found), len(found), confidence=resampling.get("confidence", 0.95))

    return WinRate(
        win_rate=mean(scores, bounds=(0, 1), **resampling),
        wins=share([score > 0.5 for score in scores]),
        ties=share([score == 0.5 for score in scores]),
        losses=share([score < 0.5 for score in scores]),
        consistent=share([a == b for a, b in pairs]),
        first_position=share([verdict == FIRST for verdict in decided]) if decided else None,
        scores=scores,
    )


def _columns(**values: ArrayLike) -> list[NDArray[np.float64]]:
    """The values as arrays `[n]`, checked, by the names of the arguments."""
    columns = [np.asarray(column, dtype=np.float64) for column in values.values()]
    for name, column in zip(values, columns, strict=True):
        if column.ndim != 1 or len(column) == 0:
            raise ValueError(f"`{name}` must be a list of at least one number, got shape {list(column.shape)}.")
        strange = int((~np.isfinite(column)).sum())
        if strange:
            raise ValueError(f"`{name}` has {strange} values that are not finite: leave those rows out.")
    lengths = [len(column) for column in columns]
    if len({*lengths}) > 1:
        raise ValueError(f"A paired comparison needs the same rows on both sides, got {lengths[0]} and {lengths[1]}.")
    return columns


def _checked(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` must be between 0 and 1, got {confidence}.")
    return confidence
