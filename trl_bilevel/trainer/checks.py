"""Checks of what the caller gives: data, settings, model. A refusal names the argument, the value and the remedy."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from peft import PeftModel
from torch import Tensor

from ..data.identity import DATA_WEIGHT, RESERVED_COLUMNS
from ..data.streams import columns
from ..estimators import ESTIMATORS
from .amortise import decoder_layers, reads_states
from .bilevel_sft_config import BilevelSFTConfig
from .errors import row_list
from .estimator import check_alignment

if TYPE_CHECKING:
    from .bilevel_sft_trainer import BilevelSFTTrainer

logger = logging.getLogger(__name__)

SKIP = "skip_prepare_dataset"


def take_weights(args: BilevelSFTConfig, train: Any) -> tuple[Any, Tensor | None]:
    """The rows without the columns of an export, and their fixed weights; as they are if weights are learned.

    Returns:
        the rows; weights float32 `[rows]` (0 where missing), or None.
    """
    if isinstance(train, IterableDataset) and args.weight_estimator == "none" and DATA_WEIGHT in columns(train):
        raise ValueError(
            "Fixed weights (`data_weight` of `train_dataset`) are not supported with a stream: their mean is not "
            "known. Load the rows as a `Dataset`, which need not fit into memory."
        )
    if not isinstance(train, Dataset) or DATA_WEIGHT not in train.column_names or args.weight_estimator != "none":
        return train, None
    values = train.with_format(None)[DATA_WEIGHT][:]
    if any(isinstance(value, bool) or not isinstance(value, int | float | None) for value in values):
        raise TypeError(f"`data_weight` of `train_dataset` must be numbers, got {values[0]!r} in the first row.")
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


def check_kept_weights(weights: Tensor, kept: Tensor) -> None:
    """Refuse fixed weights that are 0 for all rows that preparation has kept.

    Args:
        weights (`Tensor` `[rows]`), kept (`Tensor` bool `[rows]`).
    """
    if bool(kept.any()) and float(weights[kept].sum()) <= 0:
        raise ValueError(
            f"`data_weight` of `train_dataset` is 0 for all {int(kept.sum())} rows that preparation has kept: those "
            "with weight have no token to learn from within `max_length`. Raise it, or give other weights."
        )


def check_columns(args: BilevelSFTConfig, rows: Dataset | IterableDataset, name: str, formatted: bool) -> None:
    """Refuse rows in none of the formats that TRL knows."""
    found = columns(rows)
    known = ({"input_ids"}, {"messages"}, {"conversations"}, {"prompt", "completion"}, {args.dataset_text_field})
    if formatted or any(format <= set(found) for format in known) or (args.dataset_kwargs or {}).get(SKIP):
        return
    raise ValueError(
        f"{name} has the columns {found}, in which no text format is recognised. Rename them: `messages`, "
        f"or `prompt` and `completion`, or `{args.dataset_text_field}` (`dataset_text_field`); or give a "
        "`formatting_func`."
    )


def check_filled(args: BilevelSFTConfig, rows: Dataset, name: str) -> None:
    """Refuse rows in which a text is missing, or a conversation has no turn: TRL would fail on them without a name."""
    formats = ({"prompt", "completion"}, {"messages"}, {"conversations"}, {args.dataset_text_field})
    used = next((format for format in formats if format <= set(rows.column_names)), set())
    if (args.dataset_kwargs or {}).get(SKIP):
        return
    for column in sorted(used):
        bad: list[int] = []
        seen = 0
        for table in rows.select_columns(column).with_format("arrow").iter(10_000):
            values = table[column].combine_chunks()
            missing = pc.is_null(values)
            if pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
                missing = pc.or_(missing, pc.equal(pc.fill_null(pc.list_value_length(values), 0), 0))
            bad += [seen + place for place in pc.indices_nonzero(missing).to_pylist()]
            seen += len(values)
        if bad:
            raise ValueError(
                f"`{column}` of {name} is missing or has no turn in {len(bad)} of {len(rows)} rows: "
                f"{row_list(torch.tensor(bad))}. "
                f"Leave them out: `rows.filter(lambda row: row[{column!r}])`."
            )


def check_datasets(
    args: BilevelSFTConfig,
    train: Any,
    validation: Dataset | Mapping[str, Dataset] | None,
    formatted: bool = False,
) -> dict[str, Dataset]:
    """Check the caller's data; returns the validation sets by name (empty if none is needed or given).

    Args:
        formatted (`bool`): True if a formatting function makes text of the rows.
    """
    if isinstance(train, DatasetDict | IterableDatasetDict):
        raise TypeError(
            f'`train_dataset` is a `{type(train).__name__}` of {list(train)}: pick one, e.g. `rows["train"]`.'
        )
    if train is None:
        raise ValueError("`train_dataset` is required.")
    if not isinstance(train, Dataset | IterableDataset):
        raise TypeError(
            f"`train_dataset` must be a `datasets.Dataset` or `datasets.IterableDataset`, got "
            f"`{type(train).__name__}`. A list of rows becomes one by `Dataset.from_list(rows)`."
        )
    if isinstance(train, Dataset) and len(train) == 0:
        raise ValueError("`train_dataset` is empty.")
    names = columns(train)
    taken = [name for name in RESERVED_COLUMNS if name in names]
    needed = args.weight_estimator != "none" or args.validation_loss_weight > 0
    if taken and needed:
        raise ValueError(
            f"`train_dataset` has the column(s) {taken}, which BilevelSFTTrainer writes itself. Rename them, e.g. "
            f'`train_dataset.rename_column("{taken[0]}", "my_{taken[0]}")`; or, to train with the weights of an '
            "earlier run (`data_weight`), set `weight_estimator='none'`."
        )
    check_columns(args, train, "`train_dataset`", formatted)
    if needed and not formatted and isinstance(train, Dataset):
        check_filled(args, train, "`train_dataset`")
    for setting in ("selector_group_column", "selector_key_column"):
        column = getattr(args, setting)
        used = args.selector_granularity == "group" or setting == "selector_key_column"
        if used and column is not None and column not in names:
            raise ValueError(f"`{setting}={column!r}` is not a column of `train_dataset`, which has {names}.")
    if validation is None:
        if needed:
            raise ValueError(
                f"`validation_dataset` is required with `weight_estimator={args.weight_estimator!r}` and "
                f"`validation_loss_weight={args.validation_loss_weight}`: it says what good means. For plain SFT set "
                "`weight_estimator='none'` and `validation_loss_weight=0`."
            )
        return {}
    sets: dict[str, Dataset] = dict(validation) if isinstance(validation, Mapping) else {"validation": validation}
    if not sets:
        raise ValueError("`validation_dataset` is an empty dict: give at least one dataset.")
    for name, dataset in sets.items():
        if not isinstance(dataset, Dataset):
            raise TypeError(
                f"`validation_dataset` {name!r} must be a `datasets.Dataset`, got `{type(dataset).__name__}`."
            )
        if len(dataset) == 0:
            raise ValueError(f"`validation_dataset` {name!r} is empty: give at least a few dozen trusted rows.")
        check_columns(args, dataset, f"`validation_dataset` {name!r}", formatted)
        if not formatted:
            check_filled(args, dataset, f"`validation_dataset` {name!r}")
    weights = args.validation_weights
    if weights is not None:
        assert isinstance(weights, dict)
        if set(weights) != set(sets) or min(weights.values()) < 0 or sum(weights.values()) <= 0:
            raise ValueError(
                f"`validation_weights={weights}` must give a weight of at least 0 to each of the validation sets "
                f"{sorted(sets)}, and not 0 to all."
            )
    return sets


def check_stream(args: BilevelSFTConfig) -> None:
    """Refuse what needs rows that can be counted, for a training set that is a stream."""
    if args.max_steps <= 0:
        raise ValueError("`max_steps` must be given: `train_dataset` is a stream, whose length is not known.")
    if args.packing or args.padding_free:
        raise ValueError(
            "`packing` and `padding_free` are not supported with a stream: TRL packs what it reads, and rows lose "
            "their identity. Unset them, or load the rows as a `Dataset`."
        )
    if args.filter_rate > 0:
        raise ValueError(
            f"`filter_rate={args.filter_rate}` is not supported with a stream: a share of its rows is not known "
            "before they have been seen. Set it to 0."
        )
    if args.selector_weighting == "resample":
        logger.info("The training rows are a stream: weights multiply their losses, they cannot be drawn by weight.")


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
    shards = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    if shards and (args.weight_estimator != "none" or args.validation_loss_weight > 0):
        raise ValueError(
            "DeepSpeed and FSDP are not supported yet where weights are learned: the estimators exchange whole "
            "parameter tensors, which are sharded there. Use DDP or a single GPU; or learn the weights there, with a "
            "smaller model if need be, and train with them as fixed ones (`weight_estimator='none'`, "
            "`validation_loss_weight=0`, a column `data_weight`)."
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
    if any(p.requires_grad and p.dtype == torch.float16 for p in trainer.model.parameters()):
        raise ValueError(
            "The model's trainable parameters are float16, in which the pilot run's AdamW overflows. Load the model "
            'in bfloat16 or float32 (`model_init_kwargs={"dtype": "bfloat16"}`), or train an adapter.'
        )
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
    if args.selector_update == "calibrated" and reads_states(trainer):
        decoder_layers(trainer.model)
    if trainer.predicts and not isinstance(trainer.model, PeftModel):
        raise ValueError(
            "Weights of a stream's rows are predicted from hidden states of the frozen model, and full "
            "fine-tuning changes it. Train an adapter (`peft_config`), or set "
            "`selector_update='sparse_centred'`, or `selector_granularity='group'`."
        )
    if args.remove_unused_columns and trainer.args.dataset_kwargs and trainer._skip_prepare_dataset:
        missing = {"input_ids", "labels"} - set(trainer.rows.column_names)
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


def check_format(trainer: BilevelSFTTrainer, rows: Dataset, name: str) -> None:
    """Refuse trusted rows of which other tokens would be scored than of training rows.

    TRL masks the prompts by the format of the training rows; rows without a prompt column would then count whole, and
    weights follow their prompts.
    """
    columns = rows.column_names
    if "labels" in columns or "completion_mask" in columns or {"prompt", "completion"} <= set(columns):
        return
    if trainer.completion_only_loss and not trainer.args.assistant_only_loss:
        raise ValueError(
            f"{name} has the columns {columns}, while the training rows are prompts and completions whose completions "
            "alone are scored: all of its tokens would count, prompts too. Split its rows into `prompt` and "
            "`completion`, or set `completion_only_loss=False`."
        )


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
