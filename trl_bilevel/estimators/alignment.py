"""`alignment`: inner product of each row's gradient with the direction that lowers the validation loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core import alignment as core
from ..data.identity import SEGMENTS
from .base import Batch, Estimator, EstimatorHost, ShadowParameters, number_of_rows, train_shadow
from .taps import GradientTaps, RowSink, untappable_layers

# Validation batches behind the direction of a scoring pass: it looks at every row once, so a few more cost nothing.
SCORING_DRAWS = 4


class AlignmentEstimator(Estimator):
    """Score by `<grad ell_i(theta), U>`, with `U` the preconditioned gradient of the validation loss, of length 1.

    To first order this is how much a small step on row `i` lowers the validation loss. `U` is cached and refreshed
    every `refresh_steps` optimizer steps; the inner products are read off the backward of the model's own training
    step (`taps.GradientTaps`), so they are exact and need no further forward of training rows.

    Which parameters count: weights and biases of linear layers (LoRA's among them, also on 4-bit bases) and token
    embeddings. Left out of direction and score are norm weights, the LM head, tied embeddings, and other layers'
    parameters (`estimator.taps.left_out` names them).

    Less reliable than a difference of losses: on the real model its weights had an AUC of .74 / .72 / .80 where the
    tracker's had .93 / .94 / .95 (quality task, three seeds: docs/results.md).

    Cost: a thin product per adapter matrix with LoRA; for full fine-tuning one product per layer as large as its
    forward; `draws` validation batches, forward and backward, per refresh.
    Memory: the direction in float32, and as much again for its average (with `averaging`).

    Rows that the training loss multiplies by zero have no gradient, and no score.

    Args:
        host: the trainer.
        refresh_steps (`int`, defaults to `16`): M, optimizer steps between refreshes.
        draws (`int`, defaults to `1`): validation batches of a refresh, averaged.
        averaging (`float`, defaults to `0.5`): decay of the running mean over refreshes, in [0, 1), bias-corrected; 0
            keeps the last one only. A small validation batch is noisier than an older direction is stale.
        precondition (`bool`, defaults to `True`): divide the mean gradient by the root of Adam's second moment, since
            that is how a step would move the parameters; as it is before the optimizer's first step, and with
            optimizers that hold no second moment in full precision. No effect with `displacement`.
        normalise (`bool`, defaults to `False`): divide each score by the norm of the row's own gradient (cosine).
        displacement (`bool`, defaults to `False`): `U = theta - theta_V`, with `theta_V` the model after
            `lookahead_steps` AdamW steps on validation rows, in place of the gradient.
        unit_length (`bool`, defaults to `True`): scale `U` to length 1. Without it, and with `displacement`, a score
            is the look-ahead's to first order: nats per token that the steps take off the row's loss.
        lookahead_steps (`int`, defaults to `4`): K, for `displacement`.
        max_grad_norm (`float`, defaults to `1.0`): clipping of the validation gradient, for `displacement`.

    Raises:
        ValueError: if no trainable parameter can be read.
    """

    name: ClassVar[str] = "alignment"
    needs_reference: ClassVar[bool] = False
    reads_backward: ClassVar[bool] = True

    def __init__(
        self,
        host: EstimatorHost,
        *,
        refresh_steps: int = 16,
        draws: int = 1,
        averaging: float = 0.5,
        precondition: bool = True,
        normalise: bool = False,
        displacement: bool = False,
        unit_length: bool = True,
        lookahead_steps: int = 4,
        max_grad_norm: float = 1.0,
    ):
        super().__init__(host)
        self.refresh_steps = refresh_steps
        self.draws = draws
        self.averaging = averaging
        self.precondition = precondition
        self.normalise = normalise
        self.displacement = displacement
        self.unit_length = unit_length
        self.lookahead_steps = lookahead_steps
        self.max_grad_norm = max_grad_norm
        self.taps: GradientTaps | None = GradientTaps(host.model, untappable_layers(host.model))
        self.average: list[Tensor] = []
        self.refreshes = 0
        self.fresh_at = -1

    # The direction

    def refresh(self, draws: int | None = None) -> None:
        """Take the direction anew from the model's present values (collective: every process takes part)."""
        assert self.taps is not None
        with torch.enable_grad():
            found = self._displacement() if self.displacement else self._gradient(draws or self.draws)
        self.refreshes += 1
        if self.averaging > 0:
            if not self.average:
                self.average = [torch.zeros_like(tensor) for tensor in found]
            torch._foreach_lerp_(self.average, found, 1 - self.averaging)
            # At unit length the bias of the running mean matters to the preconditioner only.
            found = [tensor / (1 - self.averaging**self.refreshes) for tensor in self.average]
        if self.precondition and not self.displacement:
            found = self._preconditioned(found)
        self.taps.direction = core.unit_length(found) if self.unit_length else found
        self.fresh_at = self.host.current_step()

    def _gradient(self, draws: int) -> list[Tensor]:
        """Mean gradient of the validation loss over `draws` batches, by the tapped parameters, float32."""
        assert self.taps is not None
        step, parameters = self.host.current_step(), self.taps.parameters
        with self._gradients_aside():
            for draw in range(draws):
                for batch, weights in self.host.validation_batches(step + draw):
                    sums = self.host.row_losses(batch).sums
                    (weights.to(sums.device) * sums).sum().backward()
            # A process without rows still takes part in the sum.
            own = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        return [self.host.global_sum(gradient.float()) / draws for gradient in own]

    def _displacement(self) -> list[Tensor]:
        """`theta - theta_V`, float32: validation steps go down the gradient, good rows' gradients up."""
        assert self.taps is not None
        shadow = ShadowParameters(self.host.trainable_parameters())
        optimizer = torch.optim.AdamW(shadow.values, lr=0.0, weight_decay=0.0)
        for k in range(self.lookahead_steps):
            batches = self.host.validation_batches(self.host.current_step() + k)
            train_shadow(self.host, shadow, optimizer, batches, self.max_grad_norm)
        moved = dict(zip(map(id, shadow.parameters), shadow.values, strict=True))
        return [p.detach().float() - moved[id(p)].detach().float() for p in self.taps.parameters]

    def _preconditioned(self, gradients: list[Tensor]) -> list[Tensor]:
        assert self.taps is not None
        moments = self.host.second_moments(self.taps.parameters)
        if all(moment is None for moment in moments):
            return gradients
        # Parameters without a moment have never had a gradient: on the scale of the others they would not move.
        return [
            torch.zeros_like(g) if m is None else core.preconditioned(g, m.value, m.step, m.beta, m.eps)
            for g, m in zip(gradients, moments, strict=True)
        ]

    @contextmanager
    def _gradients_aside(self) -> Iterator[None]:
        """Empty the parameters' gradients for a backward of our own, and put them back."""
        parameters = self.host.trainable_parameters()
        kept = [p.grad for p in parameters]
        for p in parameters:
            p.grad = None
        try:
            yield
        finally:
            for p, gradient in zip(parameters, kept, strict=True):
                p.grad = gradient

    # Scores

    def begin_step(self, window: Sequence[Batch]) -> list[Tensor] | None:
        """Refresh the direction when it is due; no reference is needed."""
        if self.taps is not None and (
            self.fresh_at < 0 or self.host.current_step() - self.fresh_at >= self.refresh_steps
        ):
            self.refresh()
        return None

    def watch(self, rows: int, segments: Tensor | None = None) -> AbstractContextManager[RowSink]:
        """Taps for forward and backward of a micro-batch."""
        assert self.taps is not None
        return self.taps.watch(rows, segments=segments, norms=self.normalise)

    def prepare_scoring(self) -> None:
        """Refresh the direction from several validation batches."""
        self.refresh(max(self.draws, SCORING_DRAWS))

    def row_scores(self, batch: Batch) -> Tensor:
        """Score and surprise of the ending, `[b, 2]`, by one forward and backward of the rows.

        The surprise is that of the model as it is, which the pilot run has trained on validation rows too.
        """
        scores, endings = self._score(batch)
        return torch.stack([scores, 1 - torch.exp(-endings)], dim=-1)

    def response_scores(self, batch: Batch) -> Tensor:
        """Inner products `[b]` by one forward and backward of the rows."""
        return self._score(batch)[0]

    def _score(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Scores and losses of the endings, `[b]` each."""
        assert self.taps is not None
        if self.taps.direction is None:
            self.refresh()
        model = self.host.model
        with (
            torch.enable_grad(),
            _checkpointing(model),
            self._gradients_aside(),
            self.watch(number_of_rows(batch), batch.get(SEGMENTS)) as sink,
        ):
            found = self.host.row_losses(batch)
            (found.sums / found.counts).sum().backward()
        return sink.scores(), found.endings.detach()

    # State

    def tensors(self) -> dict[str, Tensor]:
        """The direction, its running mean, and when it was taken."""
        if self.taps is None:
            return {}
        out = {"fresh_at": torch.tensor(self.fresh_at), "refreshes": torch.tensor(self.refreshes)}
        out |= {f"direction.{i}": value for i, value in enumerate(self.taps.direction or [])}
        return out | {f"average.{i}": value for i, value in enumerate(self.average)}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `tensors()` gave."""
        if not tensors:
            self.release()
            return
        assert self.taps is not None
        self.fresh_at, self.refreshes = int(tensors["fresh_at"]), int(tensors["refreshes"])
        self.average = self._loaded(tensors, "average")
        self.taps.direction = self._loaded(tensors, "direction") or None

    def _loaded(self, tensors: dict[str, Tensor], name: str) -> list[Tensor]:
        assert self.taps is not None
        if f"{name}.0" not in tensors:
            return []
        # Cloned: the running mean is changed in place.
        return [tensors[f"{name}.{i}"].to(p.device).clone() for i, p in enumerate(self.taps.parameters)]

    def release(self) -> None:
        """Free the direction and its running mean."""
        self.taps = None
        self.average = []


@contextmanager
def _checkpointing(model: Any) -> Iterator[None]:
    """Let gradient checkpointing work in evaluation mode, where transformers switches it off: train mode, no dropout.

    A scoring pass has larger batches than training; without checkpointing its backward may not fit.
    """
    if model.training or not model.is_gradient_checkpointing:
        yield
        return
    modes = [(layer, layer.training) for layer in model.modules()]
    for layer, _ in modes:
        layer.training = not isinstance(layer, nn.Dropout)
    try:
        yield
    finally:
        for layer, mode in modes:
            layer.training = mode
