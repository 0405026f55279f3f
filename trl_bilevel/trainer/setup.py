"""What happens once, at the construction and at the start of a run: checks, preparation, the making of parts."""

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
from datasets import Dataset
from torch import Tensor
from transformers import TrainerCallback
from trl import SFTConfig

from ..data.identity import DATA_WEIGHT, RESERVED_COLUMNS, SAMPLE_ID, count_overlap, sample_ids
from ..data.packing import SPLITTING, first_window, pack_rows
from ..estimators import ESTIMATORS
from .amortise import decoder_layers
from .bilevel_sft_config import BilevelSFTConfig
from .estimator import check_alignment
from .host import TrainerHost
from .selection import Groups, make_groups
from .validation import ValidationSets

if TYPE_CHECKING:
    from .bilevel_sft_trainer import BilevelSFTTrainer

logger = logging.getLogger(__name__)

# The threshold of the hard gate is recomputed this often when weights move in every step.
GATE_REFRESH_STEPS = 50
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


def take_weights(args: BilevelSFTConfig, train: Any) -> tuple[Any, Tensor | None]:
    """The rows without the columns of an export, and their fixed weights; as they are if weights are learned.

    Returns:
        the rows; weights float32 `[rows]` (0 where missing), or None.
    """
    if not isinstance(train, Dataset) or DATA_WEIGHT not in train.column_names or args.weight_estimator != "none":
        return train, None
    values = train[DATA_WEIGHT]
    weights = torch.tensor([float("nan") if value is None else value for value in values], dtype=torch.float32)
    known = weights[~torch.isnan(weights)]
    if len(known) == 0 or not bool(torch.isfinite(known).all()) or float(known.min()) < 0 or float(known.sum()) <= 0:
        raise ValueError(
            "`data_weight` of `train_dataset` must be finite numbers of at least 0, and not 0 for all rows (missing "
            "for rows that were never trained on)."
        )
    if args.selector_granularity == "group":
        raise ValueError(
            "`selector_granularity='group'` has no meaning with the fixed weights of a column `data_weight`. Leave it "
            "out, or remove the column and choose a `weight_estimator`."
        )
    ours = [name for name in RESERVED_COLUMNS if name in train.column_names]
    return train.remove_columns(ours), torch.nan_to_num(weights, nan=0.0)


def check_datasets(
    args: BilevelSFTConfig, train: Any, validation: Dataset | Mapping[str, Dataset] | None
) -> dict[str, Dataset]:
    """Check the caller's data; returns the validation sets by name (empty if none is needed or given)."""
    if train is None:
        raise ValueError("`train_dataset` is required.")
    if not isinstance(train, Dataset):
        raise TypeError(
            f"`train_dataset` must be a `datasets.Dataset`, got `{type(train).__name__}`: weights are kept per row, "
            "so the rows must be countable. Materialise a streaming dataset first, e.g. "
            "`Dataset.from_list(list(stream))`."
        )
    if len(train) == 0:
        raise ValueError("`train_dataset` is empty.")
    taken = [name for name in RESERVED_COLUMNS if name in train.column_names]
    if taken:
        raise ValueError(
            f"`train_dataset` has the column(s) {taken}, which BilevelSFTTrainer writes itself. Rename them, e.g. "
            f'`train_dataset.rename_column("{taken[0]}", "my_{taken[0]}")`; or, to train with the weights of an '
            "earlier run (`data_weight`), set `weight_estimator='none'`."
        )
    if args.selector_granularity == "group" and args.selector_group_column not in train.column_names:
        raise ValueError(
            f"`selector_group_column={args.selector_group_column!r}` is not a column of `train_dataset`, which has "
            f"{train.column_names}."
        )
    needed = args.weight_estimator != "none" or args.validation_loss_weight > 0
    if validation is None:
        if needed:
            raise ValueError(
                f"`validation_dataset` is required with `weight_estimator={args.weight_estimator!r}` and "
                f"`validation_loss_weight={args.validation_loss_weight}`: it says what good means. For plain SFT set "
                "`weight_estimator='none'` and `validation_loss_weight=0`."
            )
        return {}
    sets = dict(validation) if isinstance(validation, Mapping) else {"validation": validation}
    if not sets:
        raise ValueError("`validation_dataset` is an empty dict: give at least one dataset.")
    for name, dataset in sets.items():
        if not isinstance(dataset, Dataset):
            raise TypeError(
                f"`validation_dataset` {name!r} must be a `datasets.Dataset`, got `{type(dataset).__name__}`."
            )
        if len(dataset) == 0:
            raise ValueError(f"`validation_dataset` {name!r} is empty: give at least a few dozen trusted rows.")
    weights = args.validation_weights
    if weights is not None:
        assert isinstance(weights, dict)
        if set(weights) != set(sets) or min(weights.values()) < 0 or sum(weights.values()) <= 0:
            raise ValueError(
                f"`validation_weights={weights}` must give a weight of at least 0 to each of the validation sets "
                f"{sorted(sets)}, and not 0 to all."
            )
    return sets


