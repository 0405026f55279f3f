"""Configuration of [`BilevelSFTTrainer`]."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from trl import SFTConfig

from ..weights import settings
from ..weights.settings import WeightSettings, in_range, one_of, takes_old_names

WEIGHTINGS = ("resample", "loss")
# Rows of a stream that choosing needs at least.
LEAST_STREAM_ROWS = 32
# Old names: what to use instead. Whoever gives one is told.
RENAMED = settings.RENAMED | {
    "selector_update": "`selector_preset='paper'`, 'seal' or 'sparse_centred' for weights that move in training",
    "selector_granularity": "`selector_group_column` alone",
    "selector_learning_rate": "`selector_preset`: each published method has its own",
    "selector_entropy_coef": "`selector_preset`: each published method has its own",
    "selector_betas": "`selector_preset`: each published method has its own",
    "selector_warmup_steps": "`selector_preset`: each published method has its own",
    "selector_freeze_step": "nothing: weights chosen before training stay as they are",
    "selector_activation": "nothing: weights are a softmax",
    "selector_key_column": "nothing: a stream's weights are predicted from what a row says",
    "selector_table_size": "nothing: a stream's weights are predicted from what a row says",
    "estimator_refresh_steps": "nothing: scores are taken once, before training",
    "lookahead_steps": "nothing: the estimator 'lookahead' is gone",
    "alignment_direction": "nothing: the estimator 'alignment' is gone",
    "alignment_averaging": "nothing: the estimator 'alignment' is gone",
    "alignment_normalise": "nothing: the estimator 'alignment' is gone",
    "validation_every": "nothing: the trusted rows are in every step",
    "validation_batch_size": "nothing: a quarter of the training rows of a step",
    "validation_loss_weight_decay": "nothing: `validation_loss_weight` is constant",
    "ess_alarm": "nothing: the warning comes below 2%",
}


@takes_old_names(RENAMED)
@dataclass
class BilevelSFTConfig(WeightSettings, SFTConfig):
    r"""
    Configuration class for the [`BilevelSFTTrainer`].

    Inherits every parameter of [`~trl.SFTConfig`] and of [`WeightSettings`] (`weight_estimator`, `selector_preset`,
    `validation_weights`, `pilot_steps`, `pilot_learning_rate`, `calibration_sharpness`,
    `selector_group_column`, `filter_rate`), and adds how weights act in training.

    Parameters:
        selector_weighting (`str`, *optional*):
            How weights reach the model. `"resample"` (the default): rows are visited in proportion to their weights,
            so no step is spent on rows of no weight. `"loss"` (the default, and only choice, with `packing`, with a
            stream and with weights that move): rows are visited evenly, and their losses are multiplied by the
            weights. Both have the same objective, `sum w l / sum w t`. Losses need TRL 1.16 or newer.
        validation_loss_weight (`float`, *optional*, defaults to `0.0`):
            lambda, the weight of the trusted rows' loss in the model's objective, in [0, 1). With 0 the trusted rows
            choose, and the model is never trained on them. 0.5 by default with the published presets. Above 0 it needs
            TRL 1.16 or newer.
        stream_sample_rows (`int`, *optional*, defaults to `2048`):
            Rows that are read at the start of a stream. They must be a fair sample (`stream.shuffle(buffer_size=...)`,
            or `shuffle_dataset=True`): weights are chosen on them, and predicted for all others.
        ignore_selector_fingerprint (`bool`, *optional*, defaults to `False`):
            Resume with weights although training data or settings have changed.
    """

    # None is gone after `__post_init__`.
    selector_weighting: str = field(
        default=None,  # type: ignore[assignment]
        metadata={"help": "'resample' (visits in proportion to weights) or 'loss' (weighted losses)."},
    )
    validation_loss_weight: float = field(
        default=None,  # type: ignore[assignment]
        metadata={"help": "lambda, weight of the trusted rows' loss in the objective, in [0, 1). Default: 0."},
    )
    stream_sample_rows: int = field(
        default=2048, metadata={"help": "Streams: rows read at the start, a fair sample that weights are chosen on."}
    )
    ignore_selector_fingerprint: bool = field(
        default=False, metadata={"help": "Resume with weights although training data or settings have changed."}
    )

    _VALID_DICT_FIELDS = [*SFTConfig._VALID_DICT_FIELDS, "validation_weights"]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.resolve()
        if self.validation_loss_weight is None:
            self.validation_loss_weight = 0.5 if self.published else 0.0
        in_range("validation_loss_weight", self.validation_loss_weight, 0.0, 1.0)
        if self.stream_sample_rows < LEAST_STREAM_ROWS:
            raise ValueError(
                f"`stream_sample_rows` must be at least {LEAST_STREAM_ROWS}, got {self.stream_sample_rows}: the "
                "weights of all other rows follow from them."
            )
        if self.published and self.validation_loss_weight == 0:
            raise ValueError(
                f"`validation_loss_weight=0` with `selector_preset={self.selector_preset!r}` leaves the trusted rows "
                "without influence: the model that scores is pulled by them. Set it above 0."
            )
        if self.selector_weighting is None:
            resample = self.weight_estimator != "none" and not self.published and not self.packing
            self.selector_weighting = "resample" if resample else "loss"
        one_of("selector_weighting", self.selector_weighting, WEIGHTINGS)
        if self.selector_weighting == "resample" and self.published:
            raise ValueError(
                f"`selector_weighting='resample'` with `selector_preset={self.selector_preset!r}`: rows are drawn at "
                "the start of an epoch, before the weights have moved. Use `selector_weighting='loss'`."
            )
        if self.selector_weighting == "resample" and self.packing:
            raise ValueError(
                "`selector_weighting='resample'` with `packing=True` is not supported: rows are packed before weights "
                "say how often each is drawn. Use `selector_weighting='loss'`, or `padding_free=True` with "
                "`max_length=None` instead of packing."
            )
        if self.published and (self.selector_group_column or self.filter_rate):
            raise ValueError(
                "`selector_group_column` and `filter_rate` do not go with "
                f"`selector_preset={self.selector_preset!r}`, whose weights move row by row. Leave them out, or use "
                "another preset."
            )


def resolved(args: SFTConfig | None, model: Any) -> BilevelSFTConfig:
    """A `BilevelSFTConfig` from what the user gave, as TRL's trainers do it."""
    if isinstance(args, BilevelSFTConfig):
        return args
    if args is None:
        name = model if isinstance(model, str) else model.config._name_or_path
        return BilevelSFTConfig(f"{name.split('/')[-1]}-Bilevel-SFT")
    # Field by field: `to_dict` hides every token, `eos_token` and `pad_token` among them.
    return BilevelSFTConfig(**{field.name: getattr(args, field.name) for field in fields(args) if field.init})
