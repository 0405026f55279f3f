"""From a ranking to weights: match the scores of the training rows to those of held-back validation rows.

A selector that only moves logits by scores ranks well long before its weights are any use: the step size has no
scale. Trusted rows that had no part in the training give it one. If `f_train` is the density of the scores of the
training rows and `f_good` that of trusted rows the models have not seen, then importance weights `w(g) = f_good(g) /
f_train(g)` make the weighted rows score like trusted ones. They are the posterior of being good, up to a constant:
uniform where the training rows score like trusted rows (nothing to select), and sharper the further apart the two
are. No step size, no threshold.
"""

import math
from typing import NamedTuple

import torch
from scipy.optimize import isotonic_regression
from torch import Tensor

from .selector import SCORE_RESOLUTION

# Resolution of the densities, in points over the range of scores.
GRID = 512
# Strength of the prior on the spread of trusted scores (half that of the training scores), in rows.
PRIOR_ROWS = 4.0
PRIOR_SPREAD = 0.5
# Share of the trusted rows that may score below the plateau of full weight.
PLATEAU = 0.25
# Trusted rows are of two kinds if their scores fall into groups this far apart (Ashman's D: distance of the means over
# the root of the mean variance). Of 8 normally distributed scores, one set in twenty does by chance; of 12, one in
# fifty; of 24, none. So it takes 12.
KINDS_APART = 5.0
LEAST_OF_KINDS = 12
# Least size of one kind, in trusted rows and as a share of them: a tenth of the trusted rows may be bad.
KIND_ROWS, KIND_SHARE = 3, 0.2
# Share of the training rows that must score below the lower kind by half its distance to the higher one: else there is
# nothing to select from, or these trusted rows are themselves bad.
BELOW_KIND = 0.1
# No row's weight falls below this share of the largest one: it keeps a trickle of signal, and the logits finite.
FLOOR = 1e-3


class Calibration(NamedTuple):
    """What trusted rows say of scores.

    Attributes:
        logits (`Tensor` float32 `[N]`): log weights, at most 0, 0 on the plateau. All zero if scores do not differ.
        good_share (`float`): share of the training rows that is good, at most: one over the density ratio on the
            plateau (more, and good rows would be likelier there than all rows together). Above 0, at most 1.
    """

    logits: Tensor
    good_share: float


def calibrate(scores: Tensor, trusted_scores: Tensor, trusted_weights: Tensor | None = None) -> Calibration:
    """Logits whose softmax weights make the training rows score like trusted rows.

    `f_train` is a kernel density estimate, `f_good` a Gaussian (few trusted rows: its spread is shrunk towards half
    of the training rows' and carries the error of its mean), and their ratio is made monotone in the score by isotonic
    regression: a better score never weighs less. The weight rises no further than the lower quartile of the trusted
    scores: the posterior of being good ends in a plateau where trusted rows begin to be common. What the ratio does
    beyond is the error of a few trusted rows, or another mix of kinds among them than among the good training rows
    (refusals gain more from validation than plain answers do); it would spend the visits on a part of the good rows.
    Where the scores of trusted rows fall into kinds that lie far apart, it is the lower quartile of the lowest kind
    that has bad rows below it: else a kind that is in the minority among the few held-back rows would lose its weight.

    Args:
        scores (`Tensor` float32 `[N]`): one per row, finite.
        trusted_scores (`Tensor` float32 `[c]`): of trusted rows that neither end of the difference was trained on.
        trusted_weights (`Tensor` float32 `[c]`, *optional*): how much each trusted row counts; equal by default.
    """
    if trusted_scores.numel() == 0:
        raise ValueError("Calibration needs at least one held-back validation row, got none.")
    if not bool(torch.isfinite(scores).all() and torch.isfinite(trusted_scores).all()):
        raise ValueError("Calibration needs finite scores; got NaN or infinite ones.")
    x, y = scores.double().cpu(), trusted_scores.double().cpu()
    x, y = winsorised(x, x), winsorised(y, x)
    mean, spread = x.mean(), x.std(unbiased=False)
    if float(spread) < SCORE_RESOLUTION:
        return Calibration(torch.zeros_like(scores), 1.0)
    x, y = (x - mean) / spread, (y - mean) / spread
    shares = _shares(y, trusted_weights)

    grid = torch.linspace(float(x.min()), float(x.max()), GRID, dtype=torch.float64)
    train = _smooth_density(x, grid)
    good = _trusted_density(*_moments(y, shares), grid)
    ratio = isotonic_regression((good / train).numpy(), weights=train.numpy()).x
    logits = torch.from_numpy(ratio).clamp(min=0).add(1e-300).log()
    lowest = _lowest_kind(y, shares, x)
    plateau = _interpolate(grid, logits, _quantile(y[lowest], shares[lowest], PLATEAU).reshape(1))
    logits = _interpolate(grid, (logits - plateau).clamp(min=math.log(FLOOR), max=0.0), x)
    # The trusted rows' mix of kinds says nothing of the training rows': then the weights do, as posteriors.
    one_kind = len(lowest) == len(y)
    good_share = float((-plateau).exp().clamp(max=1.0) if one_kind else logits.exp().mean())
    return Calibration(logits.float().to(scores.device), good_share)


