"""What happens once, at the construction and at the start of a run: preparation, and the making of parts."""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from ..data.identity import (
    RESERVED_COLUMNS,
    SAMPLE_ID,
    add_sample_ids,
    count_overlap,
    fingerprint,
    sample_ids,
)
from ..data.packing import SPLITTING, first_window, pack_rows
from ..data.streams import as_dataset, columns, first_rows, hashed_unit, with_units
from . import checks
from .bilevel_sft_config import MIN_SCORED_ROWS, BilevelSFTConfig
from .host import TrainerHost
from .units import Groups, Table, make_groups
from .validation import ValidationSets

if TYPE_CHECKING:
    from .bilevel_sft_trainer import BilevelSFTTrainer

logger = logging.getLogger(__name__)

# Validation rows that calibration needs at least.
MIN_CALIBRATION_ROWS = 8


class StartCallback(TrainerCallback):
    """Starts the selection when training begins: the model is in place by then, and no row has been drawn yet."""

    def __init__(self, trainer: BilevelSFTTrainer):
        self.trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Run the pilot, or make the estimator."""
        self.trainer.start_selection()


def resolve_config(args: SFTConfig | None, model: Any) -> BilevelSFTConfig:
    """A `BilevelSFTConfig` from what the user gave, as TRL's trainers do it."""
    if isinstance(args, BilevelSFTConfig):
        return args
    if args is None:
        name = model if isinstance(model, str) else model.config._name_or_path
        return BilevelSFTConfig(f"{name.split('/')[-1]}-Bilevel-SFT")
    # Field by field: `to_dict` hides every token, `eos_token` and `pad_token` among them.
    return BilevelSFTConfig(**{field.name: getattr(args, field.name) for field in fields(args) if field.init})


def key_column(args: BilevelSFTConfig) -> str | None:
    """The column whose values tell a stream's units apart; None for what the rows say."""
    return args.selector_group_column if args.selector_granularity == "group" else args.selector_key_column


