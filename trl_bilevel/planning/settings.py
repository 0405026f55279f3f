"""The numbers of a run from its configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .shapes import RunShape

if TYPE_CHECKING:
    from ..trainer.bilevel_sft_config import BilevelSFTConfig

REFRESH = {"lookahead": 32, "alignment": 16}


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
    training_rows: int | None = None,
    validation_rows: int = 32,
    **model_settings: Any,
) -> RunShape:
    """The numbers of a run.

    Args:
        args ([`BilevelSFTConfig`]): its configuration.
        device (`str`): `"cuda"` or `"cpu"`.
        tokens (`int`, *optional*): of the longest row; `args.max_length` by default.
        processes (`int`): devices that share the work (DDP).
        training_rows (`int`, *optional*), validation_rows (`int`): sizes of the data sets.
        model_settings: further fields of [`RunShape`]: `quantisation`, `attention`, `dropout`, `mean_tokens`, ...

    Raises:
        ValueError: if the length of rows is not known.
    """
    if args.max_length is not None and (tokens is None or not args.padding_free):
        tokens = args.max_length if tokens is None else min(tokens, args.max_length)
    if tokens is None:
        raise ValueError("`max_length` is None, so rows may have any length: give that of the longest by `tokens`.")
    rows, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    per_step = rows * accumulation * processes
    joined = 0
    if args.validation_loss_weight > 0:
        wanted = args.validation_batch_size or max(1, per_step // 4)
        joined = -(-wanted // (accumulation * processes))
    # As `trainer.pilot.default_pilot_batch_size`.
    pilot_batch = args.pilot_batch_size or min(per_step, max(8, processes))
    online = args.selector_update != "calibrated"
    known: dict[str, Any] = {
        "rows": rows,
        "tokens": tokens,
        "accumulation": accumulation,
        "processes": processes,
        "autocast": bool(args.bf16 or args.fp16),
        "checkpointing": bool(args.gradient_checkpointing),
        "padded": not (args.padding_free or args.packing),
        "optimizer": str(getattr(args.optim, "value", args.optim)),
        "device": device,
        "training_rows": training_rows,
        "epochs": args.num_train_epochs,
        "max_steps": args.max_steps,
        "validation_rows": validation_rows,
        "joined_rows": joined,
        "joined_every": args.validation_every,
        "evaluation_rows": args.per_device_eval_batch_size,
        "evaluates": str(getattr(args.eval_strategy, "value", args.eval_strategy)) != "no",
        "estimator": args.weight_estimator,
        "online": online,
        "pilot_steps": args.pilot_steps,
        "pilot_batch": pilot_batch,
        "pulling_batch": args.validation_batch_size or (per_step if online else pilot_batch),
        "scored_rows": args.pilot_scored_rows,
        "feature_depth": args.pilot_feature_depth,
        "smooths": args.pilot_smoothing,
        "lookahead_steps": args.lookahead_steps,
        "estimator_every": args.estimator_refresh_steps or REFRESH.get(args.weight_estimator, 1),
    }
    return RunShape(**(known | model_settings))
