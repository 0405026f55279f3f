"""Weights that move with every training step: the simultaneous update of the published methods, for reproduction.

The presets `"paper"` and `"seal"` score a row by its own loss under the model that the trusted rows pull, and move all
weights by Adam (values of the authors' code and of SEAL's). `"sparse_centred"` scores by the difference to a second
set of the model's parameters, which learns the same rows without trusted ones (the value function; SEAL, Algorithm 1),
and moves the weights of the batch. Both rank less well than choosing before training (docs/results.md). Nothing else
in the package depends on this file.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core import selector
from ..core.scores import RowLosses, difference_score
from .state import TrainingWeights


@dataclass(frozen=True)
class Recipe:
    """How weights move.

    Attributes:
        learning_rate (`float`), entropy_coef (`float`): of the logits.
        warmup (`float`): share of the steps with equal weights: both ends of a difference have to learn rows first.
        tracks (`bool`): scores are differences to a tracker, and move the batch's rows alone; else they are the
            rows' losses, and dense Adam moves all.
    """

    learning_rate: float
    entropy_coef: float = 0.0
    warmup: float = 0.0
    tracks: bool = False


RECIPES = {
    "paper": Recipe(1e-4),
    "seal": Recipe(5e-3),
    "sparse_centred": Recipe(0.5, entropy_coef=0.02, warmup=0.17, tracks=True),
}
# Of Adam on the logits.
BETAS = (0.9, 0.95)


class Tracker:
    """The lower level: a second set of the model's trainable parameters that learns the rows without trusted ones.

    One frozen base serves both: within `swapped()` the model computes with the second set, and its gradients go there.
    The cost is one more copy of the trainable parameters with AdamW's state, and one more forward and backward a step.

    Args:
        model: whose trainable parameters these are.
        betas, eps, weight_decay, max_grad_norm: of the model's own optimizer.
    """

    def __init__(
        self, model: torch.nn.Module, betas: tuple[float, float], eps: float, weight_decay: float, max_grad_norm: float
    ):
        self.model = model
        self.values = [torch.nn.Parameter(p.detach().clone()) for p in self.parameters]
        self.max_grad_norm = max_grad_norm
        self.optimizer = torch.optim.AdamW(self.values, lr=0.0, betas=betas, eps=eps, weight_decay=weight_decay)

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """The model's trainable parameters. Asked for each time: PEFT makes new ones when it loads an adapter."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Let the model compute with the second set; the tensors change places, nothing is copied."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for own, other in zip(self.parameters, self.values, strict=True):
            own.data, other.data = other.data, own.data

    def step(
        self,
        batches: Sequence[Mapping[str, Any]],
        factor: Tensor,
        row_losses: Callable[[Mapping[str, Any]], RowLosses],
        total: Callable[[Tensor], Tensor],
        learning_rate: float,
    ) -> list[Tensor]:
        """One step on the rows' losses times `factor`; returns their mean losses `[b]` before it, per batch.

        Forward and backward run within the swap, so that gradient checkpointing computes again with the right values.
        The model's own gradients must be empty. `total` sums a tensor over the processes.
        """
        losses = []
        with self.swapped():
            for batch in batches:
                found = row_losses(batch)
                (factor.to(found.sums.device) * found.sums).sum().backward()
                losses.append(found.means())
            for own, other in zip(self.parameters, self.values, strict=True):
                other.grad, own.grad = own.grad, None
        for value in self.values:
            # A process without rows still takes part in the sum.
            value.grad = total(torch.zeros_like(value) if value.grad is None else value.grad)
        limit = self.max_grad_norm if self.max_grad_norm > 0 else torch.inf
        norm = torch.nn.utils.clip_grad_norm_(self.values, limit)
        self.optimizer.param_groups[0]["lr"] = learning_rate
        # A row with a NaN loss is about to stop the run: the state that is saved then must not have learned from it.
        if bool(torch.isfinite(norm)):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return losses

    def tensors(self) -> dict[str, Tensor]:
        """Values and optimizer state, by name."""
        out = {f"tracker.{n}": value.detach() for n, value in enumerate(self.values)}
        for n, entry in self.optimizer.state_dict()["state"].items():
            out |= {f"optimizer.{n}.{name}": value for name, value in entry.items()}
        return out

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `tensors()` gave."""
        parts = _parts(tensors)
        with torch.no_grad():
            for n, value in enumerate(self.values):
                value.copy_(parts["tracker"][str(n)])
        state = {int(number): entry for number, entry in _parts(parts.get("optimizer", {})).items()}
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})


class MovingWeights(TrainingWeights):
    """Weights that the scores of every step's rows move; `tracker` is for a recipe that tracks."""

    def __init__(
        self,
        kept: Tensor,
        identity: Mapping[str, Any],
        recipe: Recipe,
        tracker: Tracker | None = None,
        any_identity: bool = False,
    ):
        super().__init__(kept, identity, None, any_identity)
        self.recipe = recipe
        self.tracker = tracker
        self.state = selector.init_selector(kept, adam=not recipe.tracks)
        self.known = True

    def of(self, ids: Tensor) -> Tensor:
        """Weights float32 `[b]` of the given rows, on the CPU, as they are now."""
        return selector.sample_weights(self.state, ids.cpu())

    def update(self, ids: Tensor, losses: Tensor, reference: Tensor | None, step: int, steps: int) -> None:
        """Move weights after step `step` of `steps`, by mean losses `[b]` of its rows under the model and the tracker.

        `ids` (int64 `[b]`) are its rows, of all processes.
        """
        recipe = self.recipe
        if step < math.ceil(recipe.warmup * steps):
            return
        # A row's own loss mixes "harmful" with "hard": low-effort answers become easy, and weights learn to like them.
        scores = (-losses if reference is None else difference_score(reference, losses)).cpu().float()
        ids, rate, pull = ids.cpu(), recipe.learning_rate, recipe.entropy_coef
        if recipe.tracks:
            selector.update_sparse_centred(self.state, ids, scores, learning_rate=rate, entropy_coef=pull)
        else:
            selector.update_adam(self.state, ids, scores, learning_rate=rate, betas=BETAS)
        self.facts |= {"score_mean": float(scores.mean()), "score_std": float(scores.std(unbiased=False))}

    def refresh(self) -> None:
        """Bring `values` and `scores` up to date: O(N), for logs and files."""
        self.values = torch.where(self.kept, selector.sample_weights(self.state, slice(None)), torch.nan)
        self.scores = self.state.score_mean.clone()

    def loss_scale(self, tokens: Tensor) -> float:
        """1: as published, a step divides by the tokens of its rows."""
        return 1.0

    def metrics(self) -> dict[str, float]:
        """As the parent's."""
        self.refresh()
        return super().metrics()

    def tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint needs."""
        self.refresh()
        tracked = {} if self.tracker is None else self.tracker.tensors()
        moving = {f"selector.{name}": value for name, value in self.state.tensors().items()}
        return super().tensors() | moving | {f"lower.{name}": value for name, value in tracked.items()}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `tensors` gave."""
        super().load_tensors(tensors)
        parts = _parts(tensors)
        self.state.load_tensors(parts.get("selector", {}))
        if self.tracker is not None:
            self.tracker.load_tensors(parts["lower"])


def _parts(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Tensors by the first part of their names and the rest."""
    out: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        part, _, name = key.partition(".")
        out.setdefault(part, {})[name] = tensor
    return out
