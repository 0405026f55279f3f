"""Errors of choosing and training."""

from __future__ import annotations

from torch import Tensor


class NonFiniteScoreError(RuntimeError):
    """A row got a NaN or infinite loss or score, or the pilot a gradient of that kind.

    Raised before the step that would have used it. During training, a checkpoint of the last good step is written
    first.
    """


def row_list(ids: Tensor, limit: int = 20) -> str:
    """The given row numbers, sorted, at most `limit` of them."""
    rows = sorted(set(ids.tolist()))
    return str(rows[:limit]) + (f" and {len(rows) - limit} more" if len(rows) > limit else "")
