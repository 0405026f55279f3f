"""What trackers are shown of the weights beside the numbers of the log: a histogram, and the rows at both ends.

Through `report_to`: TensorBoard, Weights & Biases, Trackio and MLflow. Others get the numbers only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import TrainerCallback

from ..data.cards import table
from ..data.rows import Rows
from ..weights.record import row_texts
from ..weights.state import TrainingWeights

logger = logging.getLogger(__name__)

HISTOGRAM, ROWS = "selector/weights", "selector/rows"
STEP = "train/global_step"
COLUMNS = ("end", "weight", "sample_id", "prompt", "answer")
# Characters of a prompt and of an answer.
TEXT_LENGTH = 300
BINS = 50

Table = list[list[Any]]
# Of the trainer's callbacks, step, weights `[n]` and table: sends them to a tracker that is running.
Sink = Callable[[list[TrainerCallback], int, np.ndarray, Table], None]


class WeightTracking(TrainerCallback):
    """Sends weights when training begins, and, where they have changed, at each evaluation and at the end.

    On the main process. A tracker that fails is named once, and stops no training.

    Args:
        names: of `report_to`; those that are not in `SINKS` get the numbers of the log only.
        weights: to send.
        rows: gives some rows at either end, as lines of `COLUMNS`.
        callbacks: of the trainer, among which a tracker may be.
    """

    def __init__(
        self,
        names: Sequence[str],
        weights: TrainingWeights,
        rows: Callable[[], Table],
        callbacks: list[TrainerCallback],
    ):
        self.sinks = {name: SINKS[name] for name in names if name in SINKS}
        self.weights = weights
        self.rows = rows
        self.callbacks = callbacks
        self._sent: Tensor | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A new run shows its weights again."""
        self._sent = None

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The weights that were chosen, or given: trackers have started by now."""
        self._send(state)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Weights that move with training."""
        self._send(state)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """The last log of a run: `on_train_end` would be too late, trackers close there."""
        if "train_runtime" in (logs or {}):
            self._send(state)

    def _send(self, state: Any) -> None:
        if not state.is_world_process_zero or not self.sinks:
            return
        self.weights.metrics()
        weights = self.weights.sampled()
        if len(weights) == 0 or (self._sent is not None and torch.equal(self._sent, weights)):
            return
        self._sent = weights
        rows = self.rows()
        for name, sink in list(self.sinks.items()):
            try:
                sink(self.callbacks, state.global_step, weights.numpy(), rows)
            except Exception as error:
                del self.sinks[name]
                logger.warning(f"{name} was not shown the weights, and will not be: {type(error).__name__}: {error}")


def weight_tracking(names: Sequence[str], *given: Any) -> list[WeightTracking]:
    """The callback, if one of `report_to` is shown weights; takes what `WeightTracking` takes."""
    return [WeightTracking(names, *given)] if any(name in SINKS for name in names) else []


def extreme_rows(rows: Rows, weights: TrainingWeights, count: int, decode: Callable[..., str]) -> Table:
    """The `count` rows of highest and of lowest weight as lines of `COLUMNS`."""
    if count == 0:
        return []
    values = weights.of(rows.ids)
    order = torch.argsort(values, descending=True, stable=True)
    count = min(count, len(order) // 2)
    lines = []
    for place in [*range(count), *range(len(order) - count, len(order))]:
        row = int(order[place])
        texts = row_texts(rows.dataset[row], decode)
        shown = [text if len(text) <= TEXT_LENGTH else f"{text[:TEXT_LENGTH].rstrip()} …" for text in texts.values()]
        end = "highest" if place < count else "lowest"
        lines.append([end, round(float(values[row]), 4), int(rows.ids[row]), *shown])
    return lines


def _to_tensorboard(callbacks: Any, step: int, weights: np.ndarray, rows: Table) -> None:
    from transformers.integrations import TensorBoardCallback

    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            callback.tb_writer.add_histogram(HISTOGRAM, weights, step)
            if rows:
                callback.tb_writer.add_text(ROWS, _markdown(rows), step)


def _to_wandb(callbacks: Any, step: int, weights: np.ndarray, rows: Table) -> None:
    import wandb

    if wandb.run is None:
        return
    shown: dict[str, Any] = {HISTOGRAM: wandb.Histogram(weights.tolist()), STEP: step}
    if rows:
        shown[ROWS] = wandb.Table(columns=list(COLUMNS), data=rows)
    wandb.log(shown)


def _to_trackio(callbacks: Any, step: int, weights: np.ndarray, rows: Table) -> None:
    import trackio

    shown: dict[str, Any] = {HISTOGRAM: trackio.Histogram(weights, num_bins=BINS), STEP: step}
    if rows:
        shown[ROWS] = trackio.Table(columns=list(COLUMNS), data=rows)
    trackio.log(shown)


def _to_mlflow(callbacks: Any, step: int, weights: np.ndarray, rows: Table) -> None:
    import mlflow

    if mlflow.active_run() is None:
        return
    # A part of the extra for reports: without it there is no figure.
    with suppress(ImportError):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 3.5), layout="constrained")
        axes = figure.add_subplot(xlabel="weight (1 is the average)", ylabel="rows", title=f"Weights at step {step}")
        axes.hist(weights, bins=BINS)
        mlflow.log_figure(figure, f"selector/weights-{step:06d}.png")
    if rows:
        columns = {name: [line[place] for line in rows] for place, name in enumerate(COLUMNS)}
        mlflow.log_table(columns, f"selector/rows-{step:06d}.json")


def _markdown(rows: Sequence[Sequence[Any]]) -> str:
    """A markdown table; what could be read as HTML or as a link stays text."""
    return table(COLUMNS, [[_inert(cell) if isinstance(cell, str) else cell for cell in line] for line in rows])


def _inert(text: str) -> str:
    for mark, written in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("[", "&#91;"), ("`", "&#96;")):
        text = text.replace(mark, written)
    return text


SINKS: dict[str, Sink] = {
    "tensorboard": _to_tensorboard,
    "wandb": _to_wandb,
    "trackio": _to_trackio,
    "mlflow": _to_mlflow,
}
