"""One optimizer step: its micro-batches, the validation rows that join them, and what the forwards say of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core.schedule import validation_loss_weight
from ..data.identity import SEGMENTS
from ..estimators.base import BackwardReader, number_of_rows
from . import setup
from .amortise import stream_weights

if TYPE_CHECKING:
    from .bilevel_sft_trainer import BilevelSFTTrainer

ROW_FACTOR = "row_factor"
NO_ROW = -2


class StepWindow:
    """The accumulation window of one optimizer step on this process.

    Args:
        trainer: whose step it is.
        batches: collated training micro-batches.
        num_items (`Tensor`): training tokens of the step over all processes, by which the parent divides all sums.
    """

    def __init__(self, trainer: BilevelSFTTrainer, batches: Sequence[dict[str, Any]], num_items: Any):
        self.trainer = trainer
        self.batches = batches
        self.num_items = num_items
        self.inputs: list[dict[str, Any]] = []
        self.references: list[Tensor] | None = None
        self.ids: list[Tensor] = []
        self.losses: list[Tensor] = []
        self.scores: list[Tensor] = []
        self.validation_losses: list[Tensor] = []
        # Weights of a stream's rows, one tensor per micro-batch.
        self.predicted: list[Tensor] = []
        self._reader: BackwardReader | None = None

    def next_inputs(self) -> dict[str, Any]:
        """The coming micro-batch; before the first one, reference losses and validation rows are made ready.

        Not earlier: on a resumed run the random state is restored only after the batches have been drawn.
        """
        if not self.inputs:
            self._begin()
        return self.inputs[len(self.ids)]

    def _begin(self) -> None:
        trainer = self.trainer
        args = trainer.args
        if trainer.updates_online:
            assert trainer.estimator is not None
            trainer.model.train()
            self.references = trainer.estimator.begin_step(self.batches)
        if trainer.predicts:
            self.predicted = [stream_weights(trainer, batch) for batch in self.batches]
        step, weight, drawn = trainer.state.global_step, 0.0, None
        if trainer.trains_validation:
            epoch = float(trainer.state.epoch or 0.0)
            weight = validation_loss_weight(args.validation_loss_weight, args.validation_loss_weight_decay, epoch)
            if step % args.validation_every == 0:
                assert trainer.validation is not None
                micro = len(self.batches)
                share = min(1.0, micro / args.gradient_accumulation_steps)
                drawn = trainer.validation.step_batch(step, micro, args.process_index, args.world_size, share)
        for micro, batch in enumerate(self.batches):
            joined = dict(batch)
            device = batch["input_ids"].device
            factor = torch.full((number_of_rows(batch),), 1.0 - weight, device=device)
            if drawn is not None and (rows := drawn.batches[micro]) is not None:
                assert trainer.validation is not None
                # The parent divides by the training tokens: undone for validation rows, which carry their own divisor.
                scale = weight * args.validation_every * self.num_items
                factor = torch.cat([factor, scale * drawn.row_weights[micro].to(device)])
                joined = trainer.validation.join(batch, rows)
            joined[ROW_FACTOR] = factor
            self.inputs.append(joined)

    @contextmanager
    def watch(self) -> Iterator[None]:
        """A context around forward and backward of the coming micro-batch, for estimators that read the backward."""
        trainer, micro = self.trainer, len(self.ids)
        if not trainer.updates_online or trainer.estimator is None or not trainer.estimator.reads_backward:
            yield
            return
        inputs = self.inputs[micro]
        with trainer.estimator.watch(number_of_rows(inputs), inputs.get(SEGMENTS)) as self._reader:
            yield
        self.scores.append(self._reader.scores()[: number_of_rows(self.batches[micro])])
        self._reader = None

    def attach(self, log_probs: Tensor, scored: Tensor) -> None:
        """Between forward and backward: log-probabilities `[B, S - 1]` without factors, and which the loss counts."""
        if self._reader is not None:
            self._reader.attach(log_probs, scored)

    def observe(self, ids: Tensor, losses: Tensor) -> Tensor:
        """Take in the row losses of a micro-batch's forward.

        Args:
            ids (`Tensor` int64 `[R]`), losses (`Tensor` float32 `[R]`): training rows first, then validation rows.

        Returns:
            `Tensor` float32 `[R]`: what each row's loss is multiplied by; 1 for validation rows, and for all rows when
            weights act through resampling.
        """
        trainer = self.trainer
        micro = len(self.ids)
        count = number_of_rows(self.batches[micro])
        rows = ids[:count]
        self.ids.append(rows)
        self.losses.append(losses[:count])
        if len(losses) > count:
            self.validation_losses.append(losses[count:])
        if trainer.updates_online and self._reader is None:
            assert trainer.estimator is not None
            reference = None if self.references is None else self.references[micro]
            if reference is not None or not trainer.estimator.needs_reference:
                self.scores.append(trainer.estimator.score(losses[:count], reference))
        weights = torch.ones_like(losses)
        if trainer.weighs and not trainer.resamples:
            known = self.predicted[micro] if self.predicted else trainer.selection.weights(rows)
            weights[:count] = known.to(losses.device)
        return weights

    @property
    def complete(self) -> bool:
        """True once every micro-batch has been observed."""
        return len(self.ids) == len(self.batches)

    def finish(self) -> None:
        """After the last backward of the step: log, check, and move the selector by the scores of all processes."""
        trainer = self.trainer
        if self.validation_losses:
            trainer._metrics["train"]["validation_loss"].append(torch.cat(self.validation_losses).mean().item())
        parts = [torch.cat(self.ids), torch.cat(self.losses)]
        if self.scores or self.predicted:
            parts.append(torch.cat(self.scores or self.predicted).to(parts[1].device))
        ids, losses, *rest = self._gather_rows(parts)
        scores = rest[0] if self.scores else losses
        # A score that is read off the backward is NaN for a row that the backward did not reach (weight 0).
        scored = ~torch.isnan(scores) if trainer.estimator is not None and trainer.estimator.reads_backward else None
        finite = torch.isfinite(losses) & (torch.isfinite(scores) if scored is None else ~torch.isinf(scores))
        own = torch.cat(self.validation_losses) if self.validation_losses else losses[:0]
        (trusted,) = self._gather([torch.isfinite(own).all().reshape(1)])
        if not bool(finite.all() & trusted.all()):
            trainer.stop_on_non_finite(ids[~finite])
        if self.predicted:
            trainer.selection.record(ids, rest[0])
        if self.scores and trainer.state.global_step >= setup.warmup_steps(trainer):
            if scored is not None:
                ids, scores = ids[scored], scores[scored]
            if len(ids):
                trainer.selection.update(ids, scores)
            trainer.selection.refresh_gate()

    def _gather(self, values: list[Tensor]) -> list[Tensor]:
        return values if self.trainer.args.world_size == 1 else self.trainer.accelerator.gather(values)

    def _gather_rows(self, values: list[Tensor]) -> list[Tensor]:
        """Values of the rows of all processes; the first ones are ids."""
        if not self.trainer.merges_rows or self.trainer.args.world_size == 1:
            return self._gather(values)
        # Packed rows hold different numbers of rows, and processes exchange tensors of one shape only.
        padded = self.trainer.accelerator.pad_across_processes(values, dim=0, pad_index=NO_ROW)
        gathered = self._gather(padded)
        own = gathered[0] != NO_ROW
        return [part[own] for part in gathered]
