"""What `sft` and `refine` share: progress on a terminal, saving and uploading, and what is said at the end."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import ProgressCallback, TrainerCallback

from .arguments import resume_argument
from .show import show_summary, terminal


def run_training(trainer: Any, script_args: Any, written: Sequence[str] = ()) -> None:
    """Train with progress shown, save the model, and upload it if asked for.

    Args:
        trainer: a `BilevelSFTTrainer` or a `SelfRefineTrainer`.
        script_args: of the command.
        written: files with text of rows that the command writes afterwards.

    Raises:
        ValueError: before training, if text of rows would be uploaded with the model.
    """
    from ..data.private import check_upload

    args = trainer.args
    if args.push_to_hub:
        check_upload(args.output_dir, written)
    with shown_progress(trainer):
        trainer.train(resume_from_checkpoint=resume_argument(args))
    trainer.save_model(args.output_dir)
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)


def finish(
    trainer: Any,
    title: str,
    facts: Sequence[tuple[str, str]],
    notes: Sequence[str],
    following: Sequence[str],
    rows_file: str | None = None,
) -> None:
    """Write the report, say what came of a run (see `show_summary`), and end it."""
    from .report import report_lines

    lines = report_lines(trainer, rows_file)
    if trainer.is_world_process_zero():
        show_summary(title, [*facts, *time_spent(trainer)], [*notes, *lines], following)
    trainer.end()


class RunProgress(TrainerCallback):
    """A bar with loss, validation loss, effective sample size, rows that carry the weight, and overhead.

    Args:
        trainer: a `BilevelSFTTrainer` or a `SelfRefineTrainer`.
        console: to draw on.
    """

    def __init__(self, trainer: Any, console: Any):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.trainer = trainer
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=console,
        )
        self.numbers: dict[str, str] = {}
        self._task: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the bar. Choosing has come before, with a bar of its own."""
        if not state.is_world_process_zero:
            return
        self._task = self.progress.add_task("Training", total=state.max_steps, completed=state.global_step, numbers="")
        self.progress.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One step on."""
        self._show(completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """The latest numbers."""
        if self._task is None:
            return
        self.numbers |= numbers_of(self.trainer, logs or {})
        self._show(numbers="  ".join(f"{name} {value}" for name, value in self.numbers.items()))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the bar away: the summary follows."""
        self.progress.stop()

    def _show(self, **changes: Any) -> None:
        if self._task is not None:
            self.progress.update(self._task, **changes)


def numbers_of(trainer: Any, logs: dict[str, Any]) -> dict[str, str]:
    """What a log entry, the record and the ledger say, ready to be shown, by name."""
    record, out = trainer.record, {}
    if "loss" in logs:
        out["loss"] = f"{float(logs['loss']):.3f}"
    if "eval_loss" in logs:
        out["eval"] = f"{float(logs['eval_loss']):.3f}"
    if record.validation:
        out["validation"] = f"{record.validation[-1]['total']:.3f}"
    if "round/trained_loss" in logs:
        ledger = trainer.ledger
        out["selection"] = f"{float(logs['round/trained_loss']):.3f}"
        out["rounds kept"] = f"{sum(entry['kept'] for entry in ledger)}/{len(ledger)}"
    if "selector/ess" in logs:
        out["ESS"] = f"{float(logs['selector/ess']):.0%}"
        out["80% of weight in"] = f"{_carrying(trainer):.0%} of rows"
    overhead = record.overhead()
    if overhead is not None:
        out["overhead"] = f"{overhead:.0%}"
    return out


def weight_facts(trainer: Any) -> list[tuple[str, str]]:
    """For the summary: how unequal the weights are; nothing without any."""
    size = None if trainer.weights is None else trainer.weights.metrics().get("selector/ess")
    if size is None:
        return []
    return [
        ("Effective sample size", f"{size:.0%} of the rows"),
        ("80% of the weight", f"in {_carrying(trainer):.0%} of the rows"),
    ]


def time_spent(trainer: Any) -> list[tuple[str, str]]:
    """For the summary: how long the run took, and how much of it went into the weights."""
    from ..report.text import duration

    seconds = trainer.record.seconds
    if not seconds.get("total"):
        return []
    spent = seconds["selection"] + seconds["validation"]
    share = f", of which {spent / seconds['total']:.0%} to choose weights and follow validation losses"
    return [("Time", duration(seconds["total"]) + (share if spent else ""))]


def _carrying(trainer: Any) -> float:
    """Share of the rows that hold 80% of the weight."""
    from ..core.statistics import rows_carrying

    weights = trainer.weights.sampled().numpy()
    return rows_carrying(weights) / len(weights)


@contextmanager
def shown_progress(trainer: Any) -> Iterator[None]:
    """Show a trainer's progress while it trains, in place of transformers' bar and its lines of logs.

    On the main process, and if standard error is a terminal; elsewhere nothing is drawn. With `disable_tqdm`, which
    prints the logs line by line, all stays as it is, and so does transformers' bar where rich is not installed.
    """
    callbacks = trainer.callback_handler.callbacks
    places = [place for place, callback in enumerate(callbacks) if type(callback) is ProgressCallback]
    if not places:
        yield
        return
    console = terminal(stderr=True)
    if console is None and sys.stderr.isatty():
        # Without rich.
        yield
        return
    if console is None or not trainer.is_world_process_zero():
        trainer.remove_callback(ProgressCallback)
        # For the bar that is drawn while weights are chosen.
        trainer.args.disable_tqdm = True
        yield
        return
    shown = RunProgress(trainer, console)
    # In the place of the other: before the callback that follows losses, so that its time is seen to pass.
    callbacks[places[0]] = shown
    try:
        yield
    finally:
        shown.progress.stop()
