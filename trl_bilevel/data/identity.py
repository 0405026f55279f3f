"""Row identity: the caller's row number travels with every row, from before preparation to the loss."""

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from datasets import Dataset

SAMPLE_ID = "sample_id"
# Of packed rows: tokens of each segment. Of batches: the segment of each token, see `SampleIdCollator`.
SAMPLE_LENGTHS = "sample_lengths"
SEGMENTS = "segments"
DATA_WEIGHT = "data_weight"
DATA_RANK = "data_rank"
RESERVED_COLUMNS = (SAMPLE_ID, DATA_WEIGHT, DATA_RANK, SAMPLE_LENGTHS)

# Marks validation rows in a concatenated batch: they have no sample weight.
TRUSTED_ID = -1


def add_sample_ids(dataset: Dataset) -> Dataset:
    """The dataset with a `sample_id` column: the row number, 0 to `len(dataset) - 1`.

    Raises:
        ValueError: if the dataset has a column of one of our names (`RESERVED_COLUMNS`).
    """
    taken = [name for name in RESERVED_COLUMNS if name in dataset.column_names]
    if taken:
        raise ValueError(
            f"`train_dataset` has the column(s) {taken}, which BilevelSFTTrainer writes itself. Rename them, e.g. "
            f'`train_dataset.rename_column("{taken[0]}", "my_{taken[0]}")`.'
        )
    return dataset.add_column(SAMPLE_ID, np.arange(len(dataset)))


def without_numbers(rows: Any) -> Any:
    """Rows without columns of our names, which would be taken for row numbers; a dict of such sets for a dict."""
    if isinstance(rows, Mapping):
        return {name: without_numbers(part) for name, part in rows.items()}
    if not isinstance(rows, Dataset):
        return rows
    return rows.remove_columns([name for name in RESERVED_COLUMNS if name in rows.column_names])


def sample_ids(dataset: Dataset) -> torch.Tensor:
    """The `sample_id` of every row of a dataset, int64 `[len(dataset)]`."""
    return torch.from_numpy(np.array(dataset.with_format("numpy")[SAMPLE_ID][:], dtype=np.int64))


class SampleIdCollator:
    """Wraps a data collator: takes `sample_id` out of the rows and adds it to the batch as an int64 tensor `[R]`.

    Where a batch row holds several of the caller's rows (packing, padding-free), `segments` int64 `[B, S]` says which
    of the `R` rows each token belongs to, negative for padding.

    Rows without an id (evaluation rows) pass through unchanged.

    Args:
        collator: what to wrap.
        merges (`bool`): True if batch rows may hold several rows.
    """

    def __init__(self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]], merges: bool = False):
        self.collator = collator
        self.merges = merges

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate `features`; the ids come out in the order of the batch's rows."""
        if not features or SAMPLE_ID not in features[0]:
            return self.collator(features)
        own = (SAMPLE_ID, SAMPLE_LENGTHS)
        batch = self.collator([{k: v for k, v in feature.items() if k not in own} for feature in features])
        ids = [feature[SAMPLE_ID] for feature in features]
        if self.merges:
            lengths = [_plain(feature.get(SAMPLE_LENGTHS, [len(feature["input_ids"])])) for feature in features]
            batch[SEGMENTS] = _segments(lengths, batch["input_ids"].shape)
            ids = [number for row in map(_plain, ids) for number in (row if isinstance(row, list) else [row])]
        elif len(batch["input_ids"]) != len(ids):
            raise ValueError(
                f"The data collator {type(self.collator).__name__} turned {len(ids)} rows into "
                f"{len(batch['input_ids'])}: sample weights need one batch row per data row."
            )
        batch[SAMPLE_ID] = torch.tensor(ids, dtype=torch.int64)
        return batch


def _plain(value: Any) -> Any:
    """A list or a number of a row, whatever format its dataset gives."""
    return value.tolist() if hasattr(value, "tolist") else value


def _segments(lengths: list[list[int]], shape: torch.Size) -> torch.Tensor:
    """Segment of each token of a batch `shape`, whose rows follow one another or have a batch row each."""
    counts = torch.tensor([count for row in lengths for count in row])
    numbers = torch.arange(len(counts)).repeat_interleave(counts)
    segments = torch.full(tuple(shape), -1, dtype=torch.int64)
    if shape[0] == 1:
        segments[0, : len(numbers)] = numbers
        return segments
    for row, part in zip(segments, numbers.split([sum(row) for row in lengths]), strict=True):
        row[: len(part)] = part
    return segments


def fingerprint(dataset: Dataset, rows: int = 1024) -> str:
    """A short hash of a dataset: of its length and of up to `rows` evenly spaced rows."""
    count = len(dataset)
    digest = hashlib.sha256(str(count).encode())
    step = max(1, -(-count // rows))
    for row in dataset.with_format(None).select(range(0, count, step)):
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def count_overlap(train: Dataset, validation: Dataset, batch_size: int = 1000) -> int:
    """Number of rows of `validation` whose token sequence also occurs in `train` (both prepared)."""
    wanted: dict[bytes, int] = {}
    train, validation = train.with_format(None), validation.with_format(None)
    for ids in validation["input_ids"]:
        key = _key(ids)
        wanted[key] = wanted.get(key, 0) + 1
    found: set[bytes] = set()
    for batch in train.select_columns("input_ids").iter(batch_size=batch_size):
        found.update(key for ids in batch["input_ids"] if (key := _key(ids)) in wanted)
    return sum(wanted[key] for key in found)


def _key(ids: list[int]) -> bytes:
    return hashlib.blake2b(repr(list(ids)).encode(), digest_size=16).digest()
