"""The weights of a run: made of a column or learned before the first step, the same way in both trainers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from ..data.export import weighted_dataset
from ..data.identity import fingerprint
from ..data.rows import Rows
from ..data.trusted import TrustedSets
from ..weights.choose import choose
from ..weights.language_model import LanguageModel
from ..weights.settings import WeightSettings
from ..weights.state import TrainingWeights
from . import checks
from .bilevel_sft_config import BilevelSFTConfig
from .checkpoints import SavesWeights
from .preparation import TrainingData


class ChoosesWeights(SavesWeights):
    """The part of both trainers that learns weights and reads rows; before TRL's trainer among the bases.

    Attributes:
        rows (`Rows`, *optional*), trusted (`TrustedSets`, *optional*): prepared.
    """

    rows: Rows | None
    trusted: TrustedSets | None
    _caller_rows: Any

    def sample_weights(self) -> Tensor:
        """Weights of the caller's rows, float32 `[len(train_dataset)]` on the CPU, in the caller's order.

        Mean one over the rows that are trained on; NaN for rows that preparation dropped (longer prompts than
        `max_length`, say).

        Raises:
            ValueError: for a stream, whose rows have no number.
        """
        if not isinstance(self._caller_rows, Dataset):
            raise ValueError(
                "The rows of a stream have no number, so there is no list of weights. Use `weighted_dataset()`, a "
                "stream of the rows with their weights."
            )
        if self.weights is None:
            return torch.ones(len(self._caller_rows))
        self.weights.metrics()
        return self.weights.values.clone()

    def weighted_dataset(self, top_k: int | None = None) -> Any:
        """The caller's rows with `sample_id`, `data_weight` and `data_rank` (0 is the highest weight).

        Args:
            top_k (`int`, *optional*): only the rows of the `top_k` highest weights, in the caller's order.
        """
        return weighted_dataset(self._caller_rows, self.sample_weights(), top_k)

    def _reader(self) -> LanguageModel:
        """The model as rows are read by it."""
        return LanguageModel(self.model, self.args.bf16)

    def _losses_of(self, rows: Rows) -> Tensor:
        """Mean losses of prepared rows under the present model, float32 `[rows]` on the CPU."""
        return self._reader().mean_losses(rows, self.args.per_device_eval_batch_size)

    def validation_loss(self) -> dict[str, float]:
        """Loss of each validation set (mean over rows of the mean per token, in nats), and their weighted `"total"`.

        Independent of batch size and number of processes: every process computes all rows.
        """
        if self.trusted is None:
            raise ValueError("There is no validation loss: the trainer has no `validation_dataset`.")
        losses = {name: float(self._losses_of(rows).mean()) for name, rows in self.trusted.sets.items()}
        return losses | {"total": sum(self.trusted.weights[name] * loss for name, loss in losses.items())}

    def choose_weights(self, **how: Any) -> None:
        """Learn the weights, if they are not known yet; called by `train` before the first step.

        Args:
            how: as `weights.choose.choose` takes it.
        """
        if self.weights is None or self.weights.known or self.rows is None or self.trusted is None:
            return
        args: Any = self.args
        choice = choose(
            self._reader(),
            self.rows,
            self.trusted,
            WeightSettings(**weight_settings(args)),
            seed=args.seed,
            folder=self.record.folder / "choosing" if args.should_save and args.world_size == 1 else None,
            checkpointing=args.gradient_checkpointing,
            hidden_progress=args.disable_tqdm,
            **how,
        )
        self.weights.take(choice)
        self.record.write_choice(choice, self._tokenizer.decode)


def weight_settings(args: Any) -> dict[str, Any]:
    """The settings of either config that weights follow from."""
    names = [each.name for each in fields(WeightSettings)]
    return {name: getattr(args, name) for name in names if hasattr(args, name)}


def weights_identity(
    settings: dict[str, Any], rows: Rows, train: Dataset, trusted: Mapping[str, Dataset]
) -> dict[str, Any]:
    """What must not change between a checkpoint's weights and the run that goes on with them."""
    return {
        "settings": settings,
        "rows": rows.count,
        "rows_kept": len(rows),
        **fingerprints(train, trusted),
    }


def fingerprints(train: Any, trusted: Mapping[str, Dataset]) -> dict[str, str]:
    """Short hashes of the training rows (none of a stream) and of the trusted ones."""
    return {
        "train_fingerprint": fingerprint(train) if isinstance(train, Dataset) else "",
        "validation_fingerprint": " ".join(f"{name} {fingerprint(part)}" for name, part in trusted.items()),
    }


def make_weights(args: BilevelSFTConfig, data: TrainingData, rows: Rows, reader: LanguageModel) -> TrainingWeights:
    """The weights of a run, equal until they are chosen; given ones at once.

    Args:
        reader: reads the model in training.
    """
    settings = weight_settings(args) | {"selector_weighting": args.selector_weighting}
    identity = weights_identity(settings, rows, rows.dataset if data.streams else data.rows, data.trusted)
    any_identity = args.ignore_selector_fingerprint
    if args.published:
        from ..weights.published import RECIPES, MovingWeights, Tracker

        recipe, tracker = RECIPES[args.selector_preset], None
        if recipe.tracks:
            betas = (args.adam_beta1, args.adam_beta2)
            tracker = Tracker(reader.model, betas, args.adam_epsilon, args.weight_decay, args.max_grad_norm)
        return MovingWeights(rows.kept, identity, recipe, tracker, any_identity)
    if data.streams:
        from ..weights.streamed import StreamedWeights

        return StreamedWeights(rows.kept, identity, reader, data.groups, any_identity)
    weights = TrainingWeights(rows.kept, identity, data.groups, any_identity)
    if data.given is not None:
        checks.check_given_weights(data.given, rows.kept)
        weights.give(data.given)
    return weights
