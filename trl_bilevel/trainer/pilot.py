"""The pilot run: a short rehearsal of the training on throwaway parameters, after which every row is scored once.

Scores of different rows are comparable only if they are taken at the same point of training, and they are worth
something only after both ends of the difference have learned the mixture. So the trainable parameters are trained for
a few dozen steps, every row is scored, and the parameters are put back, bit for bit: the real training starts with the
weights, and never learns the bad rows in the first place.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import Tensor

from ..data.batches import ValidationSampler
from ..data.identity import SAMPLE_ID, sample_ids
from ..estimators import ESTIMATORS, Estimator
from ..estimators.base import ShadowParameters, token_mean
from . import setup
from .errors import NonFiniteScoreError, row_list
from .estimator import make_estimator
from .host import DetachedHost
from .passes import progress, row_batches
from .record import write_pilot
from .validation import ValidationSets

if TYPE_CHECKING:
    from .bilevel_sft_trainer import BilevelSFTTrainer

logger = logging.getLogger(__name__)

# Share of each validation set that the pilot run holds back to calibrate the weights.
HELD_BACK_SHARE = 0.25
# Training rows of a pilot step: as many as all measurements have had (docs/results.md).
PILOT_BATCH = 8


class Pilot:
    """Runs the pilot of a trainer.

    Args:
        trainer: a constructed trainer; its model's trainable parameters are used and restored.
        estimator_factory: makes the estimator on a host.
        validation (`ValidationSets`): rows that pull the pilot.
        held_back (`ValidationSets`): rows that only get scored.
        steps (`int`), batch_size (`int`, rows over all processes), learning_rate (`float`), validation_loss_weight
            (`float`): settings of the pilot.
        scored_rows (`int`, *optional*): score only so many rows, drawn at random.
    """

    def __init__(
        self,
        trainer: BilevelSFTTrainer,
        *,
        estimator_factory: Any,
        validation: ValidationSets,
        held_back: ValidationSets,
        steps: int,
        batch_size: int,
        learning_rate: float,
        validation_loss_weight: float,
        scored_rows: int | None = None,
    ):
        self.trainer = trainer
        self.host = DetachedHost(trainer, validation, learning_rate)
        self.estimator: Estimator = estimator_factory(self.host)
        self.validation = validation
        self.held_back = held_back
        self.steps = steps
        self.validation_loss_weight = validation_loss_weight
        # Random, and a function of the rows' contents alone: its first rows are a fair sample.
        self.order = trainer.row_order()
        self.scored_rows = scored_rows
        self.sampler = ValidationSampler(len(self.order), batch_size, trainer.args.seed + 7919)

    def run(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rehearse, score, restore.

        Returns:
            `tuple` of `Tensor` float32: scores of the caller's rows `[row_count, F]` (NaN where preparation dropped
            the row, or it is not among those scored); scores of the held-back validation rows `[c, F]`; their shares
            in the validation loss `[c]`.
        """
        trainer, start = self.trainer, time.perf_counter()
        parameters = self.host.trainable_parameters()
        initial = ShadowParameters(parameters)
        was_training = trainer.model.training
        try:
            trainer.model.train()
            self._train(parameters)
            self.estimator.prepare_scoring()
            trainer.model.eval()
            validation, validation_weights = self._score_held_back()
            scores = torch.zeros(trainer.row_count, validation.shape[1], device=trainer.args.device)
            rows = self.order[: self.scored_rows]
            for batch in row_batches(trainer, rows, "Scoring training rows"):
                scores[batch[SAMPLE_ID].to(scores.device)] = self.estimator.row_scores(batch).to(scores.dtype)
            scores = self.host.global_sum(scores).cpu()
            scored = torch.zeros(trainer.row_count, dtype=torch.bool)
            scored[sample_ids(trainer.rows)[rows]] = True
            self._check(scores, scored, validation)
            scores[~scored] = torch.nan
        finally:
            with torch.no_grad():
                for parameter, value in zip(parameters, initial.values, strict=True):
                    parameter.copy_(value)
            trainer.model.train(was_training)
            self.estimator.release()
            self.host.optimizer = None
        write_pilot(self, scores, validation, validation_weights, time.perf_counter() - start)
        return scores, validation, validation_weights

    def _score_held_back(self) -> tuple[Tensor, Tensor]:
        """Scores of the held-back validation rows, and each row's share in the validation loss."""
        scores: list[Tensor] = []
        weights: list[Tensor] = []
        for name, batch in self.held_back.all_batches(self.trainer.args.per_device_eval_batch_size):
            scores.append(self.estimator.row_scores(batch))
            share = self.held_back.weights[name] / len(self.held_back.datasets[name])
            weights.append(torch.full((len(scores[-1]),), share))
        # Every process scores all of them, and must come to the same weights to the last bit.
        mean = self.host.global_sum(torch.cat(scores)) / self.trainer.args.world_size
        return mean.cpu(), torch.cat(weights)

    def _check(self, scores: Tensor, scored: Tensor, validation: Tensor) -> None:
        bad = scored & ~torch.isfinite(scores).all(-1)
        if not bool(bad.any()) and bool(torch.isfinite(validation).all()):
            return
        where = "validation rows"
        if bool(bad.any()):
            where = f"training rows (sample_id) {row_list(bad.nonzero().squeeze(1))}"
        raise NonFiniteScoreError(
            f"The pilot run scored {where} NaN or infinite. Nothing has been trained yet. Look at these rows, lower "
            f"`pilot_learning_rate` (now {self.host.learning_rate():g}), or use bf16 in place of fp16."
        )

    def _train(self, parameters: list[torch.nn.Parameter]) -> None:
        args = self.trainer.args
        optimizer = torch.optim.AdamW(parameters, lr=self.host.learning_rate(), weight_decay=0.0)
        self.host.optimizer = optimizer
        weight = self.validation_loss_weight
        for step in progress(self.trainer, range(self.steps), "Pilot run"):
            self.host.step = step
            rows = self.order[self.sampler.rows(step)][args.process_index :: args.world_size].tolist()
            # `auto_find_batch_size` tries smaller ones when memory runs out, here as in training.
            size = min(args.per_device_train_batch_size, self.trainer._train_batch_size)
            train = [self.trainer.collate_rows(rows[start : start + size]) for start in range(0, len(rows), size)]
            if self.estimator.follows_training:
                self.estimator.begin_step(train)
            training = token_mean(self.host, train, args.device)
            pulling = self.host.validation_batches(step) if weight > 0 else []
            for share, batches in ((1 - weight, training), (weight, pulling)):
                for batch, row_weights in batches:
                    sums = self.host.row_losses(batch).sums
                    (share * row_weights.to(sums.device) * sums).sum().backward()
            for parameter in parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                parameter.grad = self.host.global_sum(parameter.grad)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.host.step = self.steps


