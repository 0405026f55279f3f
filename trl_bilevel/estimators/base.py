"""The contract of a weight estimator, and what it may ask of the trainer.

A score says how much training on a row helps the validation loss. An estimator supplies one number per row that the
model's own loss is compared with (the *reference loss*), and a pure function that turns both into the score. The
trainer calls

1. `begin_step(window)` once per optimizer step, before any forward of the model, with all training micro-batches of
   the step; it returns the reference loss of each of their rows (or `None` if the estimator needs none, or takes no
   scores now);
2. `score(model_losses, reference_losses)` for each micro-batch, with the model's losses read off its ordinary forward;
   or, if the estimator `reads_backward`, `watch(rows)` around forward and backward of each micro-batch;
3. `row_scores(batch)` for rows scored out of turn (the scoring pass), `response_scores(batch)` for sampled responses.

The scores of all micro-batches move the selector after the last backward of the step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from ..core.implicit import response_scores
from ..core.scores import RowLosses, difference_scores
from ..data.identity import SAMPLE_ID

Batch = Mapping[str, Any]
#: A batch, and what the summed loss of each of its rows is multiplied by, float32 `[B]`.
WeightedBatch = tuple[Batch, Tensor]


class SecondMoment(NamedTuple):
    """Adam's second moment of a parameter.

    Attributes:
        value (`Tensor`): running mean of squared gradients, in the parameter's shape, not bias-corrected.
        step (`Tensor` `[]`): optimizer steps done.
        beta, eps (`float`): Adam's `beta2` and `eps`.
    """

    value: Tensor
    step: Tensor
    beta: float
    eps: float


class EstimatorHost(Protocol):
    """What a trainer offers to an estimator."""

    @property
    def model(self) -> torch.nn.Module:
        """The model whose forward `row_losses` runs."""

    def trainable_parameters(self) -> list[torch.nn.Parameter]:
        """The parameters that training changes, in a fixed order."""

    def row_losses(self, batch: Batch) -> RowLosses:
        """Forward of the model as it stands."""

    def validation_batches(self, step: int) -> Sequence[WeightedBatch]:
        """This process's validation rows of a step, in micro-batches, with row weights that make up `L_val`."""

    def global_sum(self, value: Tensor) -> Tensor:
        """Sum of a tensor over the processes."""

    def learning_rate(self) -> float:
        """The learning rate of the coming optimizer step."""

    def current_step(self) -> int:
        """Optimizer steps done."""

    def second_moments(self, parameters: Sequence[torch.nn.Parameter]) -> list[SecondMoment | None]:
        """Adam's second moments, `None` for parameters that the optimizer has none of (in full precision)."""


class BackwardReader(Protocol):
    """Reads the scores of a micro-batch's rows off its backward."""

    def attach(self, log_probs: Tensor, scored: Tensor) -> None:
        """Between forward and backward: log-probabilities `[B, S - 1]` of the loss, and which of them it counts."""

    def scores(self) -> Tensor:
        """After the backward: scores `[B]` float32; NaN for a row that the backward multiplied by zero."""


class Estimator(ABC):
    """One way of scoring rows. See the module's docstring for the life of a step."""

    name: ClassVar[str]
    #: True if scores mean nothing unless the model is trained on the validation rows too (lambda > 0).
    needs_validation_term: ClassVar[bool] = False
    #: True if the pilot run trains on validation rows too; False if the model must have learned the mixture alone.
    pilot_sees_validation: ClassVar[bool] = True
    #: True if the estimator has to take part in the steps of a pilot run, whose scores are taken at its end only.
    follows_training: ClassVar[bool] = True
    #: True if `score` needs reference losses (and takes no score on steps without them).
    needs_reference: ClassVar[bool] = True
    #: True if scores come from `watch`, after the backward, and not from `score`.
    reads_backward: ClassVar[bool] = False

    def __init__(self, host: EstimatorHost):
        self.host = host

    @abstractmethod
    def begin_step(self, window: Sequence[Batch]) -> list[Tensor] | None:
        """Reference losses `[b]` (float32, mean per response token) of the rows of each micro-batch, or `None`."""

    def score(self, model_losses: Tensor, reference_losses: Tensor | None) -> Tensor:
        """Scores `[b]` from the model's losses and the reference losses, both `[b]` float32. Larger is better."""
        raise TypeError(f"The estimator {self.name!r} does not score by losses.")

    def watch(self, rows: int, segments: Tensor | None = None) -> AbstractContextManager[BackwardReader]:
        """A context around forward and backward of a micro-batch, for estimators that read it.

        Args:
            rows (`int`): rows of the micro-batch.
            segments (`Tensor` int64 `[B, S]`, *optional*): row of each token where batch rows hold several of them.
        """
        raise TypeError(f"The estimator {self.name!r} does not read backward passes.")

    def prepare_scoring(self) -> None:  # noqa: B027 (only some have something to prepare)
        """Called once, in training mode, before `row_scores` scores all rows in evaluation mode."""

    def loss_pair(self, batch: Batch) -> tuple[RowLosses, RowLosses]:
        """Losses of a batch of rows at both ends of the difference: without validation, and pulled by it.

        By forwards without gradient, on the model as it is.
        """
        raise TypeError(f"The estimator {self.name!r} compares no losses.")

    def row_scores(self, batch: Batch) -> Tensor:
        """Scores `[b, 1 or 2]` of a batch of rows, on the model as it is.

        The first column is what `score` gives; the second, if the estimator judges where answers end, the ending's
        surprise (`core.scores.difference_scores`).
        """
        return difference_scores(*self.loss_pair(batch))

    def response_scores(self, batch: Batch) -> Tensor:
        """Scores `[b]` of sampled responses, the exponent of their implicit weights; no `.grad` is changed.

        In nats per response token, unless the estimator compares no losses.
        """
        reference, model = self.loss_pair(batch)
        return response_scores(reference.means(), model.means())

    def tensors(self) -> dict[str, Tensor]:
        """State to save, as named tensors."""
        return {}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:  # noqa: B027 (most estimators have no state)
        """Restore what `tensors()` gave."""

    def release(self) -> None:  # noqa: B027
        """Drop all state: no further score will be asked for."""