def ending_logits(
    surprise: Tensor, trusted_surprise: Tensor, weights: Tensor, trusted_weights: Tensor | None = None
) -> Tensor:
    """What the ends of the answers add to the logits of `calibrate`, float32 `[N]`, at most 0.

    Whether an answer stops in the right place is one decision among dozens of tokens. It drowns in the mean over the
    response, where answers that were cut off even rank *above* whole ones, since the first words gain most (measured
    AUC on truncated answers, two seeds: .32 and .68; with this, .96 and .97). So ends are looked at for themselves:
    with `p` the mean surprise of trusted rows and `q` that of training rows as weighted so far, a row's weight is
    multiplied by `1 - s (1 - odds(p) / odds(q))`, the density ratio of a two-valued "stops" or "would have gone on"
    that is seen through its probability `s`. Both means are drawn to one half by one row (Laplace's rule of
    succession), so a few trusted rows prove little. No effect where weighted training rows end like trusted ones.

    Args:
        surprise, weights (`Tensor` float32 `[N]`): of the training rows, see `core.scores.difference_scores`.
        trusted_surprise (`Tensor` float32 `[c]`): of trusted rows that neither model was trained on.
        trusted_weights (`Tensor` float32 `[c]`, *optional*): how much each trusted row counts; equal by default.
    """
    odds = []
    for values, counts in ((trusted_surprise, trusted_weights), (surprise, weights)):
        known = values.double().cpu()
        count, mean, _ = _moments(known, _shares(known, counts))
        rate = (count * mean + 1) / (count + 2)
        odds.append(rate / (1 - rate))
    ratio = float((odds[0] / odds[1]).clamp(max=1))
    return torch.log1p(-(1 - ratio) * surprise)


def _shares(values: Tensor, weights: Tensor | None) -> Tensor:
    """How much each value counts, float64 `[c]`; equally by default."""
    return torch.ones_like(values) if weights is None else weights.to(values)


def winsorised(values: Tensor, x: Tensor) -> Tensor:
    """`values` drawn in to three times the central 90% of `x`.

    A row known by heart can score -30, and must not set the scale for all others.
    """
    ordered = x.sort().values
    low, high = (ordered[round(q * (len(x) - 1))] for q in (0.05, 0.95))
    reach = high - low
    return values.clamp(low - reach, high + reach) if float(reach) > 0 else values


