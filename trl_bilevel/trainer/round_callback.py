"""When rounds begin and end, in terms of the training loop's events."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

if TYPE_CHECKING:
    from .self_refine_trainer import SelfRefineTrainer


class RoundCallback(TrainerCallback):
    """Starts and ends the rounds of a trainer."""

    def __init__(self, trainer: SelfRefineTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Have the explicit weights ready; leave nothing of an earlier run that was not resumed."""
        self.trainer.offline.start()
        self.trainer._step = state.global_step * args.gradient_accumulation_steps
        if state.global_step == 0:
            self.trainer.forget_round()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open a round at its first step."""
        if state.global_step % args.steps_per_round == 0 and self.trainer.rounds.snapshot is None:
            self.trainer.begin_round()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close a round after its last step, before a checkpoint is written."""
        if state.global_step % args.steps_per_round == 0:
            # Logging an entry takes the mark away that the step itself is to be logged.
            should_log = control.should_log
            self.trainer.end_round()
            control.should_log = should_log
            control.should_training_stop |= self.trainer.rounds.rejected >= args.patience

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Decide a round that was stopped in the middle."""
        if self.trainer.rounds.snapshot is not None:
            self.trainer.end_round()
