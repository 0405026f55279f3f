"""The run record: what a report needs and no other file of a run holds. `docs/report.md` describes the files.

The folder's name starts with an underscore, so that `push_to_hub` leaves it out: it holds text of trusted rows.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from datasets import Dataset
from torch import Tensor
from transformers import TrainerCallback
from trl import GRPOConfig, SFTConfig

from .._version import __version__
from ..core.statistics import evenly_spaced
from ..data.files import read_json, write_json
from ..data.identity import fingerprint
from ..data.private import RECORD, check_upload
from ..data.rows import Rows
from ..data.trusted import TrustedSets
from ..weights.choose import Choice
from ..weights.record import PILOT_FILE, RUN_FILE, SCORES_FILE, WEIGHTS_FILE, write_pilot, write_weights
from ..weights.state import TrainingWeights

logger = logging.getLogger(__name__)

# Of `run.json`; raised when older code could not read it any more.
FORMAT = 1
# Trusted rows whose loss is followed over the run, over all sets; the cost of a few training steps.
FOLLOWED_ROWS = 128
# Entries of the log that are kept.
LOG_ENTRIES = 2000
# Settings of the parents that say what a run was. Named one by one: others may hold secrets.
COMMON = (
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "weight_decay", "max_grad_norm", "max_steps"),
    *("num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing"),
    *("max_length", "packing", "packing_strategy", "padding_free", "completion_only_loss", "assistant_only_loss"),
    *("seed", "data_seed", "bf16", "fp16", "num_generations", "max_completion_length", "temperature", "top_p", "beta"),
)


@dataclass
class RunFacts:
    """What a run is, as its record tells it.

    Attributes:
        kind (`str`): `"sft"` or `"refine"`.
        args, state, model: of the run.
        weights (`TrainingWeights`, *optional*), trusted (`TrustedSets`, *optional*): of the run.
        learned, resampled (`bool`): whether weights were learned here, and act through visits.
        rows (`int`), streamed (`bool`): of the caller.
        fingerprints (`dict`): of training and trusted rows, where no weights hold them.
        more (`dict`): further facts about the weights.
    """

    kind: str
    args: Any
    state: Any
    model: Any
    weights: TrainingWeights | None
    trusted: TrustedSets | None
    learned: bool
    resampled: bool
    rows: int
    streamed: bool
    fingerprints: dict[str, str] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)

    def told(self) -> dict[str, Any]:
        """For `run.json`, without times."""
        args, state, weights = self.args, self.state, self.weights
        parent = GRPOConfig if self.kind == "refine" else SFTConfig
        ours = {each.name for each in fields(args)} - {each.name for each in fields(parent)}
        sets = {} if self.trusted is None else self.trusted.sets
        identity = self.fingerprints if weights is None else weights.identity
        device = args.device
        return {
            "format": FORMAT,
            "kind": self.kind,
            "versions": {"trl-bilevel": __version__}
            | {name: version(name) for name in ("trl", "transformers", "torch")},
            "model": model_name(self.model),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "processes": args.world_size,
            "settings": {name: getattr(args, name) for name in (*COMMON, *sorted(ours)) if hasattr(args, name)},
            "steps": {"done": state.global_step, "planned": state.max_steps},
            "data": {
                "rows": self.rows,
                "streamed": self.streamed,
                "rows_trained_on": self.rows if weights is None else int(weights.kept.sum()),
                "fingerprint": identity.get("train_fingerprint", ""),
                "validation_fingerprint": identity.get("validation_fingerprint", ""),
                "validation": {
                    name: {"rows": len(rows), "weight": self.trusted.weights[name] if self.trusted else 0.0}
                    for name, rows in sets.items()
                },
            },
            "weights": {
                "learned": self.learned,
                "given": weights is not None and not self.learned,
                "by": "resample" if self.resampled else "loss",
            }
            | self.more,
            "log_history": _thinned(state.log_history),
        }


class RecordCallback(TrainerCallback):
    """Writes the record: at every checkpoint, and at the end of training.

    Args:
        facts: tells what the run is at the moment.
        losses: gives the mean losses of prepared rows under the present model.
        eval_dataset: of the run; losses of single rows are kept if it is one prepared set.
    """

    def __init__(self, facts: Callable[[], RunFacts], losses: Callable[[Rows], Tensor], eval_dataset: Any = None):
        self._tell = facts
        self._losses = losses
        self._eval_rows = eval_dataset
        self.seconds: dict[str, float] = {}
        self.validation: list[dict[str, Any]] = []
        self.evaluation: dict[str, Any] = {}
        self.finished = False
        self._began: float | None = None
        self._used = False

    @property
    def folder(self) -> Path:
        """Where the record is."""
        return Path(self._tell().args.output_dir) / RECORD

    def begin(self, resumed: bool) -> None:
        """A run begins: forget the record of an earlier one in the same folder, or go on with the resumed one."""
        folder, told = self.folder, self._tell()
        self.seconds, self.validation = {"selection": 0.0, "validation": 0.0, "total": 0.0}, []
        self.evaluation, self.finished = {}, False
        if resumed:
            self.seconds |= read_json(folder / RUN_FILE).get("seconds", {})
        elif told.args.should_save:
            # A second `train()` keeps the weights of the first one, and so what they rest on.
            old = [RUN_FILE, WEIGHTS_FILE] + ([] if self._used else [PILOT_FILE, SCORES_FILE])
            # Where this fails, writing will fail too, and tell.
            with suppress(OSError):
                for name in old:
                    (folder / name).unlink(missing_ok=True)
        self._began, self._used = time.perf_counter() - self.seconds["total"], True

    def chosen(self) -> None:
        """Weights are known by now: note how long that took."""
        if self._began is not None:
            self.seconds["selection"] += time.perf_counter() - self._began - self.seconds["total"]

    def write_choice(self, choice: Choice, decode: Callable[..., str]) -> None:
        """Write what choosing found out, at once: a resumed run has the weights, but not their reasons."""
        if self._tell().args.should_save:
            with self._told():
                write_pilot(self.folder, choice, decode)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Go on with the losses of the run that is resumed; those of the untrained model at the start."""
        if state.global_step > 0:
            earlier = read_json(self.folder / RUN_FILE).get("validation", [])
            self.validation = [entry for entry in earlier if entry["step"] <= state.global_step]
        else:
            self._follow(state)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Where the eval loss is reported, the trusted rows' is too."""
        if self._began is not None:
            self._follow(state)

    def on_push_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """No text of rows is uploaded with the model.

        Raises:
            ValueError: if some lies where it would be taken along.
        """
        check_upload(args.output_dir)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """An interrupted run leaves a record as well."""
        self.save()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The last losses, and the record."""
        self._follow(state)
        self._evaluate()
        self.finished = True
        self.save()
        self._began = None

    def _follow(self, state: Any) -> None:
        """Losses of the same few trusted rows every time, on all processes."""
        told = self._tell()
        if told.trusted is None or _sharded(told.args):
            return
        start = time.perf_counter()
        share = max(1, FOLLOWED_ROWS // len(told.trusted.sets))
        rows = {name: self._losses(_some(rows, share)) for name, rows in told.trusted.sets.items()}
        means = {name: float(losses.mean()) for name, losses in rows.items()}
        entry = {
            "step": state.global_step,
            "total": sum(told.trusted.weights[name] * mean for name, mean in means.items()),
            "sets": means,
            "rows": {name: [round(loss, 5) for loss in losses.tolist()] for name, losses in rows.items()},
        }
        self.validation = [*(e for e in self.validation if e["step"] != state.global_step), entry]
        self.seconds["validation"] += time.perf_counter() - start

    def _evaluate(self) -> None:
        """Losses of single eval rows, once: for the standard error of the difference to another run."""
        told, rows = self._tell(), self._eval_rows
        if told.trusted is None or not isinstance(rows, Dataset) or _sharded(told.args):
            return
        packed = getattr(told.args, "eval_packing", None)
        packed = getattr(told.args, "packing", False) if packed is None else packed
        if packed or not {"input_ids", "labels"} <= set(rows.column_names):
            return
        start = time.perf_counter()
        like = next(iter(told.trusted.sets.values()))
        own = Rows(_numbered(rows.select_columns(["input_ids", "labels"])), like.collate, len(rows))
        losses = self._losses(_some(own, FOLLOWED_ROWS)).tolist()
        self.evaluation = {
            "losses": [round(loss, 5) for loss in losses],
            "rows": len(rows),
            "fingerprint": fingerprint(rows.select_columns(["input_ids", "labels"])),
        }
        self.seconds["validation"] += time.perf_counter() - start

    def facts(self) -> dict[str, Any]:
        """The record as it is now."""
        return self._tell().told() | {"validation": self.validation, "evaluation": self.evaluation}

    def save(self, rows_file: str | None = None) -> None:
        """Write `run.json` and the weights. A record that cannot be written stops no training: it is logged.

        Args:
            rows_file (`str`, *optional*): where the weighted rows are, if not in the run's folder.
        """
        told = self._tell()
        if not told.args.should_save:
            return
        if self._began is not None:
            self.seconds["total"] = time.perf_counter() - self._began
        folder = self.folder
        # A trainer that has not trained, but loaded a run that had ended, knows only the rest of it.
        earlier = read_json(folder / RUN_FILE)
        seconds = {name: round(value, 2) for name, value in self.seconds.items()}
        facts = self.facts() | {
            "finished": self.finished if self.seconds else earlier.get("finished", False),
            "seconds": seconds or earlier.get("seconds", {}),
            "evaluation": self.evaluation or earlier.get("evaluation", {}),
            "validation": self.validation or earlier.get("validation", []),
            "rows_file": rows_file or earlier.get("rows_file"),
        }
        with self._told():
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / RUN_FILE, facts)
            if told.weights is not None:
                # Up to date, where weights move.
                told.weights.metrics()
                write_weights(folder, told.weights.values)

    def _told(self) -> Any:
        return _Logged(self.folder)


class _Logged(suppress):
    """Files that cannot be written are logged, and stop nothing."""

    def __init__(self, folder: Path):
        super().__init__(OSError, pa.ArrowException)
        self.folder = folder

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
        caught = bool(super().__exit__(kind, error, trace))
        if caught:
            logger.warning(f"The run record in {self.folder} could not be written ({error}): a report will lack it.")
        return caught


def model_name(model: Any) -> str:
    """A hub name as it is; of a local path only the end: where a user keeps files is not for a report."""
    name = str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
    return Path(name).name if Path(name).exists() or Path(name).is_absolute() else name


def _some(rows: Rows, count: int) -> Rows:
    """At most `count` of the rows, evenly spaced."""
    places = torch.as_tensor(evenly_spaced(len(rows), count)).tolist()
    return Rows(rows.dataset.select(places), rows.collate, rows.count)


def _numbered(rows: Dataset) -> Dataset:
    return rows.add_column("sample_id", list(range(len(rows))))


def _sharded(args: Any) -> bool:
    """Sharded parameters cannot be used outside of the trainer's own steps."""
    return bool(getattr(args, "fsdp", None)) or getattr(args, "deepspeed", None) is not None


def _thinned(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most `LOG_ENTRIES` of the training entries, evenly spaced, and all others."""
    training = [n for n, entry in enumerate(history) if "loss" in entry]
    places = torch.as_tensor(evenly_spaced(len(training), LOG_ENTRIES)).tolist() if training else []
    kept = {training[n] for n in places}
    return [entry for n, entry in enumerate(history) if "loss" not in entry or n in kept]
