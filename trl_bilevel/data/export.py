"""The caller's rows with their weights."""

from __future__ import annotations

import torch
from datasets import Dataset, Value
from torch import Tensor

from ..core.statistics import data_ranks
from .identity import DATA_RANK, DATA_WEIGHT, SAMPLE_ID


def weighted_dataset(rows: Dataset, weights: Tensor, top_k: int | None = None) -> Dataset:
    """`rows` with the columns `sample_id`, `data_weight` (float32; missing where NaN) and `data_rank`.

    Args:
        rows (`Dataset`): the caller's rows.
        weights (`Tensor` float32 `[len(rows)]`).
        top_k (`int`, *optional*): keep the rows of rank below `top_k` only; never rows without a weight.

    Raises:
        ValueError: if `top_k` is not between 1 and the number of rows.
    """
    if top_k is not None and not 1 <= top_k <= len(rows):
        raise ValueError(f"`top_k` must lie between 1 and the number of rows ({len(rows)}), got {top_k}.")
    ranks = data_ranks(weights)
    out = rows.add_column(SAMPLE_ID, list(range(len(rows))))
    values = [None if weight != weight else weight for weight in weights.tolist()]
    out = out.add_column(DATA_WEIGHT, values, feature=Value("float32")).add_column(DATA_RANK, ranks.tolist())
    if top_k is None:
        return out
    kept = torch.from_numpy(ranks < top_k) & ~torch.isnan(weights)
    return out.select(kept.nonzero().squeeze(1).tolist())
