"""The validation sets of the upper level, ready to join training batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from ..data.batches import ValidationSampler, concatenate_batches
from ..data.identity import SAMPLE_ID, VALIDATION_ID


@dataclass
class ValidationBatch:
    """This process's share of a step's validation rows, one entry per micro-batch.

    Attributes:
        batches (`list` of `dict` or `None`): collated rows; `None` where a micro-batch gets no validation row.
        row_weights (`list` of `Tensor` float32 `[v]`): weight of each row's summed loss such that the sum over all
            rows of all micro-batches and processes is the validation loss of the step.
    """

    batches: list[dict[str, Any] | None]
    row_weights: list[Tensor]


class ValidationSets:
    """Several prepared validation sets and their weights in `L_val = sum_d omega_d L_d`, `L_d` a mean per token.

    Args:
        datasets (`dict[str, Dataset]`): prepared rows, with what the collator needs of them (`input_ids`, `labels`).
        weights (`dict[str, float]`): omega, summing to one.
        batch_size (`int`): validation rows per optimizer step, over all processes; split evenly over the sets.
        collate: the trainer's data collator (of rows with a `sample_id`).
        seed (`int`): seed of the sampling order.
        pad_token_id (`int`): for concatenating the sets' batches.
    """

    def __init__(
        self,
        datasets: Mapping[str, Dataset],
        weights: Mapping[str, float],
        *,
        batch_size: int,
        collate: Callable[[list[dict[str, Any]]], dict[str, Any]],
        seed: int,
        pad_token_id: int,
    ):
        self.datasets = dict(datasets)
        self.weights = dict(weights)
        self.collate = collate
        self.pad_token_id = pad_token_id
        share = max(1, batch_size // len(self.datasets))
        self.samplers = {
            name: ValidationSampler(len(dataset), share, seed + index)
            for index, (name, dataset) in enumerate(self.datasets.items())
        }

    def step_batch(
        self, step: int, micro_batches: int, rank: int, world_size: int, share: float = 1.0
    ) -> ValidationBatch:
        """The rows of optimizer step `step`, dealt out over `micro_batches` of each process.

        Args:
            share (`float`): part of the step's rows to use. The last window of an epoch may be short, and must not
                carry the validation rows of a whole one in its few micro-batches.
        """
        slots = micro_batches * world_size
        drawn: list[tuple[dict[str, Any], float]] = []
        for name, sampler in self.samplers.items():
            numbers = sampler.rows(step)
            rows = [self.datasets[name][row] for row in numbers[: math.ceil(share * len(numbers))]]
            # Counted after collation: a collator of the user's may mask more.
            tokens = max(1, int((self.collate(rows)["labels"][..., 1:] != -100).sum()))
            drawn += [(row, self.weights[name] / tokens) for row in rows]
        batches: list[dict[str, Any] | None] = []
        weights: list[Tensor] = []
        for micro in range(micro_batches):
            mine = drawn[micro * world_size + rank :: slots]
            batches.append(self._collate([row for row, _ in mine]) if mine else None)
            weights.append(torch.tensor([weight for _, weight in mine], dtype=torch.float32))
        return ValidationBatch(batches, weights)

    def all_batches(self, batch_size: int) -> Iterator[tuple[str, dict[str, Any]]]:
        """Every validation row once, as `(set name, collated batch)`."""
        for name, dataset in self.datasets.items():
            for start in range(0, len(dataset), batch_size):
                rows = [dataset[row] for row in range(start, min(start + batch_size, len(dataset)))]
                yield name, self._collate(rows)

    def _collate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        return self.collate([row | {SAMPLE_ID: VALIDATION_ID} for row in rows])

    def join(self, train: Mapping[str, Any], validation: Mapping[str, Any]) -> dict[str, Any]:
        """Training rows first, validation rows after them, in one batch."""
        return concatenate_batches(train, validation, self.pad_token_id)
