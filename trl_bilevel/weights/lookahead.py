"""The look-ahead of the rounds: what a few steps on trusted rows would do to the loss of a response."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.implicit import response_scores
from ..data.trusted import TrustedSets
from .adapters import Adapter, adapted_modules
from .language_model import LanguageModel, checkpointed, evaluating, left_as_it_was
from .pilot import adamw, train_step, trusted_batches
from .settings import PILOT_ROWS

# K, steps on trusted rows. All results of rounds were measured with as many (docs/results.md). Few, because the score
# asks where the trusted rows pull the model from where it is, not where it would be once it had learned them.
STEPS = 4


@dataclass
class Lookahead:
    """Scores responses by an adapter of its own that has taken `STEPS` steps on trusted rows.

    The score of a response is its loss under the model less its loss with the adapter, in nats per token: how much
    likelier it is for the model that the trusted rows have pulled. The model is left as it was, to the last bit, and
    every process computes the same.

    Attributes:
        learning_rate (`float`): of AdamW, constant, without weight decay (`pilot_learning_rate`).
        seed (`int`): of the adapter, and of which trusted rows a step has.
        checkpointing (`bool`): compute the layers again in the backward, to save memory.
        steps (`int`): K; with 0 all scores are 0.

    Raises:
        ValueError: if the model has no layers that can be adapted.
    """

    model: LanguageModel
    trusted: TrustedSets
    learning_rate: float
    seed: int
    checkpointing: bool = False
    steps: int = STEPS
    adapter: Adapter | None = None

    def __post_init__(self) -> None:
        self._layers = self.model.decoder()[1]
        self._draws = self.trusted.samplers(PILOT_ROWS, self.seed)
        adapted_modules(self._layers)

    def refresh(self, step: int) -> None:
        """Take the steps anew, from the model as it is; another `step` of the training draws other trusted rows.

        Raises:
            NonFiniteScoreError: if a gradient is NaN or infinite.
        """
        layers = self._layers if self.checkpointing else []
        with left_as_it_was(self.model.model), torch.enable_grad(), checkpointed(layers):
            adapter = Adapter(self._layers, self.seed)
            optimizer = adamw(adapter, self.learning_rate)
            for number in range(step, step + self.steps):
                train_step(self.model, adapter, optimizer, trusted_batches(self.trusted, self._draws, number))
        self.adapter = adapter

    @torch.no_grad()
    def scores(self, batch: Any) -> Tensor:
        """Scores float32 `[b]` of the rows of a padded batch on the CPU, in nats per token; after `refresh`."""
        assert self.adapter is not None, "`refresh` comes first."
        with evaluating(self.model.model):
            now = self.model.row_losses(batch).means()
            with self.adapter.added():
                ahead = self.model.row_losses(batch).means()
        return response_scores(now, ahead).float().cpu()