def _smooth_density(x: Tensor, grid: Tensor) -> Tensor:
    """Gaussian kernel density of points on a grid: a histogram, smoothed. O(N + GRID^2)."""
    step = grid[1] - grid[0]
    index = ((x - grid[0]) / step).round().long().clamp(0, GRID - 1)
    histogram = torch.zeros(GRID, dtype=torch.float64).index_add(0, index, torch.full_like(x, 1 / x.numel()))
    # Half of Silverman's bandwidth: the scores of mixed data have several modes. Never finer than the grid.
    bandwidth = torch.clamp(0.45 * torch.tensor(float(x.numel())) ** -0.2, min=float(step))
    kernel = torch.exp(-0.5 * ((grid.unsqueeze(0) - grid.unsqueeze(1)) / bandwidth) ** 2)
    return (kernel @ histogram / (bandwidth * math.sqrt(2 * math.pi))).clamp(min=1e-12)


def _moments(y: Tensor, shares: Tensor) -> tuple[float, Tensor, Tensor]:
    """Effective number, mean and variance (not corrected for the number) of weighted values."""
    share = shares / shares.sum()
    mean = (share * y).sum()
    return float(1 / (share**2).sum()), mean, (share * (y - mean) ** 2).sum()


def _quantile(y: Tensor, shares: Tensor, level: float) -> Tensor:
    """Quantile of weighted values, linear between the middles of their steps."""
    y, share = y[shares > 0], shares[shares > 0]
    order = y.argsort()
    share = share[order]
    middle = (share.cumsum(0) - share / 2) / share.sum()
    right = torch.searchsorted(middle, torch.tensor(level, dtype=y.dtype)).clamp(max=len(y) - 1)
    left = (right - 1).clamp(min=0)
    gap = (middle[right] - middle[left]).clamp(min=1e-12)
    return torch.lerp(y[order[left]], y[order[right]], ((level - middle[left]) / gap).clamp(0, 1))


def _lowest_kind(y: Tensor, shares: Tensor, x: Tensor) -> Tensor:
    """Places of the trusted scores `y` that are of the lowest kind; all of them if they do not fall into kinds.

    `x` are the scores of the training rows.
    """
    ordered = x.sort().values
    kind = y.argsort()
    while len(kind) >= LEAST_OF_KINDS:
        # Every split into a lower and a higher part, by the size of the lower one.
        low = torch.arange(KIND_ROWS, len(kind) - KIND_ROWS + 1, dtype=y.dtype)
        places, high = low.long() - 1, len(kind) - low
        sums, squares, counts = (part.cumsum(0) for part in (y[kind], y[kind] ** 2, shares[kind]))
        means = sums[places] / low, (sums[-1] - sums[places]) / high
        spreads = squares[places] - low * means[0] ** 2, squares[-1] - squares[places] - high * means[1] ** 2
        variance = (spreads[0] / (low - 1) + spreads[1] / (high - 1)) / 2
        distance = means[1] - means[0]
        apart = distance / variance.clamp(min=1e-24).sqrt()
        smaller = torch.minimum(counts[places], counts[-1] - counts[places]) / shares.sum()
        below = torch.searchsorted(ordered, means[0] - distance / 2) / len(x)
        kinds = (apart > KINDS_APART) & (smaller >= KIND_SHARE) & (below >= BELOW_KIND)
        if not bool(kinds.any()):
            break
        kind = kind[: int(low[torch.where(kinds, apart, 0).argmax()])]
    return kind


def _trusted_density(count: float, mean: Tensor, variance: Tensor, grid: Tensor) -> Tensor:
    """Predictive Gaussian density of `count` trusted scores on a grid."""
    spread = (count * variance + PRIOR_ROWS * PRIOR_SPREAD**2) / (count - 1 + PRIOR_ROWS) * (1 + 1 / count)
    return torch.exp(-0.5 * (grid - mean) ** 2 / spread) / (2 * math.pi * spread).sqrt()


def _interpolate(grid: Tensor, values: Tensor, x: Tensor) -> Tensor:
    """Linear interpolation of `values` on an even grid at `x`."""
    position = ((x - grid[0]) / (grid[1] - grid[0])).clamp(0, GRID - 1)
    left = position.floor().long().clamp(max=GRID - 2)
    share = position - left
    return values[left] * (1 - share) + values[left + 1] * share
