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
        sets: the rows; collated as the training rows are, so that they can join their batches.
        weight (`float`): lambda.
        draws: which rows a step has.
        pad_token_id (`int`): for joining batches.
    """

    sets: TrustedSets
    weight: float
    draws: dict[str, TrustedSampler]
    pad_token_id: int

    @classmethod
    def of(
        cls, trusted: TrustedSets, collate: Collate, weight: float, rows_per_step: int, seed: int, pad_token_id: int
    ) -> TrustedPart:
        """A quarter as many trusted rows a step as training rows, collated as these are."""
        sets = {name: replace(rows, collate=collate) for name, rows in trusted.sets.items()}
        own = TrustedSets(sets, trusted.weights)
        return cls(own, weight, own.samplers(max(1, rows_per_step // 4), seed), pad_token_id)

    def rows(self, step: int, share: float) -> list[tuple[str, int]]:
        """The rows of a step; of a short window at the end of an epoch, its share of them."""
        drawn = {name: sampler.rows(step) for name, sampler in self.draws.items()}
        return [(name, place) for name, rows in drawn.items() for place in rows[: math.ceil(share * len(rows))]]


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
        joined, scales = self._trusted_batches(len(batches), num_items, at)
        for micro, batch in enumerate(batches):
            device = batch["input_ids"].device
            factor = torch.full((number_of_rows(batch),), 1.0 - weight, device=device)
            if self.weights is not None:
                own = self.weights.of_batch(batch, batch.get(SAMPLE_ID, torch.zeros(0)))
                factor = factor * self.scale * own.to(device)
            inputs = dict(batch)
            rows = joined[micro]
            if rows is not None:
                assert self.trusted is not None
                # Rows of a stream have no numbers.
                known = {name: value for name, value in rows.items() if name in batch}
                inputs = concatenate_batches(batch, known, self.trusted.pad_token_id)
                factor = torch.cat([factor, scales[micro].to(device)])
            step.inputs.append(inputs | {ROW_FACTOR: factor})
        return step

    def _trusted_batches(
        self, micro_batches: int, num_items: Any, at: StepFacts
    ) -> tuple[list[dict[str, Any] | None], list[Tensor]]:
        """This process's trusted rows of each micro-batch, collated once, and the factors of their summed losses."""
        if self.trusted is None:
            return [None] * micro_batches, []
        drawn = self.trusted.rows(at.step, min(1.0, micro_batches / at.micro_batches))
        rank, count = self.processes.rank, self.processes.count
        mine = [drawn[micro * count + rank :: micro_batches * count] for micro in range(micro_batches)]
        batches = [self.trusted.sets.batch(part) if part else None for part in mine]
        names = list(self.trusted.sets.sets)
        # Counted after collation: a collator of the user's may mask more. Each process counts its own rows.
        counts = torch.zeros(len(names))
        for part, batch in zip(mine, batches, strict=True):
            if batch is not None:
                scored = tokens_of(batch)
                counts.index_add_(0, torch.tensor([names.index(name) for name, _ in part]), scored)
        counts = self.processes.sum(counts)
        # TRL divides by the training tokens: undone for trusted rows, which carry their own divisor.
        per_set = {
            name: self.trusted.weight * self.trusted.sets.weights[name] * float(num_items) / max(1.0, float(count))
            for name, count in zip(names, counts, strict=True)
        }
        return batches, [torch.tensor([per_set[name] for name, _ in part]) for part in mine]

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
