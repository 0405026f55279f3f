"""Packing that knows whose tokens are whose: TRL's packer, with the caller's row numbers carried along."""

import numpy as np
from datasets import Dataset
from trl import pack_dataset

from .identity import SAMPLE_ID, SAMPLE_LENGTHS

# Strategies that go on with a row in another packed row where it does not fit.
SPLITTING = ("bfd_split", "wrapped")


def pack_rows(rows: Dataset, seq_length: int, strategy: str, num_proc: int | None = None) -> Dataset:
    """The rows packed by `trl.pack_dataset`, with the row number of each segment.

    Args:
        rows (`Dataset`): `input_ids`, `labels`, `sample_id`; in the order in which they are packed.
        seq_length (`int`): tokens of a packed row.
        strategy (`str`): `"bfd"`, `"bfd_split"` or `"wrapped"`, as TRL knows them.

    Returns:
        `Dataset`: packed rows with `sample_id` (a list: the row that each segment comes from) and `sample_lengths`
        (tokens of each segment) in place of the row number. A row that is split has a segment in each part.
    """

    def number_tokens(batch: dict[str, list]) -> dict[str, list]:
        counts = [len(ids) for ids in batch["input_ids"]]
        return {SAMPLE_ID: [[row] * count for row, count in zip(batch[SAMPLE_ID], counts, strict=True)]}

    def number_segments(batch: dict[str, list]) -> dict[str, list]:
        numbers, lengths = [], []
        for tokens in batch[SAMPLE_ID]:
            owner = np.asarray(tokens)
            starts = np.flatnonzero(np.r_[True, owner[1:] != owner[:-1]])
            numbers.append(owner[starts].tolist())
            lengths.append(np.diff(np.r_[starts, len(owner)]).tolist())
        return {SAMPLE_ID: numbers, SAMPLE_LENGTHS: lengths}

    settings = {"batched": True, "num_proc": num_proc}
    rows = rows.select_columns(["input_ids", "labels", SAMPLE_ID])
    rows = rows.map(number_tokens, desc="Numbering tokens", **settings)
    packed = pack_dataset(rows, seq_length, strategy, {"num_proc": num_proc, "desc": "Packing train dataset"})
    return packed.map(number_segments, desc="Numbering segments", **settings)


def first_window(rows: Dataset, length: int, num_proc: int | None = None) -> Dataset:
    """Each row cut to at most `length` tokens, of which at least one is scored if any is.

    The start of the row, unless its first scored token lies beyond it: then as much before that token as after it.
    """

    def cut(row: dict[str, list]) -> dict[str, list]:
        labels = row["labels"]
        if len(labels) <= length:
            return {"input_ids": row["input_ids"], "labels": labels}
        first = next((place for place, label in enumerate(labels[1:], 1) if label != -100), 0)
        start = 0 if first < length else first - length // 2
        return {name: row[name][start : start + length] for name in ("input_ids", "labels")}

    return rows.map(cut, desc="Cutting long rows", num_proc=num_proc)
