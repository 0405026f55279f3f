"""The pilot: two ends of a difference, trained for a few steps on adapters of their own, and the scores they give.

The score of a row is the share by which the trusted rows lower its loss: `1 - ell(pulled) / ell(mixture)`. Both ends
learn the training rows by the same recipe, from the same values; only one is pulled by the trusted rows. Without that
pull both are the same to the last bit, and all scores are 0.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.scores import difference_scores
from ..data.batches import TrustedSampler
from ..data.rows import Rows, batched
from ..data.trusted import TrustedSets
from .adapters import Adapter
from .errors import NonFiniteScoreError
from .language_model import LanguageModel, checkpointed
from .settings import PILOT_ROWS

# Tokens of a batch, padding included: as many rows of similar length as fit into it. A constant, so that scores are
# the same whatever the batch size of the training.
BATCH_TOKENS, BATCH_ROWS = 4096, 64
# Of the gradient, at either end.
MAX_GRAD_NORM = 1.0
# What a step's loss is multiplied by, and its gradient divided by: float16 layers lose the gradients of a mean over
# many tokens. A power of two changes no digit elsewhere.
LOSS_SCALE = 1024.0
# Share of the trusted rows in the loss of the end that they pull.
PULL = 0.5


@dataclass(frozen=True)
class PilotRecipe:
    """How the two ends are trained.

    Attributes:
        steps, learning_rate: of AdamW, constant, without weight decay.
        seed (`int`): of the adapters and of the order of the rows.
        pull (`float`): share of the trusted rows in the loss of the end that they pull.
        checkpointing (`bool`): compute the layers again in the backward, to save memory.
    """

    steps: int
    learning_rate: float
    seed: int
    pull: float = PULL
    checkpointing: bool = False


class Pilot:
    """Trains the two ends, and scores rows by them, within `left_as_it_was`."""

    def __init__(self, model: LanguageModel, recipe: PilotRecipe):
        self.model = model
        self.recipe = recipe
        layers = model.decoder()[1]
        self.mixture, self.pulled = Adapter(layers, recipe.seed), Adapter(layers, recipe.seed)

    @property
    def bytes(self) -> int:
        """Memory of both ends while they are trained: values, gradients and two moments, in float32."""
        return 2 * 4 * sum(4 * value.numel() for value in self.mixture.values)

    def train(self, rows: Rows, trusted: TrustedSets, done: Callable[[float], None] = lambda tokens: None) -> None:
        """Train both ends; `done` is told of the tokens that have passed.

        Raises:
            NonFiniteScoreError: if a gradient is NaN or infinite.
        """
        recipe, layers = self.recipe, self.model.decoder()[1]
        order = rows.order(recipe.seed)
        sampler = TrustedSampler(len(order), PILOT_ROWS, recipe.seed + 7919)
        draws = trusted.samplers(PILOT_ROWS, recipe.seed)
        optimizers = {id(end): adamw(end, recipe.learning_rate) for end in (self.mixture, self.pulled)}
        with checkpointed(layers if recipe.checkpointing else []):
            for step in range(recipe.steps):
                places = order[sampler.rows(step)].tolist()
                batches = [rows.batch(part) for part in rows.batches(places, BATCH_TOKENS, BATCH_ROWS)]
                weighted = _token_mean(batches)
                shares = [(b, (1 - recipe.pull) * f) for b, f in weighted]
                if recipe.pull > 0:
                    shares += [(b, recipe.pull * f) for b, f in trusted_batches(trusted, draws, step)]
                ends = [(self.mixture, weighted), (self.pulled, shares)]
                for end, parts in ends:
                    train_step(self.model, end, optimizers[id(end)], parts)
                done(sum(b["input_ids"].numel() for _, parts in ends for b, _ in parts))

    @torch.no_grad()
    def scores(self, batch: Any) -> Tensor:
        """Scores of rows float32 `[b, 2]` on the CPU: of the answer, and the surprise of its end."""
        with self.mixture.added():
            mixture = self.model.row_losses(batch)
        with self.pulled.added():
            pulled = self.model.row_losses(batch)
        return difference_scores(mixture, pulled).float().cpu()

    def tensors(self) -> dict[str, Tensor]:
        """Both ends, for a file."""
        return self.mixture.tensors("mixture") | self.pulled.tensors("pulled")

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `tensors` gave."""
        self.mixture.load_tensors("mixture", tensors)
        self.pulled.load_tensors("pulled", tensors)


