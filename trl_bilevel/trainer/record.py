"""The run record: what a report needs and no other file of a run holds. `docs/report.md` describes the files.

The folder's name starts with an underscore, so that `push_to_hub` leaves it out: it holds text of trusted rows.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset
from torch import Tensor
from transformers import TrainerCallback
from trl import GRPOConfig, SFTConfig

from .._version import __version__
from ..core.statistics import data_ranks, evenly_spaced
from ..data.cards import selection_section
from ..data.files import atomically, read_json, write_json
from ..data.identity import DATA_RANK, DATA_WEIGHT, SAMPLE_ID, fingerprint
from .bilevel_sft_config import BilevelSFTConfig
from .self_refine_config import SelfRefineConfig
from .traces import TRACES_FILE, Traces

if TYPE_CHECKING:
    from .pilot import Pilot

logger = logging.getLogger(__name__)

FOLDER = "_record"
RUN_FILE, PILOT_FILE = "run.json", "pilot.json"
SCORES_FILE, WEIGHTS_FILE = "scores.parquet", "weights.parquet"
# Of these files; raised when older code could not read them any more.
FORMAT = 1
# Validation rows whose loss is followed over the run, over all sets; the cost of a few training steps.
FOLLOWED_ROWS = 128
# Trusted rows and characters of each that are kept as text; entries of the log that are kept.
TRUSTED_TEXTS, TEXT_LENGTH, LOG_ENTRIES = 200, 1500, 2000
# Settings of the parents that say what a run was. Named one by one: others may hold secrets.
COMMON = (
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "weight_decay", "max_grad_norm", "max_steps"),
    *("num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing"),
    *("max_length", "packing", "packing_strategy", "padding_free", "completion_only_loss", "assistant_only_loss"),
    *("seed", "data_seed", "bf16", "fp16", "num_generations", "max_completion_length", "temperature", "top_p", "beta"),
)


class RecordCallback(TrainerCallback):
    """Writes the record: at every checkpoint, and at the end of training.

    To be added before the callback that chooses the weights: what comes between `on_train_begin` and the first epoch
    is the time that choosing took.

    Args:
        trainer: a `BilevelSFTTrainer` or a `SelfRefineTrainer`.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.seconds: dict[str, float] = {}
        self.validation: list[dict[str, Any]] = []
        self.evaluation: dict[str, Any] = {}
        self.finished = False
        self.traces = Traces()
        self._began: float | None = None
        self._chosen = False
        self._used = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget the record of an earlier run in the same folder, or go on with that of the run that is resumed."""
        folder = Path(args.output_dir) / FOLDER
        self.seconds, self.validation = {"selection": 0.0, "validation": 0.0, "total": 0.0}, []
        self.evaluation, self.finished = {}, False
        self.traces = Traces()
        if state.global_step == 0:
            old = [RUN_FILE, WEIGHTS_FILE, TRACES_FILE]
            # A second `train()` keeps the weights of the first one's pilot, and so what it found.
            if not self._used:
                old += [PILOT_FILE, SCORES_FILE]
            if args.should_save:
                # Where this fails, writing will fail too, and tell.
                with suppress(OSError):
                    for name in old:
                        (folder / name).unlink(missing_ok=True)
        else:
            earlier = read_json(folder / RUN_FILE)
            self.seconds |= earlier.get("seconds", {})
            self.validation = [e for e in earlier.get("validation", []) if e["step"] <= state.global_step]
            self.traces.read(folder, state.global_step)
        self._began, self._chosen, self._used = time.perf_counter() - self.seconds["total"], False, True

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Weights are chosen by now: note the time, and the validation loss of the untrained model."""
        if self._began is None or self._chosen:
            return
        self._chosen = True
        self.seconds["selection"] += time.perf_counter() - self._began - self.seconds["total"]
        if state.global_step == 0:
            self._follow(state)
            self._trace(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A dozen times in a run, where weights move: those of single rows."""
        self._trace(state)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Where the eval loss is reported, the validation loss is too."""
        if self._began is not None:
            self._follow(state)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """An interrupted run leaves a record as well."""
        self.save()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The last losses, and the record."""
        self._follow(state)
        self._trace(state, last=True)
        self._evaluate()
        self.finished = True
        self.save()
        self._began = None

    def _follow(self, state: Any) -> None:
        """Validation losses of the same few rows every time, on all processes."""
        trainer = self.trainer
        sets = getattr(trainer, "validation", None)
        if sets is None or not self._can_evaluate():
            return
        start = time.perf_counter()
        share = max(1, FOLLOWED_ROWS // len(sets.datasets))
        rows = {
            name: trainer.row_losses(rows.select(evenly_spaced(len(rows), share).tolist()))
            for name, rows in sets.datasets.items()
        }
        means = {name: float(losses.mean()) for name, losses in rows.items()}
        entry = {
            "step": state.global_step,
            "total": sum(sets.weights[name] * mean for name, mean in means.items()),
            "sets": means,
            "rows": {name: [round(loss, 5) for loss in losses.tolist()] for name, losses in rows.items()},
        }
        self.validation = [*(e for e in self.validation if e["step"] != state.global_step), entry]
        self.seconds["validation"] += time.perf_counter() - start

    def _trace(self, state: Any, last: bool = False) -> None:
        if self.trainer.args.should_save:
            self.traces.follow(offline_part(self.trainer), state.global_step, state.max_steps, last)

    def _evaluate(self) -> None:
        """Losses of single eval rows, once: for the standard error of the difference to another run."""
        trainer, args = self.trainer, self.trainer.args
        rows = trainer.eval_dataset
        if not hasattr(trainer, "validation") or not isinstance(rows, Dataset) or not self._can_evaluate():
            return
        packed = args.packing if args.eval_packing is None else args.eval_packing
        if packed or not {"input_ids", "labels"} <= set(rows.column_names):
            return
        start = time.perf_counter()
        losses = trainer.row_losses(rows.select(evenly_spaced(len(rows), FOLLOWED_ROWS).tolist())).tolist()
        self.evaluation = {
            "losses": [round(loss, 5) for loss in losses],
            "rows": len(rows),
            "fingerprint": fingerprint(rows.select_columns(["input_ids", "labels"])),
        }
        self.seconds["validation"] += time.perf_counter() - start

    def _can_evaluate(self) -> bool:
        """Sharded parameters cannot be used outside of the trainer's own steps."""
        return not (self.trainer.is_fsdp_enabled or self.trainer.is_deepspeed_enabled)

    def overhead(self) -> float | None:
        """Share of the time so far that went into choosing weights and following validation losses; None at rest."""
        if self._began is None or not self._chosen:
            return None
        spent = self.seconds["selection"] + self.seconds["validation"]
        return spent / max(time.perf_counter() - self._began, 1e-9)

    def save(self, rows_file: str | None = None) -> None:
        """Write `run.json` and the weights. A record that cannot be written stops no training: it is told.

        Args:
            rows_file (`str`, *optional*): where the weighted rows are, if not in the run's folder.
        """
        trainer = self.trainer
        if not trainer.args.should_save:
            return
        if self._began is not None:
            self.seconds["total"] = time.perf_counter() - self._began
        folder = Path(trainer.args.output_dir) / FOLDER
        # A trainer that has not trained, but loaded a run that had ended, knows only the rest of it.
        earlier = read_json(folder / RUN_FILE)
        seconds = {name: round(value, 2) for name, value in self.seconds.items()}
        facts = describe(trainer) | {
            "finished": self.finished if self.seconds else earlier.get("finished", False),
            "seconds": seconds or earlier.get("seconds", {}),
            "evaluation": self.evaluation or earlier.get("evaluation", {}),
            "validation": self.validation or earlier.get("validation", []),
            "rows_file": rows_file or earlier.get("rows_file"),
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / RUN_FILE, facts)
            side = offline_part(trainer)
            if side.weighs:
                # Of a stream, the rows of its sample: nobody can list the others.
                table_of = side.selection.table
                weights = side.sample_weights() if table_of is None else side.selection.seen_weights(table_of.sample)
                table = {DATA_WEIGHT: _column(weights), DATA_RANK: pa.array(data_ranks(weights))}
                if side.learns_online and table_of is None:
                    table["mean_score"] = _column(side.selection.state.score_mean[side.selection.units(_all(side))])
                _write_table(folder / WEIGHTS_FILE, table)
                self.traces.write(folder)
        except (OSError, pa.ArrowException) as error:
            logger.warning(f"The run record in {folder} could not be written ({error}): a report will lack it.")


def describe(trainer: Any) -> dict[str, Any]:
    """What `run.json` says of a trainer, without its times."""
    from .self_refine_trainer import SelfRefineTrainer

    side, args, state = offline_part(trainer), trainer.args, trainer.state
    selection, refines = side.selection, isinstance(trainer, SelfRefineTrainer)
    own = (SelfRefineConfig, GRPOConfig) if refines else (BilevelSFTConfig, SFTConfig)
    ours = {field.name for field in fields(own[0])} - {field.name for field in fields(own[1])}
    settings = {name: getattr(args, name) for name in (*COMMON, *sorted(ours)) if hasattr(args, name)}
    sets = {} if side.validation is None else side.validation.datasets
    device = args.device
    return {
        "format": FORMAT,
        "kind": "refine" if refines else "sft",
        "versions": {"trl-bilevel": __version__} | {name: version(name) for name in ("trl", "transformers", "torch")},
        "model": _model_name(trainer.model),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": args.world_size,
        "settings": settings,
        "steps": {"done": state.global_step, "planned": state.max_steps},
        "data": {
            "rows": side.row_count,
            "streamed": side.streams,
            "rows_trained_on": int(selection.kept.sum()),
            "fingerprint": selection.fingerprint,
            "validation_fingerprint": selection.validation_fingerprint,
            "validation": {
                name: {"rows": len(rows), "weight": side.validation.weights[name]} for name, rows in sets.items()
            },
        },
        "weights": {
            "learned": side.selects,
            "given": side.weighs and not side.selects,
            "by": "resample" if side.resamples else "loss",
            "online": side.learns_online,
            "smoothing": side.selection.smoothing if side.weighs else None,
            "asks_own_rows": getattr(trainer, "_asks_own_rows", None),
        },
        "log_history": _thinned(state.log_history),
    }


def add_selection_to_card(trainer: Any) -> None:
    """Add what the record says of the selection to the model card that TRL has written; no text of any row."""
    card = Path(trainer.args.output_dir) / "README.md"
    if not trainer.is_world_process_zero() or not card.is_file():
        return
    record = describe(trainer) | {"validation": callback_of(trainer).validation}
    record["evaluation"] = callback_of(trainer).evaluation
    text = card.read_text(encoding="utf-8")
    head, citations, rest = text.partition("## Citations")
    section = selection_section(record)
    text = f"{head}{section}\n{citations}{rest}" if citations else f"{text}\n{section}"
    atomically(card, lambda path: path.write_text(text, encoding="utf-8"))


def write_pilot(pilot: Pilot, scores: Tensor, trusted: Tensor, shares: Tensor, seconds: float) -> None:
    """Write what a pilot run found out: the scores of the rows, and the trusted rows that it held back.

    Written at once: a resumed run has the weights, but not their reasons.

    Args:
        pilot: that has run.
        scores (`Tensor` float32 `[row_count, F]`), trusted (`[c, F]`), shares (`[c]`): what `Pilot.run` returns.
        seconds (`float`): that it took.
    """
    trainer = pilot.trainer
    if not trainer.args.should_save:
        return
    folder = Path(trainer.args.output_dir) / FOLDER
    known = ~torch.isnan(scores).any(-1)
    texts: list[dict[str, Any]] = []
    for name, rows in pilot.held_back.datasets.items():
        for number in range(len(rows)):
            kept = len(texts) < TRUSTED_TEXTS
            texts.append({"set": name} | (row_texts(trainer, rows[number]) if kept else {}))
    for entry, score, share in zip(texts, trusted.tolist(), shares.tolist(), strict=True):
        entry |= {"score": score[0], "share": share} | ({"ending": score[1]} if len(score) > 1 else {})
    facts = {
        "format": FORMAT,
        "seconds": round(seconds, 2),
        "steps": pilot.steps,
        "learning_rate": pilot.host.learning_rate(),
        "rows_scored": int(known.sum()),
        "trusted": texts,
    }
    table = {SAMPLE_ID: pa.array(known.nonzero().squeeze(1).numpy()), "score": _column(scores[known][:, 0])}
    if scores.shape[1] > 1:
        table["ending"] = _column(scores[known][:, 1])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / PILOT_FILE, facts)
        _write_table(folder / SCORES_FILE, table)
    except (OSError, pa.ArrowException) as error:
        logger.warning(f"The record of the pilot in {folder} could not be written ({error}): a report will lack it.")