class ShadowParameters:
    """A second set of values for the model's trainable parameters, held outside the model.

    One frozen base serves both: inside `with shadow.swapped():` the model computes with the second set, afterwards
    with its own, bit for bit (the tensors change places, nothing is copied). Works for adapters on frozen (also
    4-bit) bases and for full fine-tuning alike; the cost is one more copy of the *trainable* parameters.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter]):
        self.parameters = list(parameters)
        self.values = [torch.nn.Parameter(p.detach().clone()) for p in self.parameters]

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Let the model compute with the second set."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for own, other in zip(self.parameters, self.values, strict=True):
            own.data, other.data = other.data, own.data

    @torch.no_grad()
    def copy_from_model(self) -> None:
        """Take over the model's present values."""
        for own, other in zip(self.parameters, self.values, strict=True):
            other.copy_(own)

    def take_gradients(self) -> None:
        """Move the gradients that a backward left on the model's parameters to the second set."""
        for own, other in zip(self.parameters, self.values, strict=True):
            other.grad, own.grad = own.grad, None


def train_shadow(
    host: EstimatorHost,
    shadow: ShadowParameters,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[WeightedBatch],
    max_grad_norm: float,
) -> list[Tensor]:
    """One optimizer step of the second set on the weighted loss of `batches`, gradients summed over the processes.

    Forward and backward run within the swap, so that gradient checkpointing recomputes with the right values. The
    model's own gradients must be empty.

    Returns:
        The per-row mean losses `[b]` of each batch, before the step.
    """
    losses: list[Tensor] = []
    with shadow.swapped():
        for batch, weights in batches:
            found = host.row_losses(batch)
            (weights.to(found.sums.device) * found.sums).sum().backward()
            losses.append(found.means())
        shadow.take_gradients()
    for value in shadow.values:
        # A process without rows still takes part in the sum.
        value.grad = host.global_sum(torch.zeros_like(value) if value.grad is None else value.grad)
    norm = torch.nn.utils.clip_grad_norm_(shadow.values, max_grad_norm if max_grad_norm > 0 else torch.inf)
    for group in optimizer.param_groups:
        group["lr"] = host.learning_rate()
    # A row with a NaN loss is about to stop the run: the state that is saved then must not have learned from it.
    if bool(torch.isfinite(norm)):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return losses


def number_of_rows(batch: Batch) -> int:
    """Rows of a collated batch, however many of them share a batch row."""
    return len(batch.get(SAMPLE_ID, batch["input_ids"]))


def token_mean(host: EstimatorHost, batches: Sequence[Batch], device: torch.device) -> list[WeightedBatch]:
    """The batches, weighted such that their loss over all processes is the mean per scored token."""
    counts = [(batch["labels"][..., 1:] != -100).sum().to(device) for batch in batches]
    # A process without a batch still takes part in the sum.
    own = torch.stack(counts).sum() if counts else torch.zeros((), dtype=torch.int64, device=device)
    weight = 1.0 / host.global_sum(own).clamp(min=1)
    return [(batch, weight.expand(number_of_rows(batch))) for batch in batches]


def optimizer_tensors(optimizer: torch.optim.Optimizer, prefix: str) -> dict[str, Tensor]:
    """State of an AdamW optimizer as named tensors."""
    return {
        f"{prefix}.{index}.{name}": value
        for index, entry in optimizer.state_dict()["state"].items()
        for name, value in entry.items()
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], prefix: str) -> None:
    """Restore what `optimizer_tensors` gave."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith(f"{prefix}."):
            index, name = key[len(prefix) + 1 :].split(".", 1)
            state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
