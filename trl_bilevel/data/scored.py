"""The tokens of prepared rows that a causal model is scored on: those with a label, but for the first of a row."""

from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor

from .identity import SAMPLE_ID, SAMPLE_LENGTHS


def with_scored_tokens(rows: Any) -> Any:
    """Rows with at least one token that a causal model scores (a label after the first position)."""
    if isinstance(rows, IterableDataset):
        return rows.filter(lambda row: any(label != -100 for label in row["labels"][1:]))
    if "labels" not in rows.column_names:
        return rows
    return rows.filter(
        lambda batch: [any(label != -100 for label in labels[1:]) for labels in batch],
        batched=True,
        input_columns="labels",
        desc="Dropping rows without a token to score",
    )


def scored_tokens(rows: Dataset, packed: Dataset | None, count: int) -> Tensor:
    """Tokens of each of the caller's rows that the loss counts, float64 `[count]`.

    Args:
        rows: one by one.
        packed (*optional*): as they are trained on, where that differs: parts of a row that was split count as well.
    """
    out = torch.zeros(count, dtype=torch.float64)
    source = rows if packed is None else packed
    names = [name for name in (SAMPLE_ID, SAMPLE_LENGTHS, "labels") if name in source.column_names]
    # Rows that are wrapped see those before them, so that their first token is scored as well.
    sees_others = packed is not None and "seq_lengths" not in packed.column_names
    for batch in source.select_columns(names).with_format(None).iter(1000):
        lengths = batch.get(SAMPLE_LENGTHS, [[len(labels)] for labels in batch["labels"]])
        for ids, parts, labels in zip(batch[SAMPLE_ID], lengths, batch["labels"], strict=True):
            place = 0
            for number, length in zip(ids if isinstance(ids, list) else [ids], parts, strict=True):
                first = max(place, 1) if sees_others else place + 1
                out[number] += sum(label != -100 for label in labels[first : place + length])
                place += length
    return out