def callback_of(trainer: Any) -> RecordCallback:
    """The callback that keeps a trainer's record."""
    return next(c for c in trainer.callback_handler.callbacks if isinstance(c, RecordCallback))


def offline_part(owner: Any) -> Any:
    """The `BilevelSFTTrainer` that holds the weights."""
    return owner.offline.trainer if hasattr(owner, "offline") else owner


def _all(side: Any) -> Tensor:
    return torch.arange(side.row_count, device=side.selection.state.logits.device)


def _model_name(model: Any) -> str:
    """A hub name as it is; of a local path only the end: where a user keeps files is not for a report."""
    name = str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
    return Path(name).name if Path(name).exists() or Path(name).is_absolute() else name


def row_texts(trainer: Any, row: Mapping[str, Any]) -> dict[str, str]:
    """Prompt and answer of a prepared row."""
    pairs = list(zip(row["input_ids"], row["labels"], strict=True))
    first = next((n for n, (_, label) in enumerate(pairs) if label != -100), len(pairs))
    parts = {"prompt": [i for i, _ in pairs[:first]], "answer": [i for i, label in pairs if label != -100]}
    decode = trainer._tokenizer.decode
    return {k: decode(ids, skip_special_tokens=True)[:TEXT_LENGTH] for k, ids in parts.items()}


def _thinned(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most `LOG_ENTRIES` of the training entries, evenly spaced, and all others."""
    training = [n for n, entry in enumerate(history) if "loss" in entry]
    kept = {training[n] for n in evenly_spaced(len(training), LOG_ENTRIES).tolist()} if training else set()
    return [entry for n, entry in enumerate(history) if "loss" not in entry or n in kept]


def _column(values: Tensor) -> pa.Array:
    return pa.array(values.detach().float().cpu().numpy(), from_pandas=True)


def _write_table(path: Path, columns: Mapping[str, pa.Array]) -> None:
    atomically(path, lambda file: pq.write_table(pa.table(dict(columns)), file))