def default_pilot_steps(steps: int) -> int:
    """Pilot steps for a run of `steps` optimizer steps: a quarter of them, at least 8 and at most 24."""
    return min(24, max(8, steps // 4))


def pilot_lookahead(pilot_steps: int) -> int:
    """Validation steps of the look-ahead that ends a pilot run: half of the pilot's own steps, at least 4.

    With 24 pilot steps on the quality task, AUC of the weights was .86 after 4 of them, .93 after 8, .92 after 16
    (first seed): few steps see too little. As many as the pilot itself had, and what any text teaches outweighs what
    sets the validation rows apart.
    """
    return max(4, pilot_steps // 2)


def default_pilot_batch_size(trainer: BilevelSFTTrainer) -> int:
    """Training rows of a pilot step: those of an optimizer step, at most 8 (or one per process).

    The pilot costs the same however large the batches and the data are.
    """
    return min(setup.rows_per_step(trainer), max(PILOT_BATCH, trainer.accelerator.num_processes))


def pilot_learning_rate(trainer: BilevelSFTTrainer) -> float:
    """`pilot_learning_rate`, or its default."""
    given = trainer.args.pilot_learning_rate
    if given is not None:
        return given
    return 1e-3 if isinstance(trainer.model, PeftModel) else max(trainer.args.learning_rate, 5e-5)


def scored_rows(trainer: BilevelSFTTrainer) -> int | None:
    """Rows that the pilot scores, None for all; of a stream's sample at most half, to predict the others' weights."""
    given = trainer.args.pilot_scored_rows
    if trainer.predicts:
        return min(given or trainer.row_count, trainer.row_count // 2)
    return given or None


def make_pilot(trainer: BilevelSFTTrainer) -> Pilot:
    """The pilot run of a trainer, with its validation rows dealt into those that pull and those that are held back."""
    assert trainer.validation is not None
    args = trainer.args
    batch_size = args.pilot_batch_size or default_pilot_batch_size(trainer)
    pulling, held_back = {}, {}
    for index, (name, rows) in enumerate(trainer.validation.datasets.items()):
        order = torch.randperm(
            len(rows), generator=torch.Generator().manual_seed(args.seed + 104_729 + index)
        ).tolist()
        held = max(1, round(HELD_BACK_SHARE * len(rows))) if len(rows) > 1 else 0
        pulling[name] = rows.select(sorted(order[held:]))
        if held:
            held_back[name] = rows.select(sorted(order[:held]))
    steps = args.pilot_steps or default_pilot_steps(trainer.state.max_steps)
    return Pilot(
        trainer,
        estimator_factory=lambda host: make_estimator(args, host, pilot_lookahead(steps)),
        validation=setup.validation_sets(trainer, pulling, args.validation_batch_size or batch_size),
        held_back=setup.validation_sets(trainer, held_back, batch_size),
        steps=steps,
        batch_size=batch_size,
        learning_rate=pilot_learning_rate(trainer),
        validation_loss_weight=0.5 if ESTIMATORS[args.weight_estimator].pilot_sees_validation else 0.0,
        scored_rows=scored_rows(trainer),
    )