def check_supported(trainer: BilevelSFTTrainer) -> None:
    """Refuse what cannot work, with the reason. Plain SFT (no weights, no validation term) is never refused."""
    args = trainer.args
    if not trainer._tracks_rows:
        return
    check_merged_rows(trainer)
    if trainer._is_vision_dataset or trainer._is_vlm:
        raise ValueError("Vision-language models are not supported: validation rows join text batches only.")
    if args.loss_type != "nll":
        raise ValueError(
            f"`loss_type={args.loss_type!r}` is not supported: weights multiply the negative log-likelihood of a row. "
            "Use `loss_type='nll'`."
        )
    if args.label_smoothing_factor > 0 or trainer.compute_loss_func is not None:
        raise ValueError(
            "`label_smoothing_factor` and `compute_loss_func` are not supported: they build the loss without the "
            "per-token log-probabilities that the weights multiply. Unset them."
        )
    if trainer.accelerator.mixed_precision == "fp16" and args.weight_estimator != "none":
        raise ValueError("`fp16=True` is not supported: the pilot run takes no part in loss scaling. Use `bf16=True`.")
    parallelism = trainer.accelerator.parallelism_config
    if parallelism is not None and (parallelism.tp_enabled or parallelism.cp_enabled or parallelism.sp_enabled):
        raise ValueError(
            "Tensor, context and sequence parallelism are not supported: they split the rows whose losses are "
            "compared."
        )
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise ValueError(
            "DeepSpeed and FSDP are not supported yet: the estimators exchange whole parameter tensors, which are "
            "sharded there. Use DDP or a single GPU."
        )
    if not trainer.model_accepts_loss_kwargs:
        raise ValueError(
            f"{type(trainer.model).__name__} does not accept `num_items_in_batch`, so the loss cannot be normalised "
            "over the accumulation window."
        )
    if args.world_size > 1 and not args.average_tokens_across_devices:
        raise ValueError("`average_tokens_across_devices=False` is not supported with several processes. Unset it.")
    if args.selector_weighting == "resample" and args.train_sampling_strategy != "random":
        raise ValueError(
            f"`train_sampling_strategy={args.train_sampling_strategy!r}` contradicts `selector_weighting='resample'`, "
            "which draws rows by their weights. Use `selector_weighting='loss'`."
        )
    if not any(p.requires_grad for p in trainer.model.parameters()):
        raise ValueError("The model has no trainable parameter: pass a `peft_config`, or a model that is not frozen.")
    if args.weight_estimator == "none":
        return
    if args.weight_estimator == "loss":
        warnings.warn(
            "`weight_estimator='loss'` ranks rows by their loss, so it prefers easy bad rows (boilerplate, stubs, "
            "refusals of work) to good ones: measured AUC below 0.35 on them, where 0.5 is chance. It is kept to "
            "reproduce published results; use 'value_function' for training.",
            UserWarning,
            stacklevel=4,
        )
    estimator = ESTIMATORS[args.weight_estimator]
    if estimator.needs_validation_term and args.validation_loss_weight == 0 and args.selector_update != "calibrated":
        raise ValueError(
            f"`validation_loss_weight=0` with `weight_estimator={args.weight_estimator!r}` and "
            f"`selector_update={args.selector_update!r}` leaves the validation set without influence. Set "
            "`validation_loss_weight` above 0, or `selector_update='calibrated'`, or `weight_estimator='lookahead'`."
        )
    if args.weight_estimator == "alignment":
        check_alignment(trainer)
    if 0 < args.pilot_scored_rows < len(trainer.rows) and args.selector_update == "calibrated":
        decoder_layers(trainer.model)
    if args.remove_unused_columns and trainer.args.dataset_kwargs and trainer._skip_prepare_dataset:
        missing = {"input_ids", "labels"} - set(trainer.train_dataset.column_names)
        if missing:
            raise ValueError(
                f"`skip_prepare_dataset=True` needs the columns input_ids and labels; missing: {missing}."
            )