def pilot_tokens(rows: Rows, trusted: TrustedSets, recipe: PilotRecipe) -> float:
    """About how many tokens pass through the model while the ends are trained."""
    row = sum(rows.lengths) / max(1, len(rows))
    own = sum(sum(part.lengths) for part in trusted.sets.values()) / max(1, len(trusted))
    return PILOT_ROWS * recipe.steps * (2 * row + own)


def adamw(adapter: Adapter, learning_rate: float) -> torch.optim.Optimizer:
    """What trains an adapter: the same for both ends, and for a look-ahead."""
    return torch.optim.AdamW(adapter.values, lr=learning_rate, weight_decay=0.0)


def train_step(
    model: LanguageModel, adapter: Adapter, optimizer: torch.optim.Optimizer, parts: list[tuple[Any, Tensor]]
) -> None:
    """One step of an adapter on weighted sums of row losses, within `left_as_it_was`.

    Args:
        parts: batches, and what the summed loss of each of their rows is multiplied by.

    Raises:
        NonFiniteScoreError: if a gradient is NaN or infinite.
    """
    with adapter.added():
        for batch, factors in parts:
            sums = model.row_losses(batch).sums
            (LOSS_SCALE * factors.to(sums.device) * sums).sum().backward()
    for value in adapter.values:
        if value.grad is not None:
            value.grad /= LOSS_SCALE
    norm = torch.nn.utils.clip_grad_norm_(adapter.values, MAX_GRAD_NORM)
    if not bool(torch.isfinite(norm)):
        raise NonFiniteScoreError(
            "An adapter that scores rows has a NaN or infinite gradient. Lower `pilot_learning_rate` (now "
            f"{optimizer.param_groups[0]['lr']:g}), use bf16 instead of fp16, or look for odd rows."
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _token_mean(batches: list[Any]) -> list[tuple[Any, Tensor]]:
    """Batches with factors of their rows, such that the loss is the mean over all scored tokens."""
    tokens = sum(_scored(batch).sum() for batch in batches)
    return [(batch, torch.full((len(batch["labels"]),), 1.0 / max(1.0, float(tokens)))) for batch in batches]


def trusted_batches(trusted: TrustedSets, draws: dict[str, TrustedSampler], step: int) -> list[tuple[Any, Tensor]]:
    """The trusted rows of a step in batches, each row collated once, with factors that make up their loss."""
    drawn = [(name, place) for name, sampler in draws.items() for place in sampler.rows(step)]
    lengths = {n: trusted.sets[name].lengths[place] for n, (name, place) in enumerate(drawn)}
    parts = [[drawn[n] for n in part] for part in batched(lengths, BATCH_TOKENS, BATCH_ROWS)]
    batches = [trusted.batch(part) for part in parts]
    factors = trusted.row_factors([row for part in parts for row in part], torch.cat([_scored(b) for b in batches]))
    return list(zip(batches, factors.split([len(part) for part in parts]), strict=True))


def in_batches(lengths: Sequence[int], values: Callable[[list[int]], Tensor]) -> Tensor:
    """Values of rows in their order, `[n, ...]`, computed in batches of similar length.

    `lengths` are the rows' tokens, and `values` gives the values `[b, ...]` of the rows at some places.
    """
    parts = batched(dict(enumerate(lengths)), BATCH_TOKENS, BATCH_ROWS)
    places = torch.tensor([place for part in parts for place in part])
    return torch.cat([values(part) for part in parts])[places.argsort()]


def trusted_values(trusted: TrustedSets, values: Callable[[Any], Tensor]) -> Tensor:
    """Values of all trusted rows in the order of `places()`, `[c, ...]`; `values` gives those of a batch."""
    places = trusted.places()
    lengths = [trusted.sets[name].lengths[place] for name, place in places]
    return in_batches(lengths, lambda part: values(trusted.batch([places[n] for n in part])))


def _scored(batch: Any) -> Tensor:
    """Tokens of each row that the loss counts, `[b]`: after collation, since a collator may mask more."""
    return (batch["labels"][..., 1:] != -100).sum(-1).cpu()
