"""What a run cannot do, found out at construction: of TRL's release, of settings, of the model.

A refusal names the argument, the value and the remedy. Plain SFT (no weights, no trusted rows) is never refused.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import trl
from datasets import Dataset
from peft import PeftModel

from ..weights.adapters import adapted_modules
from ..weights.language_model import LanguageModel
from ..weights.settings import PILOTS
from .bilevel_sft_config import BilevelSFTConfig

# What each use of TRL's SFTTrainer rests on: the method, and what its source must hold.
PREPARES = ("_prepare_dataset", ("packing", "formatting_func", "dataset_name"))
SAMPLES = ("_get_train_sampler", ())
WEIGHS_LOSSES = ("compute_loss", ("fused_lm_head", "log_probs"))


def check_contract(trainer: type, weighs_losses: bool, resamples: bool) -> None:
    """Refuse a release of TRL that lacks what this run needs, and only then.

    Args:
        trainer: `trl.SFTTrainer`.
        weighs_losses (`bool`): losses of rows are multiplied by weights, or trusted rows join a step.
        resamples (`bool`): rows are drawn by their weights.

    Raises:
        ImportError: naming what is missing, and what to do.
    """
    needed = [PREPARES, *([SAMPLES] if resamples else []), *([WEIGHS_LOSSES] if weighs_losses else [])]
    for method, words in needed:
        found = getattr(trainer, method, None)
        source = "" if found is None else inspect.getsource(found)
        missing = [word for word in words if word not in source]
        if found is not None and not missing:
            continue
        what = f"`SFTTrainer.{method}`" + (f" without {', '.join(map(repr, missing))}" if found is not None else "")
        if method == "compute_loss":
            raise ImportError(
                f"trl {trl.__version__} has {what}: it gives no log-probabilities of single tokens, so rows' losses "
                "cannot be weighted, nor trusted rows join them. Draw rows by their weights "
                "(`selector_weighting='resample'`, no `packing`, `validation_loss_weight=0`), or install trl>=1.16."
            )
        raise ImportError(f"trl {trl.__version__} lacks {what}, which trl-bilevel needs. Install trl 1.12 to 1.16.")


def check_settings(args: BilevelSFTConfig, weighs_losses: bool, compute_loss_func: Any, processes: int) -> None:
    """Refuse settings that do not go with weighted rows. Rows that are drawn by their weights take any loss."""
    if weighs_losses and args.loss_type != "nll":
        raise ValueError(
            f"`loss_type={args.loss_type!r}` is not supported where weights multiply losses, or the model is trained "
            "on trusted rows. Use `loss_type='nll'`, or draw rows by their weights (`selector_weighting='resample'`, "
            "`validation_loss_weight=0`)."
        )
    if weighs_losses and (args.label_smoothing_factor > 0 or compute_loss_func is not None):
        raise ValueError(
            "`label_smoothing_factor` and `compute_loss_func` are not supported where weights multiply losses, or the "
            "model is trained on trusted rows: they build the loss without the log-probabilities that are multiplied. "
            "Unset them, or draw rows by their weights (`selector_weighting='resample'`, `validation_loss_weight=0`)."
        )
    if processes > 1 and not args.average_tokens_across_devices:
        raise ValueError("`average_tokens_across_devices=False` is not supported with several processes. Unset it.")
    strategy = getattr(args, "train_sampling_strategy", "random")
    if args.selector_weighting == "resample" and strategy != "random":
        raise ValueError(
            f"`train_sampling_strategy={strategy!r}` contradicts `selector_weighting='resample'`, which draws rows by "
            "their weights. Use `selector_weighting='loss'`."
        )
    if args.weight_estimator == "loss":
        warnings.warn(
            f"`selector_preset={args.selector_preset!r}` ranks rows by their loss, so it prefers easy bad rows "
            "(boilerplate, stubs, refusals of work) to good ones: measured AUC below 0.35 on them, where 0.5 is "
            "chance. It is kept to reproduce published results; use 'balanced' for training.",
            UserWarning,
            stacklevel=4,
        )


def check_stream(args: BilevelSFTConfig) -> None:
    """Refuse what needs rows that can be counted."""
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
    if args.published:
        raise ValueError(
            f"`selector_preset={args.selector_preset!r}` is not supported with a stream: its weights move row by row, "
            "and a stream's rows cannot be counted. Use 'balanced', or load the rows as a `Dataset`."
        )
    if args.weight_estimator in PILOTS and args.selector_group_column is None:
        raise ValueError(
            f"`weight_estimator={args.weight_estimator!r}` is not supported with a stream: a pilot does not score "
            "rows as they come. Use 'probe', or give `selector_group_column`."
        )


def check_model(
    args: BilevelSFTConfig, model: Any, accelerator: Any, vision: bool = False, sharded: bool = False
) -> None:
    """Refuse models and set-ups in which rows cannot be scored or weighted."""
    if vision:
        raise ValueError("Vision-language models are not supported: trusted rows join text batches only.")
    parallelism, mixed_precision = getattr(accelerator, "parallelism_config", None), accelerator.mixed_precision
    if parallelism is not None and (parallelism.tp_enabled or parallelism.cp_enabled or parallelism.sp_enabled):
        raise ValueError(
            "Tensor, context and sequence parallelism are not supported: they split the rows whose losses are "
            "compared."
        )
    learns = args.weight_estimator != "none"
    if sharded and (learns or args.validation_loss_weight > 0):
        raise ValueError(
            "DeepSpeed and FSDP are not supported where weights are learned: choosing reads the whole model. Learn "
            "the weights beforehand (`learn_weights` or `trl-bilevel rank`, with a smaller model if need be), and "
            "train with the column `data_weight` and `weight_estimator='none'`."
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("The model has no trainable parameter: pass a `peft_config`, or a model that is not frozen.")
    if not learns:
        return
    if mixed_precision == "fp16" and args.published:
        raise ValueError(
            f"`fp16=True` with `selector_preset={args.selector_preset!r}` is not supported: its second set of "
            "parameters takes no part in loss scaling. Use `bf16=True`."
        )
    adapted_modules(LanguageModel(model).decoder()[1])


def check_stream_model(model: Any, grouped: bool) -> None:
    """Refuse a stream whose weights would rest on a model that changes."""
    if not grouped and not isinstance(model, PeftModel):
        raise ValueError(
            "Weights of a stream's rows are predicted from hidden states of the frozen model, and full fine-tuning "
            "changes it. Train an adapter (`peft_config`), or give `selector_group_column`."
        )


def check_rows(
    args: BilevelSFTConfig, prepared: Dataset, count: int, model: Any, merges: bool, trained_on: int, processes: int
) -> None:
    """Refuse prepared rows that cannot be told apart, or are too few.

    Args:
        prepared: the rows, one by one.
        count (`int`): of the caller's rows.
        merges (`bool`): a row of a batch may hold several rows (packing, padding-free).
        trained_on (`int`): rows of the training set, packed ones if rows are packed.
    """
    names: Sequence[str] = prepared.column_names
    if "seq_lengths" in names:
        raise ValueError(
            "`train_dataset` has the column 'seq_lengths', so its rows are packed already, and nothing says which "
            "tokens belong to which of your rows. Give the rows before packing, with `packing=True`."
        )
    missing = {"input_ids", "labels"} - set(names)
    if missing and args.remove_unused_columns:
        raise ValueError(f"`skip_prepare_dataset=True` needs the columns input_ids and labels; missing: {missing}.")
    if merges and getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise ValueError(
            "`packing` and `padding_free` are not supported with prompt learning: its virtual tokens stand before the "
            "first row only. Use LoRA, or unset them."
        )
    if len(prepared) == 0:
        raise ValueError(
            f"None of the {count} rows of `train_dataset` has a token to learn from within "
            f"`max_length={args.max_length}`. Raise it, or look at the rows: are their answers empty?"
        )
    if args.packing and trained_on < processes:
        raise ValueError(
            f"`train_dataset` makes {trained_on} packed rows of `max_length={args.max_length}` tokens, fewer than "
            f"there are processes ({processes}). Lower `max_length`, or give more rows."
        )
    batch_rows = args.train_batch_size * processes
    if not args.packing and trained_on < batch_rows:
        raise ValueError(
            f"`train_dataset` has {len(prepared)} usable rows, fewer than one batch of {batch_rows} rows "
            "(`per_device_train_batch_size` x processes). Lower the batch size or give more rows."
        )


def check_given_weights(weights: torch.Tensor, kept: torch.Tensor) -> None:
    """Refuse given weights `[rows]` that are 0 for all rows that preparation has kept (bool `[rows]`)."""
    if bool(kept.any()) and float(weights[kept].sum()) <= 0:
        raise ValueError(
            f"`data_weight` of `train_dataset` is 0 for all {int(kept.sum())} rows that preparation has kept: those "
            "with weight have no token to learn from within `max_length`. Raise it, or give other weights."
        )
