"""Errors of the trainers."""

from __future__ import annotations

from torch import Tensor


class NonFiniteScoreError(RuntimeError):
    """A training row got a NaN or infinite loss or score.

    Raised before the step that would have used it. During training, a checkpoint of the last good step is written
    first.
    """


def row_list(ids: Tensor, limit: int = 20) -> str:
    """The given sample ids, sorted, at most `limit` of them."""
    rows = sorted(set(ids.tolist()))
    return str(rows[:limit]) + (f" and {len(rows) - limit} more" if len(rows) > limit else "")
