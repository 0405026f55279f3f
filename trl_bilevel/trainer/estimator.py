"""Making the estimator that a config names."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from ..estimators import (
    ESTIMATORS,
    AlignmentEstimator,
    Estimator,
    EstimatorHost,
    LookaheadEstimator,
    ValueFunctionEstimator,
)
from ..estimators.taps import GradientTaps, untappable_layers
from .bilevel_sft_config import BilevelSFTConfig

if TYPE_CHECKING:
    from .bilevel_sft_trainer import BilevelSFTTrainer

logger = logging.getLogger(__name__)

# Of LoRA: matrices that are multiplied without a call of their layers, compressed or sampled on the way, or that see
# some tokens only.
UNREADABLE_SETTINGS = (
    "target_parameters",
    "velora_config",
    "monteclora_config",
    "arrow_config",
    "use_bdlora",
    "alora_invocation_tokens",
)
# Validation steps of a look-ahead that is taken again and again during training.
ONLINE_LOOKAHEAD = 4


def make_estimator(args: BilevelSFTConfig, host: EstimatorHost, lookahead_steps: int = ONLINE_LOOKAHEAD) -> Estimator:
    """The estimator that the config names, on a host.

    Args:
        lookahead_steps (`int`): where the config leaves them open.
    """
    steps = args.lookahead_steps or lookahead_steps
    if args.weight_estimator == "value_function":
        return ValueFunctionEstimator(
            host,
            every=args.estimator_refresh_steps or 1,
            max_grad_norm=args.max_grad_norm,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            weight_decay=args.weight_decay,
        )
    if args.weight_estimator == "lookahead":
        return LookaheadEstimator(
            host,
            lookahead_steps=steps,
            refresh_steps=args.estimator_refresh_steps or 32,
            max_grad_norm=args.max_grad_norm,
        )
    if args.weight_estimator == "alignment":
        return AlignmentEstimator(
            host,
            refresh_steps=args.estimator_refresh_steps or 16,
            averaging=args.alignment_averaging,
            precondition=args.alignment_direction == "preconditioned",
            displacement=args.alignment_direction == "displacement",
            normalise=args.alignment_normalise,
            lookahead_steps=steps,
            max_grad_norm=args.max_grad_norm,
        )
    return ESTIMATORS[args.weight_estimator](host)


def unreadable_adapter(model: Any) -> str | None:
    """What the adapter is, if its linear layers see other inputs than the rows', or none at all."""
    if any("lora_magnitude_vector" in name for name, _ in model.named_parameters()):
        return "DoRA (`use_dora=True`)"
    for config in getattr(model, "peft_config", {}).values():
        for setting in UNREADABLE_SETTINGS:
            if getattr(config, setting, None):
                return f"LoRA with `{setting}`"
    return None


def check_alignment(trainer: BilevelSFTTrainer) -> None:
    """Refuse models whose rows' gradients cannot be read off the backward."""
    if trainer.aux_loss_enabled:
        raise ValueError(
            "`weight_estimator='alignment'` does not support the auxiliary loss of mixture-of-experts models: it "
            "mixes the gradients of all rows. Use 'value_function' or 'lookahead'."
        )
    if trainer.args.torch_compile:
        raise ValueError(
            "`weight_estimator='alignment'` does not support `torch_compile=True`: it reads the backward of single "
            "layers. Unset it, or use 'value_function' or 'lookahead'."
        )
    kind = unreadable_adapter(trainer.model)
    if kind is not None:
        raise ValueError(
            f"`weight_estimator='alignment'` does not support {kind}: the gradients of its matrices cannot be read "
            "off their layers. Use plain LoRA, or 'value_function' or 'lookahead'."
        )
    taps = GradientTaps(trainer.model, untappable_layers(trainer.model))
    if taps.left_out:
        logger.info(
            f"`weight_estimator='alignment'` leaves {len(taps.left_out)} trainable parameters out of its scores "
            f"(norm weights, LM head, tied embeddings): {', '.join(taps.left_out[:8])} ..."
        )