def with_ids(args: BilevelSFTConfig, rows: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """Rows with a `sample_id`: the caller's row number; in a stream, the place of the row's key in the table."""
    if isinstance(rows, Dataset):
        return add_sample_ids(rows)
    return with_units(rows, key_column(args), args.selector_table_size)


def read_sample(trainer: BilevelSFTTrainer) -> Table:
    """Read the first prepared rows of a stream: the pilot runs on them. They become the trainer's `rows`.

    Raises:
        ValueError: if there are too few of them.
    """
    args = trainer.args
    if not trainer._tracks_rows:
        return Table(1, False, torch.zeros(0, dtype=torch.int64), {})
    missing = {"input_ids", "labels"} - set(columns(trainer.train_dataset))
    if missing:
        raise ValueError(f"`skip_prepare_dataset=True` needs the columns input_ids and labels; missing: {missing}.")
    trainer.train_dataset = with_scored_tokens(trainer.train_dataset)
    rows = first_rows(trainer.train_dataset, args.stream_sample_rows)
    needed = max(2 * MIN_SCORED_ROWS, args.train_batch_size * trainer.accelerator.num_processes)
    if len(rows) < needed:
        raise ValueError(
            f"The stream `train_dataset` has {len(rows)} usable rows, fewer than {needed}. Is it empty, or are its "
            "prompts longer than `max_length`? A small set need not be streamed: "
            "`Dataset.from_list(list(stream))`."
        )
    trainer._unpacked, units = as_dataset(rows)
    trainer.row_count = len(rows)
    grouped = args.selector_granularity == "group"
    names: dict[int, str] = {}
    if grouped:
        column = args.selector_group_column
        for row in first_rows(trainer._caller_rows, len(rows)):
            names[hashed_unit(str(row[column]), args.selector_table_size)] = str(row[column])
    return Table(args.selector_table_size, grouped, units, names)


def train_fingerprint(trainer: BilevelSFTTrainer) -> str:
    """Of the caller's rows; of a stream, of its prepared sample. Empty if nobody will ask (plain SFT on a stream)."""
    rows = trainer.rows if trainer.streams else trainer._caller_rows
    return fingerprint(rows) if isinstance(rows, Dataset) else ""


def padding_collator(trainer: BilevelSFTTrainer) -> Callable[[list[Any]], dict[str, Any]]:
    """A collator that gives each row a batch row: the trainer's own, unless that is padding-free."""
    collator: Any = trainer.data_collator
    return dataclasses.replace(collator, padding_free=False) if trainer.padding_free else collator


def prepare_packed(args: BilevelSFTConfig, prepare: Callable[[SFTConfig], Dataset]) -> tuple[Dataset, Dataset]:
    """The training rows one by one, and packed.

    Args:
        prepare: prepares the rows with the settings that it is given, without packing them.

    Returns:
        `tuple` of `Dataset`: rows of at most `max_length` tokens; packed rows. What preparation drops is in neither.
    """
    if args.max_length is None:
        raise ValueError("`packing=True` needs `max_length`, the tokens of a packed row.")
    settings = copy.copy(args)
    if args.packing_strategy in SPLITTING:
        # No token is cut off before packing.
        settings.max_length = None
    rows = with_scored_tokens(prepare(settings))
    if len(rows) == 0:
        return rows, rows
    # The first process packs, the others read its cache.
    with PartialState().main_process_first():
        packed = pack_rows(rows, args.max_length, args.packing_strategy, args.dataset_num_proc)
        if args.shuffle_dataset:
            packed = packed.shuffle(seed=args.seed)
        return first_window(rows, args.max_length, args.dataset_num_proc), packed


def without_numbers(rows: Any) -> Any:
    """Rows without columns of our names, which would be taken for row numbers; a dict of such sets for a dict."""
    if isinstance(rows, Mapping):
        return {name: without_numbers(part) for name, part in rows.items()}
    if not isinstance(rows, Dataset):
        return rows
    return rows.remove_columns([name for name in RESERVED_COLUMNS if name in rows.column_names])


def with_scored_tokens(rows: Any) -> Any:
    """Rows with at least one token that a causal model scores (a label after the first position)."""
    if isinstance(rows, IterableDataset):
        return rows.filter(lambda row: any(label != -100 for label in row["labels"][1:]))
    if "labels" not in rows.column_names:
        return rows
    return rows.filter(
        lambda batch: [any(label != -100 for label in labels[1:]) for labels in batch],
        batched=True,
        input_columns="labels",
        desc="Dropping rows without a token to score",
    )


def kept_rows(trainer: BilevelSFTTrainer) -> Tensor:
    """Which of the caller's rows preparation kept, bool `[row_count]`; refuses a set that cannot fill one batch."""
    if trainer.streams:
        return torch.ones(trainer.row_count, dtype=torch.bool)
    if SAMPLE_ID not in trainer.rows.column_names:
        # Plain SFT with packing: rows lose their identity, and nobody asks for it.
        return torch.ones(trainer.row_count, dtype=torch.bool)
    kept = torch.zeros(trainer.row_count, dtype=torch.bool)
    kept[sample_ids(trainer.rows)] = True
    dropped = int((~kept).sum())
    args = trainer.args
    batch_rows = args.train_batch_size * trainer.accelerator.num_processes
    if args.packing and len(trainer.train_dataset) < trainer.accelerator.num_processes:
        raise ValueError(
            f"`train_dataset` makes {len(trainer.train_dataset)} packed rows of `max_length={args.max_length}` "
            f"tokens, fewer than there are processes ({trainer.accelerator.num_processes}). Lower `max_length`, or "
            "give more rows."
        )
    if dropped:
        logger.warning(
            f"{dropped} of {len(kept)} training rows were dropped in preparation (nothing to learn from within "
            "`max_length`). They keep their row number and have no weight (NaN in `sample_weights()`)."
        )
    if trainer._tracks_rows and not bool(kept.any()):
        raise ValueError(
            f"None of the {len(kept)} rows of `train_dataset` has a token to learn from within "
            f"`max_length={args.max_length}`. Raise it, or look at the rows: are their answers empty?"
        )
    if trainer._tracks_rows and len(trainer.train_dataset) < batch_rows and not args.packing:
        raise ValueError(
            f"`train_dataset` has {int(kept.sum())} usable rows, fewer than one batch of {batch_rows} rows "
            "(`per_device_train_batch_size` x processes). Lower the batch size or give more rows."
        )
    return kept


def make_row_groups(args: BilevelSFTConfig, train: Dataset | IterableDataset) -> Groups | None:
    """Groups of the caller's rows, or `None` for a weight per row; those of a stream are in its table."""
    if args.selector_granularity != "group" or isinstance(train, IterableDataset):
        return None
    return make_groups(train.with_format(None)[args.selector_group_column])


def prepare_validation(
    trainer: BilevelSFTTrainer, sets: Mapping[str, Dataset], formatting_func: Any
) -> tuple[ValidationSets | None, ValidationSets | None]:
    """Tokenise the validation sets as TRL does the training set, and check what is left of them.

    Returns:
        the sets as the model is trained on them, and as estimators draw from them; None without validation rows.
    """
    if not sets:
        return None, None
    args = trainer.args
    prepared = {}
    for name, dataset in sets.items():
        checks.check_format(trainer, dataset, f"`validation_dataset` {name!r}")
        rows = dataset
        if not trainer._skip_prepare_dataset:
            rows = trainer._prepare_dataset(
                dataset, trainer.processing_class, args, False, formatting_func, f"validation {name}"
            )
        rows = with_scored_tokens(rows)
        if len(rows) == 0:
            raise ValueError(
                f"All {len(dataset)} rows of `validation_dataset` {name!r} were dropped in preparation: no token to "
                f"score within `max_length={args.max_length}`. Raise `max_length`, or use "
                "`truncation_mode='keep_end'`."
            )
        if len(rows) < len(dataset):
            logger.warning(
                f"{len(dataset) - len(rows)} of {len(dataset)} rows of validation set {name!r} were dropped."
            )
        overlap = count_overlap(trainer.rows, rows)
        if overlap:
            warnings.warn(
                f"{overlap} of {len(rows)} rows of `validation_dataset` {name!r} are also training rows: their "
                "weights will be flattered, and the validation loss will not notice overfitting. Remove them from "
                "one side.",
                UserWarning,
                stacklevel=3,
            )
        prepared[name] = rows
    if args.weight_estimator != "none" and args.selector_update == "calibrated":
        total = sum(map(len, prepared.values()))
        given = args.validation_weights if isinstance(args.validation_weights, dict) else {}
        if max(len(rows) for name, rows in prepared.items() if given.get(name, 1.0) > 0) < 2:
            raise ValueError(
                "Every set of `validation_dataset` that counts (`validation_weights`) has a single row: give at least "
                "two in one, or merge them."
            )
        if total < MIN_CALIBRATION_ROWS:
            raise ValueError(
                f"`validation_dataset` has {total} usable rows; `selector_update='calibrated'` needs at least "
                f"{MIN_CALIBRATION_ROWS}, of which it holds a quarter back. Give more rows, or use "
                "`selector_update='sparse_centred'`."
            )
    given, rows = args.validation_batch_size, rows_per_step(trainer)
    # Estimators look at few batches, and need them large.
    return (
        validation_sets(trainer, prepared, given or max(1, rows // 4), trainer.data_collator),
        validation_sets(trainer, prepared, given or rows),
    )


def validation_sets(
    trainer: BilevelSFTTrainer,
    datasets: Mapping[str, Dataset],
    batch_size: int,
    collate: Callable[[list[Any]], dict[str, Any]] | None = None,
) -> ValidationSets:
    """Prepared validation sets that hand out `batch_size` rows per step, over all processes; padded by default."""
    args = trainer.args
    given = args.validation_weights or dict.fromkeys(datasets, 1.0)
    total = sum(given[name] for name in datasets)
    return ValidationSets(
        {name: rows.select_columns(row_columns(args, rows)) for name, rows in datasets.items()},
        {name: given[name] / total for name in datasets},
        batch_size=batch_size,
        collate=collate or trainer.row_collator,
        seed=args.seed,
        # With a collator of the user's, TRL leaves the tokenizer without a padding token.
        pad_token_id=next(
            i for i in (trainer._tokenizer.pad_token_id, trainer._tokenizer.eos_token_id, 0) if i is not None
        ),
    )


def rows_per_step(trainer: BilevelSFTTrainer) -> int:
    """Training rows of one optimizer step, over all processes; the mean number of them with packing."""
    args = trainer.args
    batch_rows = args.train_batch_size * args.gradient_accumulation_steps * trainer.accelerator.num_processes
    if trainer.streams:
        return batch_rows
    return max(1, round(batch_rows * len(trainer.rows) / len(trainer.train_dataset)))


def prepare_rows(trainer: BilevelSFTTrainer, dataset: Dataset) -> Dataset:
    """Rows tokenised as TRL does the training set, in their order; as they are if they have `labels`."""
    if "labels" in dataset.column_names:
        return dataset
    numbered = without_numbers(dataset).add_column(SAMPLE_ID, np.arange(len(dataset)))
    formatting = trainer._formatting_func
    # TRL's own: ours would take the numbers away. Preparation may shuffle.
    return SFTTrainer._prepare_dataset(
        trainer, numbered, trainer.processing_class, trainer.args, False, formatting, "scored"
    ).sort(SAMPLE_ID)


def row_columns(args: BilevelSFTConfig, rows: Dataset) -> list[str]:
    """What a collator is given of prepared rows: all columns where they are kept (`remove_unused_columns=False`)."""
    if not args.remove_unused_columns:
        return list(rows.column_names)
    return [name for name in ("input_ids", "labels", SAMPLE_ID) if name in rows.column_names]


@torch.no_grad()
def evaluate_rows(trainer: BilevelSFTTrainer, dataset: Dataset) -> Tensor:
    """Mean loss per token of every row that preparation keeps, float32 on the CPU, by forwards in eval mode."""
    args = trainer.args
    dataset = prepare_rows(trainer, dataset)
    if len(dataset) == 0:
        return torch.zeros(0)
    host = TrainerHost(trainer)
    training = trainer.model.training
    trainer.model.eval()
    losses = []
    size = args.per_device_eval_batch_size
    dataset = dataset.select_columns(row_columns(args, dataset))
    for start in range(0, len(dataset), size):
        batch = trainer.row_collator([dataset[row] for row in range(start, min(start + size, len(dataset)))])
        losses.append(host.row_losses(batch).means().cpu())
    trainer.model.train(training)
    return torch.cat(losses)


def warmup_steps(trainer: BilevelSFTTrainer) -> int:
    """`selector_warmup_steps` in optimizer steps (a value below 1 is a share of the run)."""
    given = trainer.args.selector_warmup_steps
    return int(given) if given >= 1 else math.ceil(given * trainer.state.max_steps)


def trainable_dtypes(model: torch.nn.Module) -> dict[str, torch.dtype]:
    """Dtypes of the trainable parameters by name, before a checkpoint is loaded."""
    return {name: parameter.dtype for name, parameter in model.named_parameters() if parameter.requires_grad}


def restore_dtypes(model: torch.nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """Undo what loading did to them: PEFT loads a QLoRA adapter in fp32, and training goes on exactly in bf16 only."""
    for name, parameter in model.named_parameters():
        if name in dtypes:
            parameter.data = parameter.data.to(dtypes[name])
