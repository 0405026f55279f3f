"""Prepared rows as choosing and training read them: by place, collated, in an order that their content gives."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch import Tensor

from .identity import SAMPLE_ID, SampleIdCollator, sample_ids
from .sampling import content_order

T = TypeVar("T", int, tuple[str, int])
Collate = Callable[[list[dict[str, Any]]], dict[str, Any]]


@dataclass
class Rows:
    """Prepared rows and a way to collate them.

    Attributes:
        dataset (`Dataset`): with `input_ids`, `labels` and `sample_id` (the caller's row number), and whatever else
            the collator needs.
        collate: makes a padded batch (`input_ids`, `attention_mask`, `labels`, `sample_id`) of some rows.
        count (`int`): how many rows the caller gave; preparation may have dropped some.
    """

    dataset: Dataset
    collate: Collate
    count: int

    def __len__(self) -> int:
        """Rows that preparation kept."""
        return len(self.dataset)

    @cached_property
    def ids(self) -> Tensor:
        """The caller's row number of each row, int64 `[len(self)]`."""
        return sample_ids(self.dataset)

    @cached_property
    def kept(self) -> Tensor:
        """Which of the caller's rows preparation kept, bool `[count]`."""
        kept = torch.zeros(self.count, dtype=torch.bool)
        kept[self.ids] = True
        return kept

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        # In Arrow: as Python lists, the tokens of a large set do not fit into memory.
        tokens = self.dataset.select_columns("input_ids").with_format("arrow")
        return [n for table in tokens.iter(10_000) for n in pc.list_value_length(table["input_ids"]).to_pylist()]

    @cached_property
    def scored_tokens(self) -> Tensor:
        """Tokens of each row that the loss counts, float64 `[len(self)]`."""
        labels = self.dataset.select_columns("labels").with_format(None)
        counts = [sum(label != -100 for label in row[1:]) for part in labels.iter(1000) for row in part["labels"]]
        return torch.tensor(counts, dtype=torch.float64)

    def order(self, seed: int) -> Tensor:
        """Places of the rows in a random order that their content gives (`content_order`), int64."""
        if seed not in self._orders:
            self._orders[seed] = content_order(self.dataset, seed)
        return self._orders[seed]

    @cached_property
    def _orders(self) -> dict[int, Tensor]:
        return {}

    @cached_property
    def _plain(self) -> Dataset:
        return self.dataset.with_format(None)

    def batch(self, places: Sequence[int]) -> dict[str, Any]:
        """Some rows, collated."""
        columns = self._plain[list(places)]
        return self.collate([dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)])

    def batches(self, places: Iterable[int], tokens: int, rows: int) -> list[list[int]]:
        """`places` in batches of similar length, see `batched`."""
        drawn = list(places)
        parts = batched({n: self.lengths[place] for n, place in enumerate(drawn)}, tokens, rows)
        return [[drawn[n] for n in part] for part in parts]


def batched(lengths: Mapping[T, int], tokens: int, rows: int) -> list[list[T]]:
    """Keys in batches of similar length: at most `rows` rows and (but for single rows) `tokens` tokens, padded.

    A function of the rows and their order alone, so that scores do not depend on the caller's batch size.

    Args:
        lengths: tokens of each row, by its place or name.
    """
    out: list[list[T]] = []
    widest = 0
    # From the longest: if memory does not suffice, that is known at once.
    for key in sorted(lengths, key=lambda key: -lengths[key]):
        if out and len(out[-1]) < rows and widest * (len(out[-1]) + 1) <= tokens:
            out[-1].append(key)
        else:
            out.append([key])
            widest = lengths[key]
    return out


def pad_rows(rows: list[dict[str, Any]], pad_token_id: int = 0) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and `labels` `[B, S]` of tokenised rows, padded on the right."""
    length = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": pad_token_id, "attention_mask": 0, "labels": -100}
    parts = [
        {"input_ids": r["input_ids"], "attention_mask": [1] * len(r["input_ids"]), "labels": r["labels"]} for r in rows
    ]
    return {
        name: torch.tensor([list(part[name]) + [value] * (length - len(part[name])) for part in parts])
        for name, value in fill.items()
    }


def padded(pad_token_id: int | None) -> SampleIdCollator:
    """The collator of rows that come without one of their own."""
    return SampleIdCollator(lambda rows: pad_rows(rows, pad_token_id or 0))


def plain_rows(dataset: Dataset, collate: Collate, count: int | None = None, columns: Sequence[str] = ()) -> Rows:
    """Rows of a prepared data set, with the columns that a causal model and `columns` need; numbered if they are not.

    Args:
        count (`int`, *optional*): rows of the caller; as many as there are by default.
    """
    wanted = [*("input_ids", "labels", SAMPLE_ID), *columns]
    rows = dataset.select_columns([name for name in wanted if name in dataset.column_names])
    if SAMPLE_ID not in rows.column_names:
        rows = rows.add_column(SAMPLE_ID, list(range(len(rows))))
    return Rows(rows, collate, len(dataset) if count is None else count)
