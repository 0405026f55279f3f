"""Errors of choosing and training."""

from torch import Tensor


class NonFiniteScoreError(RuntimeError):
    """A row got a NaN or infinite loss or score, or the pilot a gradient of that kind.

    Raised before the step that would have used it. During training, a checkpoint of the last good step is written
    first.
    """


def not_finite(ids: Tensor, step: int, folder: str) -> NonFiniteScoreError:
    """The error for rows whose loss is NaN or infinite in training; -1 among the `ids` stands for other rows."""
    known = ids[ids >= 0]
    rows = f"Training rows (sample_id) {row_list(known)}" if len(known) else "Trusted rows, or a stream's,"
    return NonFiniteScoreError(
        f"{rows} have a NaN or infinite loss at step {step}. The state before this step is saved in "
        f"{folder}/checkpoint-{step}. Look at these rows; or lower the learning rate, or use bf16 instead of fp16."
    )


def row_list(ids: Tensor, limit: int = 20) -> str:
    """The given row numbers, sorted, at most `limit` of them."""
    rows = sorted(set(ids.tolist()))
    return str(rows[:limit]) + (f" and {len(rows) - limit} more" if len(rows) > limit else "")
