"""What the estimators see of a TRL trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core.scores import RowLosses, row_losses
from ..data.identity import SAMPLE_ID
from ..estimators.base import WeightedBatch
from .validation import ValidationSets

if TYPE_CHECKING:
    from .bilevel_sft_trainer import BilevelSFTTrainer


class TrainerHost:
    """Implements `estimators.EstimatorHost` on a `BilevelSFTTrainer`.

    Forwards run on the unwrapped model (`accelerate` has put autocast into it): DDP's reducer belongs to the model's
    own backward, the estimators reduce their few gradients themselves.
    """

    def __init__(self, trainer: BilevelSFTTrainer):
        self.trainer = trainer
        self._parameters = [p for p in trainer.model.parameters() if p.requires_grad]

    def trainable_parameters(self) -> list[torch.nn.Parameter]:
        """The parameters that training changes, in the model's order."""
        return self._parameters

    def row_losses(self, batch: Mapping[str, Any]) -> RowLosses:
        """Losses of the rows, through TRL's fused LM head (no full logits)."""
        inputs = self.trainer._prepare_inputs({k: v for k, v in batch.items() if k != SAMPLE_ID})
        with self.trainer.compute_loss_context_manager():
            outputs = self.trainer.model(**inputs, use_cache=False, fused_lm_head=True)
        return row_losses(outputs.log_probs, outputs.label_mask)

    @property
    def validation(self) -> ValidationSets:
        """The sets that pull."""
        assert self.trainer.validation is not None
        return self.trainer.validation

    def validation_batches(self, step: int) -> Sequence[WeightedBatch]:
        """This process's validation rows of a step, in as many micro-batches as the step has, with their weights."""
        args = self.trainer.args
        drawn = self.validation.step_batch(step, args.gradient_accumulation_steps, args.process_index, args.world_size)
        return [
            (self.trainer._prepare_inputs(dict(batch)), weights)
            for batch, weights in zip(drawn.batches, drawn.row_weights, strict=True)
            if batch is not None
        ]

    def global_sum(self, value: Tensor) -> Tensor:
        """Sum over the processes."""
        if self.trainer.args.world_size == 1:
            return value
        return self.trainer.accelerator.reduce(value.to(self.trainer.args.device), reduction="sum")

    def learning_rate(self) -> float:
        """Learning rate of the coming step."""
        return float(self.trainer.optimizer.param_groups[0]["lr"])

    def current_step(self) -> int:
        """Optimizer steps done."""
        return int(self.trainer.state.global_step)


class DetachedHost(TrainerHost):
    """A trainer as estimators see it outside of its steps: own clock, own learning rate, own validation rows."""

    def __init__(
        self, trainer: BilevelSFTTrainer, validation: ValidationSets, learning_rate: float | Callable[[], float]
    ):
        super().__init__(trainer)
        self._validation = validation
        self.rate = learning_rate
        self.step = 0

    @property
    def validation(self) -> ValidationSets:
        """The sets that pull."""
        return self._validation

    def learning_rate(self) -> float:
        """A constant, or what the given function says."""
        return self.rate() if callable(self.rate) else self.rate

    def current_step(self) -> int:
        """What `step` was set to."""
        return self.step
