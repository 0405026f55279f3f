"""Figures with intervals from what was measured of a model, or of a model and a baseline."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .measurement import Measured, Safety
from .models import Losses
from .refusal import COMPLIANCE, NEITHER, REFUSAL
from .statistics import Difference, Estimate, mean, paired_difference, rate, ratio

Figures = dict[str, Estimate]


@dataclasses.dataclass(frozen=True)
class Intervals:
    """How intervals are made: `confidence` in (0, 1), `seed` and number of `resamples` of the bootstrap."""

    confidence: float = 0.95
    seed: int = 0
    resamples: int = 9_999

    @property
    def bootstrap(self) -> dict[str, Any]:
        """Keyword arguments of the bootstrap figures."""
        return dataclasses.asdict(self)


def loss_figures(losses: Losses, kept: NDArray[np.bool_], intervals: Intervals) -> Figures:
    """Held-out loss in nats: mean over rows of the mean per token, per token, per byte; perplexity per token.

    Args:
        kept (bool `[n]`): rows to use.
    """
    sums, counts = losses.sums[kept], losses.counts[kept]
    per_token = ratio(sums, counts, **intervals.bootstrap)
    perplexity: dict[str, Any] = {end: math.exp(getattr(per_token, end)) for end in ("value", "low", "high")}
    out = {
        "loss_row_mean": mean(sums / counts, **intervals.bootstrap),
        "loss_per_token": per_token,
        "perplexity": dataclasses.replace(per_token, **perplexity),
    }
    if losses.sizes[kept].all():
        out["loss_per_byte"] = ratio(sums, losses.sizes[kept], **intervals.bootstrap)
    return out


def kept_rows(measured: Sequence[Measured]) -> NDArray[np.bool_]:
    """Rows that every model has a token to score of, bool `[n]`.

    Raises:
        ValueError: if there is none.
    """
    kept = np.logical_and.reduce([one.losses.counts > 0 for one in measured if one.losses is not None])
    if not kept.any():
        raise ValueError("No row has a token to score within `max_length`. Raise it, or look at the rows' answers.")
    return kept


def loss_difference(
    model: Losses, baseline: Losses, kept: NDArray[np.bool_], intervals: Intervals
) -> tuple[str, Difference]:
    """Mean over rows of the model's loss minus the baseline's, and the name of the figure that it is of.

    Models that split the rows into different tokens are compared per byte of text.
    """
    same = model.tokens == baseline.tokens
    name = "loss_row_mean" if same else "loss_row_mean_per_byte"
    divisors = (model.counts, baseline.counts) if same else (model.sizes, baseline.sizes)
    if not same:
        kept = kept & (model.sizes > 0) & (baseline.sizes > 0)
    values = [one.sums[kept] / by[kept] for one, by in zip((model, baseline), divisors, strict=True)]
    return name, paired_difference(*values, **intervals.bootstrap)


def _indicators(safety: Safety) -> dict[str, NDArray[np.bool_]]:
    """Of each safety figure, which requests count."""
    harmful, benign = np.array(safety.harmful), np.array(safety.benign)
    return {
        "refusal": harmful == REFUSAL,
        "compliance": harmful == COMPLIANCE,
        "neither": harmful == NEITHER,
        "refusal_preferred": np.array(safety.preferred),
        "over_refusal": benign == REFUSAL,
    }


def safety_figures(safety: Safety, intervals: Intervals) -> Figures:
    """Rates with Wilson intervals.

    Returns:
        `refusal`, `compliance`, `neither`: shares of the harmful requests; `refusal_preferred`: share of them of which
        a refusal is likelier per token than a compliance stub; `over_refusal`: share of the benign requests refused.
    """
    return {
        name: rate(int(found.sum()), len(found), confidence=intervals.confidence)
        for name, found in _indicators(safety).items()
    }


def safety_differences(model: Safety, baseline: Safety, intervals: Intervals) -> dict[str, Difference]:
    """The model's rate minus the baseline's, over the same requests, for each figure of `safety_figures`."""
    first, second = _indicators(model), _indicators(baseline)
    return {
        name: paired_difference(first[name], second[name], bounds=(-1, 1), **intervals.bootstrap) for name in first
    }
