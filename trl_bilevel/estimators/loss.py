"""`loss`: the published loss-based selector, kept for reproduction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ..core.scores import loss_score
from .base import Batch, Estimator


class LossEstimator(Estimator):
    """Score `-ell_i(theta)` with theta pulled by validation (the selector gradient of the authors' code).

    Free, but easy bad rows invert it: boilerplate and stubs become easy, get a low loss, and so the most weight.
    Measured AUC on boilerplate: below 0.1.
    """

    name: ClassVar[str] = "loss"
    needs_reference: ClassVar[bool] = False
    needs_validation_term: ClassVar[bool] = True

    def begin_step(self, window: Sequence[Batch]) -> list[Tensor] | None:
        """No reference is needed."""
        return None

    def score(self, model_losses: Tensor, reference_losses: Tensor | None) -> Tensor:
        """`-ell_i(theta)`, `[b]`."""
        return loss_score(model_losses)

    @torch.no_grad()
    def row_scores(self, batch: Batch) -> Tensor:
        """One forward without gradient."""
        return loss_score(self.host.row_losses(batch).means()).unsqueeze(-1)
