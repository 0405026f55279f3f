"""Weighted losses: the factor of every row's loss, and the trusted rows that join a step.

Used where weights multiply losses (packing, streams, given weights, weights that move) and where the model is trained
on trusted rows. Rows that are drawn by their weights need none of it: they train as `SFTTrainer` trains any rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..core.scores import row_losses
from ..data.batches import TrustedSampler, concatenate_batches
from ..data.identity import SAMPLE_ID, SEGMENTS
from ..data.rows import Collate
from ..data.trusted import TrustedSets
from ..weights.language_model import LanguageModel
from ..weights.processes import Processes
from ..weights.state import TrainingWeights

ROW_FACTOR = "row_factor"
NO_ROW = -2


@dataclass
class TrustedPart:
    """The trusted rows in the objective: `lambda L_val + (1 - lambda) L_train`.

    Attributes:
        sets: the rows, which can join the batches of training rows as they are collated.
        weight (`float`): lambda.
        draws: which rows a step has.
        pad_token_id (`int`): for joining batches.
        processes: this one among the others.
    """

    sets: TrustedSets
    weight: float
    draws: dict[str, TrustedSampler]
    pad_token_id: int
    processes: Processes

    @classmethod
    def of(
        cls, trusted: TrustedSets, collate: Collate, weight: float, rows_per_step: int, seed: int, pad_token_id: int
    ) -> TrustedPart:
        """So many trusted rows a step (at least one), collated as the training rows are."""
        sets = {name: replace(rows, collate=collate) for name, rows in trusted.sets.items()}
        own = TrustedSets(sets, trusted.weights)
        return cls(own, weight, own.samplers(max(1, rows_per_step), seed), pad_token_id, Processes.now())

    def batches(self, step: int, micro_batches: int, share: float = 1.0) -> list[tuple[dict[str, Any] | None, Tensor]]:
        """This process's rows of each micro-batch of a step, collated, and the factors of their summed losses.

        Summed over micro-batches and processes, factors times losses are `lambda L_val`.

        Args:
            share (`float`): of the rows of a whole step, in a short window at the end of an epoch.
        """
        parts = {name: sampler.rows(step) for name, sampler in self.draws.items()}
        drawn = [(name, place) for name, rows in parts.items() for place in rows[: math.ceil(share * len(rows))]]
        rank, count = self.processes.rank, self.processes.count
        mine = [drawn[micro * count + rank :: micro_batches * count] for micro in range(micro_batches)]
        batches = [self.sets.batch(part) if part else None for part in mine]
        # Counted after collation: a collator of the user's may mask more. Each process counts its own rows.
        counts = dict.fromkeys(self.sets.sets, 0.0)
        for part, batch in zip(mine, batches, strict=True):
            for (name, _), tokens in zip(part, [] if batch is None else tokens_of(batch).tolist(), strict=True):
                counts[name] += tokens
        totals = self.processes.sum(torch.tensor(list(counts.values()))).clamp(min=1).tolist()
        factors = {
            name: self.weight * self.sets.weights[name] / total for name, total in zip(counts, totals, strict=True)
        }
        return [
            (batch, torch.tensor([factors[name] for name, _ in part]))
            for part, batch in zip(mine, batches, strict=True)
        ]

    def join(self, batch: dict[str, Any], rows: dict[str, Any]) -> dict[str, Any]:
        """A batch of training rows, and trusted rows after them."""
        # Rows of a stream have no numbers.
        known = {name: value for name, value in rows.items() if name in batch}
        return concatenate_batches(batch, known, self.pad_token_id)


@dataclass
class WeightedObjective:
    """What makes the plain loss of a step the weighted one. Owned by the trainer, which is handed in nowhere.

    Attributes:
        weights (`TrainingWeights`, *optional*): that multiply losses; None if rows are drawn by them, or count alike.
        scale (`float`): see `TrainingWeights.loss_scale`.
        trusted (`TrustedPart`, *optional*): rows that the model is trained on as well.
        moving: weights that move (`weights/published.py`), if they do.
        model: for the lower level of such weights.
        processes: this one among the others.
    """

    weights: TrainingWeights | None
    scale: float
    trusted: TrustedPart | None
    moving: Any
    model: LanguageModel
    processes: Processes

    def begin(self, batches: Sequence[dict[str, Any]], num_items: Any, at: StepFacts) -> WeightedStep:
        """The micro-batches of a step, with the factors of their rows.

        Args:
            batches: collated training micro-batches of this process, on its device.
            num_items (`Tensor`): tokens of the step over all processes, by which TRL divides the sum of all losses.
        """
        references = None
        if self.moving is not None and self.moving.tracker is not None:
            counts = [(batch["labels"][..., 1:] != -100).sum() for batch in batches]
            tokens = self.processes.total(torch.stack(counts).sum())
            factor = 1.0 / tokens.clamp(min=1)
            references = self.moving.tracker.step(
                batches, factor, self.model.row_losses, self.processes.total, at.learning_rate
            )
        weight = 0.0 if self.trusted is None else self.trusted.weight
        step = WeightedStep(list(batches), references)
        trusted: list[tuple[dict[str, Any] | None, Tensor]] = [(None, torch.zeros(0))] * len(batches)
        if self.trusted is not None:
            trusted = self.trusted.batches(at.step, len(batches), min(1.0, len(batches) / at.micro_batches))
        for batch, (rows, scale) in zip(batches, trusted, strict=True):
            device = batch["input_ids"].device
            factor = torch.full((number_of_rows(batch),), 1.0 - weight, device=device)
            if self.weights is not None:
                own = self.weights.of_batch(batch, batch.get(SAMPLE_ID, torch.zeros(0)))
                factor = factor * self.scale * own.to(device)
            inputs = dict(batch)
            if rows is not None:
                assert self.trusted is not None
                inputs = self.trusted.join(batch, rows)
                # TRL divides by the training tokens: undone for trusted rows, which carry their own divisor.
                factor = torch.cat([factor, scale.to(device) * num_items])
            step.inputs.append(inputs | {ROW_FACTOR: factor})
        return step

    def finish(self, step: WeightedStep, at: StepFacts) -> Tensor:
        """After the last backward of a step: move weights that move.

        Returns:
            `Tensor` int64: training rows (of all processes) with a NaN or infinite loss; -1 stands for trusted rows.
        """
        ids, losses = torch.cat(step.ids), torch.cat(step.losses)
        parts = [ids, losses] + ([] if step.references is None else [torch.cat(step.references)])
        ids, losses, *reference = self._gather_rows([part.cpu() for part in parts])
        trusted = torch.cat(step.trusted_losses) if step.trusted_losses else losses[:0]
        sound = self.processes.all(torch.isfinite(trusted).all().reshape(1))
        bad = ids[~torch.isfinite(losses)]
        if not bool(sound.all()):
            bad = torch.cat([bad, torch.full((1,), -1, device=bad.device, dtype=bad.dtype)])
        if self.moving is not None and len(bad) == 0:
            self.moving.update(ids, losses, reference[0] if reference else None, at.step, at.max_steps)
        return bad

    def _gather_rows(self, values: list[Tensor]) -> list[Tensor]:
        """Values of the rows of all processes, which may have different numbers of them; the first ones are ids."""
        if self.processes.count == 1:
            return values
        most = int(self.processes.all(torch.tensor([len(values[0])])).max())
        padded = [torch.nn.functional.pad(value, (0, most - len(value)), value=NO_ROW) for value in values]
        gathered = [self.processes.all(part) for part in padded]
        own = gathered[0] != NO_ROW
        return [part[own] for part in gathered]


@dataclass(frozen=True)
class StepFacts:
    """Where training is: steps done, steps in all, micro-batches of a whole step, learning rate of the coming one."""

    step: int
    max_steps: int
    micro_batches: int
    learning_rate: float


@dataclass
class WeightedStep:
    """The micro-batches of one optimizer step on this process, and what their forwards say of the rows.

    Attributes:
        batches: the training rows alone.
        references: losses of the rows under the lower level, per micro-batch; None if there is none.
        inputs: with trusted rows and factors.
        ids, losses, trusted_losses: what has been seen so far.
    """

    batches: list[dict[str, Any]]
    references: list[Tensor] | None
    inputs: list[dict[str, Any]] = field(default_factory=list)
    ids: list[Tensor] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    trusted_losses: list[Tensor] = field(default_factory=list)

    @property
    def next_inputs(self) -> dict[str, Any]:
        """The coming micro-batch."""
        return self.inputs[len(self.ids)]

    @property
    def complete(self) -> bool:
        """True once every micro-batch has been seen."""
        return len(self.ids) == len(self.batches)

    def weigh(self, outputs: Any, ids: Tensor | None, segments: Tensor | None, factor: Tensor) -> Any:
        """Multiply the log-probabilities of a forward by the rows' factors; TRL sums them then.

        Args:
            outputs: of TRL's fused LM head: `log_probs` and `label_mask` `[B, S - 1]`.
            ids (`Tensor` int64 `[R]`, *optional*): training rows first, then trusted ones; a stream's rows have none.
            segments (`Tensor` int64 `[B, S]`, *optional*): row of each token where batch rows hold several.
            factor (`Tensor` float32 `[R]`).
        """
        places = None if segments is None else segments[:, 1:]
        losses = row_losses(outputs.log_probs.detach(), outputs.label_mask, places, len(factor)).means()
        count = number_of_rows(self.batches[len(self.ids)])
        self.ids.append(torch.full((count,), NO_ROW + 1, device=losses.device) if ids is None else ids[:count])
        self.losses.append(losses[:count])
        if len(losses) > count:
            self.trusted_losses.append(losses[count:])
        rows = factor.to(outputs.log_probs.dtype)
        outputs.log_probs = outputs.log_probs * (rows.unsqueeze(-1) if places is None else rows[places])
        return outputs


def number_of_rows(batch: dict[str, Any]) -> int:
    """Rows of a collated batch, however many of them share a batch row."""
    return len(batch.get(SAMPLE_ID, batch["input_ids"]))


def tokens_of(batch: dict[str, Any]) -> Tensor:
    """Tokens of each row of a collated batch that the loss counts, float32 `[R]` on the CPU."""
    scored = (batch["labels"][..., 1:] != -100).float().cpu()
    if SEGMENTS not in batch:
        return scored.sum(-1)
    segments = batch[SEGMENTS][..., 1:].cpu().flatten()
    known = segments >= 0
    return torch.zeros(number_of_rows(batch)).index_add_(0, segments[known], scored.flatten()[known])
