"""Rows that come one after another: their columns, and the first of them."""

from itertools import islice
from typing import Any

from datasets import Dataset, IterableDataset


def columns(rows: Dataset | IterableDataset) -> list[str]:
    """Names of the columns; a stream that does not know them is asked for its first row.

    Raises:
        ValueError: if the stream is empty.
    """
    if rows.column_names is not None:
        return list(rows.column_names)
    first = first_rows(rows, 1)
    if not first:
        raise ValueError("The stream `train_dataset` is empty.")
    return list(first[0])


def first_rows(stream: IterableDataset, count: int) -> list[dict[str, Any]]:
    """The first `count` rows of a stream, or all of it."""
    return list(islice(iter(stream), count))
