"""Weights of a stream's rows: chosen on its first rows, then predicted as rows come."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from datasets import IterableDataset
from peft import PeftModel
from torch import Tensor

from ..core.prediction import TabulatedPredictor
from ..data.groups import Groups
from ..data.identity import DATA_WEIGHT
from ..data.rows import Collate
from .choose import Choice
from .language_model import LanguageModel, evaluating
from .prediction import features
from .state import TrainingWeights


class StreamedWeights(TrainingWeights):
    """Weights of a stream's rows. `values` and `scores` are those of the rows that were read to choose by.

    Args:
        model: the model in training; its adapter is set aside where rows are read, so that what weights rest on stays
            as it was.
        depth (`float`): share of the layers that predictions rest on.
        groups (`Groups`, *optional*): of the rows read; the weight of a group that was not among them is 1.
    """

    def __init__(
        self,
        kept: Tensor,
        identity: Mapping[str, Any],
        model: LanguageModel,
        depth: float,
        groups: Groups | None = None,
        any_identity: bool = False,
    ):
        super().__init__(kept, identity, groups, any_identity)
        self.model = model
        self.depth = depth
        self.predictor: TabulatedPredictor | None = None

    def take(self, choice: Choice) -> None:
        """Go by what choosing found out."""
        super().take(choice)
        self.predictor = choice.predictor

    def of_batch(self, batch: Mapping[str, Any], ids: Tensor) -> Tensor:
        """Weights float32 `[b]` of the rows of a collated batch: a function of what they say.

        Cost: a forward without gradient through the lower layers.
        """
        if self.groups is not None:
            ids = ids.cpu()
            return torch.where(ids < 0, 1.0, self._of_groups()[ids.clamp(min=0)])
        if self.predictor is None:
            return torch.ones(len(batch["input_ids"]))
        model = self.model.model
        alone = model.disable_adapter() if isinstance(model, PeftModel) else nullcontext()
        with evaluating(model), alone:
            return self.predictor(*features(self.model, batch, [self.depth]))

    def _of_groups(self) -> Tensor:
        """Weight of each group, float32 `[groups]`."""
        assert self.groups is not None
        out = torch.ones(len(self.groups.names))
        out[self.groups.of_row[self.kept]] = self.values[self.kept]
        return out

    def weighted(self, stream: IterableDataset, prepare: Callable[[Mapping[str, Any]], Any], collate: Collate) -> Any:
        """The stream with a column `data_weight`, computed as it is read; NaN for rows without a token to score.

        `prepare` tokenises a row (`input_ids`, `labels`), and `collate` makes a batch of such rows.
        """

        def add(batch: dict[str, list[Any]]) -> dict[str, list[float]]:
            columns = zip(*batch.values(), strict=True)
            rows = [prepare(dict(zip(batch, values, strict=True))) for values in columns]
            out = torch.full((len(rows),), torch.nan)
            usable = [n for n, row in enumerate(rows) if any(label != -100 for label in row["labels"][1:])]
            if usable:
                out[usable] = self.of_batch(collate([dict(rows[n]) for n in usable]), torch.zeros(0))
            return {DATA_WEIGHT: out.tolist()}

        if self.groups is None:
            return stream.map(add, batched=True, batch_size=32)
        column = self.identity["settings"]["selector_group_column"]
        groups = {name: n for n, name in enumerate(self.groups.names)}

        def add_by_group(row: Mapping[str, Any]) -> dict[str, float]:
            place = groups.get(str(row[column]))
            return {DATA_WEIGHT: 1.0 if place is None else float(self._of_groups()[place])}

        return stream.map(add_by_group)

    def tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint needs."""
        predictor = {} if self.predictor is None else vars(self.predictor)
        return super().tensors() | {f"predictor.{name}": value for name, value in predictor.items()}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `tensors` gave."""
        super().load_tensors(tensors)
        found = {k.removeprefix("predictor."): v for k, v in tensors.items() if k.startswith("predictor.")}
        if found:
            self.predictor = TabulatedPredictor(**found)
