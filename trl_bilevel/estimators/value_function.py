"""`value_function`: the reference estimator, a difference of two losses that both ends have learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ..core.scores import RowLosses, difference_score
from .base import (
    Batch,
    Estimator,
    EstimatorHost,
    ShadowParameters,
    load_optimizer_tensors,
    optimizer_tensors,
    token_mean,
    train_shadow,
)


class ValueFunctionEstimator(Estimator):
    """Score by `ell_i(theta_hat) - ell_i(theta)`, relative to `ell_i(theta_hat)` (V-PBGD; SEAL, Algorithm 1).

    `theta_hat`, the tracker of the lower level, is trained on the same training rows as the model, unweighted and
    without validation rows; the model is pulled by validation. A row that validation makes more likely than training
    alone does is useful. The row's own difficulty cancels.

    Cost: one more forward and backward of the training rows on every step the tracker is trained (about 2x), one more
    copy of the trainable parameters and three of their size for its AdamW state and gradients (small for adapters;
    for full fine-tuning about as much again as the model, its gradients and optimizer take).

    Args:
        host: the trainer.
        every (`int`): train the tracker, and take scores, on every `every`-th step only.
        max_grad_norm (`float`): clipping of the tracker's gradient, as for the model.
        betas, eps, weight_decay: AdamW settings of the tracker, as for the model.
    """

    name: ClassVar[str] = "value_function"
    needs_validation_term: ClassVar[bool] = True

    def __init__(
        self,
        host: EstimatorHost,
        *,
        every: int = 1,
        max_grad_norm: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        super().__init__(host)
        self.every = every
        self.max_grad_norm = max_grad_norm
        self.shadow: ShadowParameters | None = ShadowParameters(host.trainable_parameters())
        self.optimizer = torch.optim.AdamW(self.shadow.values, lr=0.0, betas=betas, eps=eps, weight_decay=weight_decay)

    def begin_step(self, window: Sequence[Batch]) -> list[Tensor] | None:
        """Train the tracker one step on the window; its losses before the step are the reference."""
        if self.shadow is None or self.host.current_step() % self.every:
            return None
        rows = token_mean(self.host, window, self.shadow.values[0].device)
        return train_shadow(self.host, self.shadow, self.optimizer, rows, self.max_grad_norm)

    def score(self, model_losses: Tensor, reference_losses: Tensor | None) -> Tensor:
        """`1 - ell_i(theta) / ell_i(theta_hat)`, `[b]`."""
        assert reference_losses is not None
        return difference_score(reference_losses, model_losses)

    @torch.no_grad()
    def loss_pair(self, batch: Batch) -> tuple[RowLosses, RowLosses]:
        """Two forwards: tracker and model."""
        assert self.shadow is not None
        model = self.host.row_losses(batch)
        with self.shadow.swapped():
            return self.host.row_losses(batch), model

    def tensors(self) -> dict[str, Tensor]:
        """The tracker's values and its optimizer state."""
        if self.shadow is None:
            return {}
        values = {f"tracker.{i}": value.detach() for i, value in enumerate(self.shadow.values)}
        return values | optimizer_tensors(self.optimizer, "optimizer")

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `tensors()` gave; a released tracker stays released."""
        if not tensors:
            self.release()
            return
        assert self.shadow is not None
        with torch.no_grad():
            for i, value in enumerate(self.shadow.values):
                value.copy_(tensors[f"tracker.{i}"])
        load_optimizer_tensors(self.optimizer, tensors, "optimizer")

    def release(self) -> None:
        """Free the tracker and its optimizer."""
        self.shadow = None
        self.optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(0))])
