"""Weights of a stream's rows: chosen on its first rows, then predicted as rows come."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from datasets import IterableDataset
from peft import PeftModel
from torch import Tensor

from ..core.probe import Scorer
from ..data.groups import Groups
from ..data.identity import DATA_WEIGHT
from ..data.rows import Collate
from .choose import Choice
from .language_model import LanguageModel, evaluating
from .reading import mean_states, of_columns
from .settings import PROBE_DEPTH
from .state import TrainingWeights


class StreamedWeights(TrainingWeights):
    """Weights of a stream's rows. `values` and `scores` are those of the rows that were read to choose by.

    Args:
        model: the model in training; its adapter is set aside where rows are read, so that what weights rest on stays
            as it was.
        groups (`Groups`, *optional*): of the rows read; the weight of a group that was not among them is 1.
    """

    def __init__(
        self,
        kept: Tensor,
        identity: Mapping[str, Any],
        model: LanguageModel,
        groups: Groups | None = None,
        any_identity: bool = False,
    ):
        super().__init__(kept, identity, groups, any_identity)
        self.model = model
        self.scorer: Scorer | None = None

    def take(self, choice: Choice) -> None:
        """Go by what choosing found out."""
        super().take(choice)
        self.scorer = choice.scorer

    def of_batch(self, batch: Mapping[str, Any], ids: Tensor) -> Tensor:
        """Weights float32 `[b]` of the rows of a collated batch: a function of what they say.

        Cost: a forward without gradient through the lower layers.
        """
        if self.groups is not None:
            ids = ids.cpu()
            return torch.where(ids < 0, 1.0, self._of_groups()[ids.clamp(min=0)])
        if self.scorer is None:
            return torch.ones(len(batch["input_ids"]))
        model = self.model.model
        alone = model.disable_adapter() if isinstance(model, PeftModel) else nullcontext()
        with evaluating(model), alone:
            return self.scorer(mean_states(self.model, batch, PROBE_DEPTH))

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
            found = of_columns(batch, prepare, collate, lambda rows: self.of_batch(rows, torch.zeros(0)))
            return {DATA_WEIGHT: found.tolist()}

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
        return super().tensors() | ({} if self.scorer is None else self.scorer.tensors("scorer."))

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `tensors` gave."""
        super().load_tensors(tensors)
        if any(name.startswith("scorer.") for name in tensors):
            self.scorer = Scorer.from_tensors(tensors, "scorer.")
