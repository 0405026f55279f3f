"""What `sft` and `refine` share: progress on a terminal, saving and uploading, and what is said at the end."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import ProgressCallback

from ..report.text import duration
from .report import report_line
from .show import Facts, Lines, show_summary

# What the bar shows of the logs and the record.
SHOWN = ("loss", "eval_loss", "validation", "selector/ess", "round/trained_loss")


def run_training(trainer: Any, script_args: Any, written: Lines = ()) -> None:
    """Train with progress shown, save the model, and upload it if asked for: never with text of rows.

    `written` are files with text of rows that the command writes afterwards.
    """
    from ..data.private import check_upload

    args, resume = trainer.args, trainer.args.resume_from_checkpoint
    if resume in ("True", "true", "False", "false"):
        # On the command line, it is text.
        resume = resume.lower() == "true"
    if args.push_to_hub:
        check_upload(args.output_dir, written)
    with shown_progress(trainer):
        trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(args.output_dir)
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)


def finish(trainer: Any, title: str, facts: Facts, notes: Lines, following: Lines, rows: str | None = None) -> None:
    """Write the report (of rows in the file `rows`), say what came of a run and how long it took, and end it."""
    line = report_line(trainer, rows_file=rows)
    seconds = trainer.record.seconds
    if seconds.get("total"):
        share = (seconds["selection"] + seconds["validation"]) / seconds["total"]
        spent = f", of which {share:.0%} to choose weights and follow validation losses" if share else ""
        facts = [*facts, ("Time", duration(seconds["total"]) + spent)]
    if trainer.is_world_process_zero():
        show_summary(title, facts, [*notes, line], following)
    # `Trainer.end()` does this; older transformers lack it.
    trainer.accelerator.end_training()


class RunProgress(ProgressCallback):
    """transformers' bar, which shows the latest numbers in place of lines of logs."""

    def __init__(self, trainer: Any):
        super().__init__()
        self.record = trainer.record
        self.numbers: dict[str, str] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Losses, the effective sample size, and the latest loss on trusted rows."""
        if self.training_bar is not None:
            told = logs | ({"validation": self.record.validation[-1]["total"]} if self.record.validation else {})
            self.numbers |= {name: f"{float(told[name]):.3f}" for name in SHOWN if name in told}
            self.training_bar.set_postfix(self.numbers)


@contextmanager
def shown_progress(trainer: Any) -> Iterator[None]:
    """The bar with the latest numbers on a terminal, and no bar elsewhere; with `disable_tqdm`, logs line by line."""
    shown = RunProgress(trainer)
    if trainer.pop_callback(ProgressCallback) is not None:
        if sys.stderr.isatty() and trainer.is_world_process_zero():
            trainer.add_callback(shown)
        else:
            # For the bar that is drawn while weights are chosen.
            trainer.args.disable_tqdm = True
    try:
        yield
    finally:
        if shown.training_bar is not None:
            shown.training_bar.close()
