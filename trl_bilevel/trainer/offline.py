"""The offline half of a self-refining run: weighted rows and validation rows, as a share of each optimizer step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch import Tensor

from ..data.identity import DATA_WEIGHT
from ..estimators.base import WeightedBatch, token_mean
from . import refine_setup, setup
from .bilevel_sft_config import BilevelSFTConfig
from .bilevel_sft_trainer import BilevelSFTTrainer
from .host import TrainerHost
from .self_refine_config import SelfRefineConfig

if TYPE_CHECKING:
    from .validation import ValidationSets

# Settings of the run that the offline part shares.
SHARED = (
    *("output_dir", "seed", "data_seed", "per_device_train_batch_size", "per_device_eval_batch_size"),
    *("gradient_accumulation_steps", "learning_rate", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay"),
    *("max_grad_norm", "bf16", "fp16", "use_cpu", "gradient_checkpointing", "gradient_checkpointing_kwargs"),
    *("disable_tqdm", "max_steps", "max_length", "trust_remote_code", "validation_loss_weight"),
    *("validation_batch_size", "validation_weights", "weight_estimator", "pilot_steps", "pilot_learning_rate"),
    *("pilot_batch_size", "pilot_scored_rows", "pilot_feature_depth", "pilot_smoothing"),
)


class OfflinePart:
    """Prepares the offline rows, learns or takes over their weights, and hands out their part of every step.

    A [`BilevelSFTTrainer`] on the same model does the work; its own training loop is never run.

    Args:
        model, processing_class: of the run.
        args ([`SelfRefineConfig`]): of the run.
        train_dataset (`Dataset`): offline rows; with a column `data_weight`, these weights are used as they are.
        validation (`dict[str, Dataset]`): rows that pull, without those that select.
    """

    def __init__(
        self,
        model: Any,
        args: SelfRefineConfig,
        train_dataset: Dataset,
        validation: Mapping[str, Dataset],
        processing_class: Any,
    ):
        settings = {name: getattr(args, name) for name in SHARED}
        if args.weight_estimator == "none" and DATA_WEIGHT not in train_dataset.column_names:
            train_dataset = train_dataset.add_column(DATA_WEIGHT, [1.0] * len(train_dataset))
        if DATA_WEIGHT in train_dataset.column_names:
            settings["weight_estimator"] = "none"
        config = BilevelSFTConfig(**settings, selector_weighting="resample", report_to="none")
        self.trainer = BilevelSFTTrainer(
            model,
            config,
            train_dataset=refine_setup.with_template(args, train_dataset),
            validation_dataset={name: refine_setup.with_template(args, rows) for name, rows in validation.items()},
            processing_class=processing_class,
        )
        self.trainer.state.max_steps = args.max_steps
        self.host = TrainerHost(self.trainer)
        self._epoch = -1
        self._rows: list[int] = []

    @property
    def validation(self) -> ValidationSets:
        """The sets that pull."""
        assert self.trainer.pulling is not None
        return self.trainer.pulling

    def start(self) -> None:
        """Have weights ready: given ones, or those of a pilot run (unless a checkpoint has brought them)."""
        self.trainer.start_selection()

    def weights(self) -> Tensor:
        """Explicit weights of the caller's rows, float32 `[rows]`, NaN for rows that preparation dropped."""
        return self.trainer.sample_weights()

    def _step_rows(self, step: int) -> list[int]:
        """Dataset positions of the rows of an optimizer step, over all processes: a pure function of the step."""
        per_step, total = setup.rows_per_step(self.trainer), len(self.trainer.row_order())
        rows = []
        for number in range(step * per_step, (step + 1) * per_step):
            if number // total != self._epoch:
                self._epoch = number // total
                self._rows = list(self.trainer.weighted_sampler(lambda: self._epoch))
            rows.append(self._rows[number % total])
        return rows

    def window(self, step: int) -> list[dict[str, Any]]:
        """This process's offline rows of an optimizer step, collated, one entry per micro-batch."""
        trainer, args = self.trainer, self.trainer.args
        rows = self._step_rows(step)[args.process_index :: trainer.accelerator.num_processes]
        size = math.ceil(len(rows) / args.gradient_accumulation_steps)
        return [trainer.collate_rows(rows[start : start + size]) for start in range(0, len(rows), size)]

    def micro_batches(
        self, step: int, window: list[dict[str, Any]], training_weight: float, validation_weight: float
    ) -> list[WeightedBatch]:
        """The batches of a step and the factors of their rows' summed losses.

        Summed over micro-batches and processes, factors times losses are `training_weight` times the mean token loss
        of the offline rows plus `validation_weight` times the validation loss.
        """
        args = self.trainer.args
        offline = [(batch, training_weight * factor) for batch, factor in token_mean(self.host, window, args.device)]
        if validation_weight == 0:
            return offline
        drawn = self.validation.step_batch(step, len(window), args.process_index, args.world_size)
        out: list[WeightedBatch] = []
        for (batch, factor), rows, weights in zip(offline, drawn.batches, drawn.row_weights, strict=True):
            if rows is not None:
                batch = self.validation.join(batch, self.trainer._prepare_inputs(rows))
                factor = torch.cat([factor, validation_weight * weights.to(factor.device)])
            out.append((batch, factor))
        return out
