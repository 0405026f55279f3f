"""What the estimators see of a TRL trainer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core.scores import RowLosses, row_losses
from ..data.identity import SAMPLE_ID, SEGMENTS
from ..estimators.base import SecondMoment, WeightedBatch
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

    @property
    def model(self) -> torch.nn.Module:
        """The unwrapped model."""
        return self.trainer.model

    @property
    def optimizer(self) -> Any:
        """What steps the model's parameters; `None` before training."""
        return self.trainer.optimizer

    def trainable_parameters(self) -> list[torch.nn.Parameter]:
        """The parameters that training changes, in the model's order."""
        return self._parameters

    def row_losses(self, batch: Mapping[str, Any]) -> RowLosses:
        """Losses of the rows, through TRL's fused LM head (no full logits)."""
        segments = batch.get(SEGMENTS)
        inputs = self.trainer._prepare_inputs({k: v for k, v in batch.items() if k not in (SAMPLE_ID, SEGMENTS)})
        with self.trainer.compute_loss_context_manager():
            outputs = self.trainer.model(**inputs, use_cache=False, fused_lm_head=True)
        if segments is None:
            return row_losses(outputs.log_probs, outputs.label_mask)
        segments = segments[:, 1:].to(outputs.log_probs.device)
        return row_losses(outputs.log_probs, outputs.label_mask, segments, len(batch[SAMPLE_ID]))

    @property
    def validation(self) -> ValidationSets:
        """The sets that pull."""
        assert self.trainer.pulling is not None
        return self.trainer.pulling

    def validation_batches(self, step: int) -> Sequence[WeightedBatch]:
        """This process's validation rows of a step, in as many micro-batches as the step has, with their weights.

        In more of them where `auto_find_batch_size` has shrunk those of training.
        """
        args = self.trainer.args
        shrunk = math.ceil(args.per_device_train_batch_size / self.trainer._train_batch_size)
        micro_batches = args.gradient_accumulation_steps * max(1, shrunk)
        drawn = self.validation.step_batch(step, micro_batches, args.process_index, args.world_size)
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

    def second_moments(self, parameters: Sequence[torch.nn.Parameter]) -> list[SecondMoment | None]:
        """Those of `torch.optim`'s Adam and AdamW; 8-bit ones are quantised, and left alone."""
        found: dict[int, SecondMoment] = {}
        for group in [] if self.optimizer is None else self.optimizer.param_groups:
            for parameter in group["params"]:
                state = self.optimizer.state.get(parameter, {})
                if "exp_avg_sq" in state:
                    step = torch.as_tensor(state["step"])
                    found[id(parameter)] = SecondMoment(state["exp_avg_sq"], step, group["betas"][1], group["eps"])
        return [found.get(id(parameter)) for parameter in parameters]


class DetachedHost(TrainerHost):
    """A trainer as estimators see it outside of its steps: own clock, learning rate, validation rows, optimizer.

    `step` and `optimizer` (`None` if nothing steps the parameters) are for the owner to set.
    """

    def __init__(
        self, trainer: BilevelSFTTrainer, validation: ValidationSets, learning_rate: float | Callable[[], float]
    ):
        super().__init__(trainer)
        self._validation = validation
        self.rate = learning_rate
        self.step = 0
        self._optimizer: torch.optim.Optimizer | None = None

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """What `optimizer` was set to."""
        return self._optimizer

    @optimizer.setter
    def optimizer(self, value: torch.optim.Optimizer | None) -> None:
        self._optimizer = value

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