def check_merged_rows(trainer: BilevelSFTTrainer) -> None:
    """Refuse what does not go with packing or padding-free batches, and rows that were packed before."""
    args = trainer.args
    if "seq_lengths" in trainer.rows.column_names:
        raise ValueError(
            "`train_dataset` has the column 'seq_lengths', so its rows are packed already, and nothing says which "
            "tokens belong to which of your rows. Give the rows before packing, with `packing=True`."
        )
    if not trainer.merges_rows:
        return
    if getattr(getattr(trainer.model, "active_peft_config", None), "is_prompt_learning", False):
        raise ValueError(
            "`packing` and `padding_free` are not supported with prompt learning: its virtual tokens stand before the "
            "first row only. Use LoRA, or unset them."
        )
    if args.weight_estimator != "alignment" or args.selector_update == "calibrated":
        return
    if args.alignment_normalise:
        raise ValueError(
            "`alignment_normalise=True` is not supported with `packing` or `padding_free`: norms are taken of whole "
            "batch rows. Unset it, or use `selector_update='calibrated'`."
        )
    if args.packing and args.packing_strategy == "wrapped":
        raise ValueError(
            "`weight_estimator='alignment'` is not supported with `packing_strategy='wrapped'`: rows attend to each "
            "other there, so their gradients cannot be told apart. Use `packing_strategy='bfd'`."
        )


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


def with_scored_tokens(rows: Dataset) -> Dataset:
    """Rows with at least one token that a causal model scores (a label after the first position)."""
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
    if trainer._tracks_rows and len(trainer.train_dataset) < batch_rows and not args.packing:
        raise ValueError(
            f"`train_dataset` has {int(kept.sum())} usable rows, fewer than one batch of {batch_rows} rows "
            "(`per_device_train_batch_size` x processes). Lower the batch size or give more rows."
        )
    return kept


def make_row_groups(args: BilevelSFTConfig, train: Dataset) -> Groups | None:
    """Groups of the caller's rows, or `None` for a weight per row."""
    if args.selector_granularity != "group":
        return None
    return make_groups(train[args.selector_group_column])


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
        if max(map(len, prepared.values())) < 2:
            raise ValueError(
                "Every set of `validation_dataset` has a single row: give at least two in one, or merge them."
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
        datasets,
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
    return max(1, round(batch_rows * len(trainer.rows) / len(trainer.train_dataset)))


def prepare_rows(trainer: BilevelSFTTrainer, dataset: Dataset) -> Dataset:
    """Rows tokenised as TRL does the training set, in their order; as they are if they have `labels`."""
    if "labels" in dataset.column_names:
        return dataset
    numbered = dataset.add_column(SAMPLE_ID, np.arange(len(dataset)))
    formatting = trainer._formatting_func
    # Preparation may shuffle.
    return trainer._prepare_dataset(
        numbered, trainer.processing_class, trainer.args, False, formatting, "scored"
    ).sort(SAMPLE_ID)


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
    for start in range(0, len(dataset), size):
        rows = [dataset[row] for row in range(start, min(start + size, len(dataset)))]
        batch = trainer.row_collator([{k: row[k] for k in ("input_ids", "labels")} for row in rows])
        losses.append(host.row_losses(batch).means().cpu())
    trainer.model.train(training)
    return torch.cat(losses)


def check_agreement(trainer: BilevelSFTTrainer) -> None:
    """Stop if the selectors of the processes differ: each would train the model on other weights.

    Compares sums over all weights, to 1e-6: they are the same to the last bit unless kernels add in varying order.

    Raises:
        RuntimeError: on all processes, naming those that differ from the first one.
    """
    if trainer.args.world_size == 1:
        return
    sums = trainer.accelerator.gather(trainer.selection.state.totals.to(trainer.args.device).reshape(1, -1))
    apart = ((sums - sums[0]).abs() > 1e-6 * sums[0].abs()).any(-1).nonzero().flatten().tolist()
    if apart:
        raise RuntimeError(
            f"The weights on process(es) {', '.join(map(str, apart))} are not those on process 0 (step "
            f"{trainer.state.global_step}). Do all processes read the same rows in the same order, and the same "
            "checkpoint? Nothing after the last checkpoint is to be trusted."
        )


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
