"""Rows of streams: they have no number, so their identity is the hash of a key."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from itertools import islice
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor

from .identity import DATA_WEIGHT, SAMPLE_ID


def hashed_unit(key: str, size: int) -> int:
    """Place of a key in a table of `size` places: the same on every machine, in every process and run."""
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()) % size


def row_key(row: dict[str, Any], column: str | None) -> str:
    """What identifies a row: its value of a column, or all that it says.

    Raises:
        ValueError: if the row lacks the column, or has no value there.
    """
    if column is None:
        said = {name: value for name, value in row.items() if value is not None}
        return json.dumps(said, sort_keys=True, default=str)
    if row.get(column) is None:
        raise ValueError(
            f"A row of the stream `train_dataset` has no value in the column {column!r}, by which rows are told apart "
            f"(`selector_key_column`, `selector_group_column`). Its columns: {sorted(row)}."
        )
    return str(row[column])


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


def with_units(stream: IterableDataset, column: str | None, size: int) -> IterableDataset:
    """The stream with a `sample_id`: the place of each row's key in a table of `size` places."""
    return stream.map(_add_unit, fn_kwargs={"column": column, "size": size})


def _add_unit(row: dict[str, Any], column: str | None, size: int) -> dict[str, int]:
    return {SAMPLE_ID: hashed_unit(row_key(row, column), size)}


def first_rows(stream: IterableDataset, count: int) -> list[dict[str, Any]]:
    """The first `count` rows of a stream, or all of it."""
    return list(islice(iter(stream), count))


def weighted_stream(
    stream: IterableDataset, column: str | None, size: int, weights: Callable[[Tensor], Tensor]
) -> IterableDataset:
    """The stream with the columns `sample_id` and `data_weight` (NaN for keys not seen in training).

    NaN, not missing: when a stream is written, a batch without any value would not show the type of the column.

    Args:
        weights (callable): weights float32 `[b]` of units int64 `[b]`, NaN for those not seen.
    """

    def add(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        names = list(batch)
        rows = [dict(zip(names, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        units = [hashed_unit(row_key(row, column), size) for row in rows]
        return {SAMPLE_ID: units, DATA_WEIGHT: weights(torch.tensor(units)).tolist()}

    return stream.map(add, batched=True)


def as_dataset(rows: list[dict[str, Any]]) -> tuple[Dataset, Tensor]:
    """A stream's prepared rows as a data set whose `sample_id` is the place in it; and their units, int64 `[n]`."""
    units = torch.tensor([row[SAMPLE_ID] for row in rows], dtype=torch.int64)
    return Dataset.from_list([row | {SAMPLE_ID: place} for place, row in enumerate(rows)]), units
