"""The numbers of a run from its configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .shapes import RunShape

if TYPE_CHECKING:
    from ..trainer.bilevel_sft_config import BilevelSFTConfig


def quantisation_of(model_args: Any) -> str | None:
    """Name of the quantisation that TRL's `ModelConfig` asks for."""
    if model_args.load_in_4bit:
        return "4bit_nested" if model_args.use_bnb_nested_quant else "4bit"
    return "8bit" if model_args.load_in_8bit else None


def run_shape(
    args: BilevelSFTConfig,
    *,
    device: str = "cuda",
    tokens: int | None = None,
    processes: int = 1,
    **further: Any,
) -> RunShape:
    """The numbers of a run.

    Args:
        args ([`BilevelSFTConfig`]): its configuration.
        device (`str`): `"cuda"` or `"cpu"`.
        tokens (`int`, *optional*): of the longest row; `args.max_length` by default.
        processes (`int`): devices that share the work (DDP).
        further: other fields of [`RunShape`]: `training_rows`, `validation_rows`, `quantisation`, `attention` ...

    Raises:
        ValueError: if the length of rows is not known.
    """
    if args.max_length is not None and (tokens is None or not args.padding_free):
        tokens = args.max_length if tokens is None else min(tokens, args.max_length)
    if tokens is None:
        raise ValueError("`max_length` is None, so rows may have any length: give that of the longest by `tokens`.")
    known: dict[str, Any] = {
        "rows": args.per_device_train_batch_size,
        "tokens": tokens,
        "accumulation": args.gradient_accumulation_steps,
        "processes": processes,
        "autocast": bool(args.bf16 or args.fp16),
        "checkpointing": bool(args.gradient_checkpointing),
        "padded": not (args.padding_free or args.packing),
        "optimizer": str(getattr(args.optim, "value", args.optim)),
        "device": device,
        "epochs": args.num_train_epochs,
        "max_steps": args.max_steps,
        "joins": args.validation_loss_weight > 0,
        "evaluation_rows": args.per_device_eval_batch_size,
        "evaluates": str(getattr(args.eval_strategy, "value", args.eval_strategy)) != "no",
        "estimator": args.selector_preset if args.published else args.weight_estimator,
        "pilot_steps": args.pilot_steps,
        "scored_rows": args.pilot_scored_rows,
        "read_depth": args.feature_depth,
    }
    return RunShape(**(known | further))
