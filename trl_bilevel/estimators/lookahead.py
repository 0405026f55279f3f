"""`lookahead`: what a few validation steps would do to each row's loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ..core.scores import RowLosses, difference_score
from .base import Batch, Estimator, EstimatorHost, ShadowParameters, train_shadow


class LookaheadEstimator(Estimator):
    """Score by `ell_i(theta) - ell_i(theta_V)`, relative to `ell_i(theta)`.

    `theta_V` is the model after `lookahead_steps` validation steps.

    Refreshed every `refresh_steps` optimizer steps from the model as it is then. Says nothing before the model has
    learned the training mixture, so scores taken at the very start are worthless.

    Cost: `lookahead_steps` validation steps per refresh, one forward without gradient of the training rows per step,
    and one more copy of the trainable parameters (plus their AdamW state during a refresh).

    Args:
        host: the trainer.
        lookahead_steps (`int`): K, validation steps per refresh.
        refresh_steps (`int`): M, optimizer steps between refreshes.
        max_grad_norm (`float`): clipping of the validation gradient, as for the model.
    """

    name: ClassVar[str] = "lookahead"
    pilot_sees_validation: ClassVar[bool] = False
    follows_training: ClassVar[bool] = False

    def __init__(
        self, host: EstimatorHost, *, lookahead_steps: int = 4, refresh_steps: int = 32, max_grad_norm: float = 1.0
    ):
        super().__init__(host)
        self.lookahead_steps = lookahead_steps
        self.refresh_steps = refresh_steps
        self.max_grad_norm = max_grad_norm
        self.shadow: ShadowParameters | None = ShadowParameters(host.trainable_parameters())
        self.fresh_at = -1

    def refresh(self) -> None:
        """Take `lookahead_steps` validation steps from the model's present values."""
        assert self.shadow is not None
        self.shadow.copy_from_model()
        optimizer = torch.optim.AdamW(self.shadow.values, lr=0.0, weight_decay=0.0)
        step = self.host.current_step()
        for k in range(self.lookahead_steps):
            batches = self.host.validation_batches(step + k)
            train_shadow(self.host, self.shadow, optimizer, batches, self.max_grad_norm)
        self.fresh_at = step

    def prepare_scoring(self) -> None:
        """Refresh `theta_V`, while gradient checkpointing is still at work."""
        self.refresh()

    def begin_step(self, window: Sequence[Batch]) -> list[Tensor] | None:
        """Losses of the rows under `theta_V`, without gradient."""
        if self.shadow is None:
            return None
        if self.fresh_at < 0 or self.host.current_step() - self.fresh_at >= self.refresh_steps:
            self.refresh()
        with torch.no_grad(), self.shadow.swapped():
            return [self.host.row_losses(batch).means() for batch in window]

    def score(self, model_losses: Tensor, reference_losses: Tensor | None) -> Tensor:
        """`1 - ell_i(theta_V) / ell_i(theta)`, `[b]`."""
        assert reference_losses is not None
        return difference_score(model_losses, reference_losses)

    @torch.no_grad()
    def loss_pair(self, batch: Batch) -> tuple[RowLosses, RowLosses]:
        """Two forwards: model and `theta_V`, refreshed if it is not of this step."""
        assert self.shadow is not None
        if self.fresh_at != self.host.current_step():
            with torch.enable_grad():
                self.refresh()
        model = self.host.row_losses(batch)
        with self.shadow.swapped():
            return model, self.host.row_losses(batch)

    def tensors(self) -> dict[str, Tensor]:
        """`theta_V` and the step it was made at."""
        if self.shadow is None:
            return {}
        values = {f"lookahead.{i}": value.detach() for i, value in enumerate(self.shadow.values)}
        return values | {"fresh_at": torch.tensor(self.fresh_at)}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `tensors()` gave."""
        if not tensors:
            self.release()
            return
        assert self.shadow is not None
        with torch.no_grad():
            for i, value in enumerate(self.shadow.values):
                value.copy_(tensors[f"lookahead.{i}"])
        self.fresh_at = int(tensors["fresh_at"])

    def release(self) -> None:
        """Free `theta_V`."""
        self.shadow = None
