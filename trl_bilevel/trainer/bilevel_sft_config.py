"""Configuration of [`BilevelSFTTrainer`]."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass, field, fields
from typing import Any

from trl import SFTConfig

from ..estimators import ESTIMATORS

logger = logging.getLogger(__name__)

GRANULARITIES = ("sample", "group")
ACTIVATIONS = ("softmax", "sigmoid")
WEIGHTINGS = ("resample", "loss")
# Scored rows that a prediction of weights needs at least; 128 and more are sensible (docs/results.md).
MIN_SCORED_ROWS = 16
UPDATES = ("calibrated", "sparse_centred", "adam")
DIRECTIONS = ("preconditioned", "gradient", "displacement")

# What each preset sets; an argument that contradicts one is overridden, and the config says so, unless the argument is
# the default: a dataclass cannot tell that from nothing given.
PRESETS: dict[str, dict[str, Any]] = {
    "reliable": {"pilot_scored_rows": 0, "validation_every": 1},
    "balanced": {"pilot_scored_rows": 512, "validation_every": 4},
    "fast": {"weight_estimator": "lookahead", "pilot_scored_rows": 256, "pilot_feature_depth": 0.1},
    "paper": {
        "weight_estimator": "loss",
        "selector_update": "adam",
        "selector_learning_rate": 1e-4,
        "selector_betas": [0.9, 0.95],
        "selector_entropy_coef": 0.0,
        "selector_warmup_steps": 0,
        "validation_every": 1,
    },
    "seal": {
        "weight_estimator": "loss",
        "selector_update": "adam",
        "selector_learning_rate": 5e-3,
        "selector_betas": [0.9, 0.95],
        "selector_entropy_coef": 0.0,
        "selector_warmup_steps": 0,
        "validation_every": 1,
    },
}


@dataclass
class BilevelSFTConfig(SFTConfig):
    r"""
    Configuration class for the [`BilevelSFTTrainer`].

    Inherits every parameter of [`~trl.SFTConfig`] and adds those of the upper level: the validation term, the weight
    estimator and the selector.

    Parameters:
        weight_estimator (`str`, *optional*, defaults to `"value_function"`):
            Where scores come from: `"value_function"` (the difference to a tracker trained without validation rows),
            `"lookahead"` (what a few validation steps do to a row's loss; half of the former's pilot),
            `"alignment"` (gradient inner products; less reliable, see docs/results.md), `"loss"` (published, for
            reproduction) or `"none"` (uniform weights).
        validation_loss_weight (`float`, *optional*):
            lambda, the weight of the validation loss in the model's objective, in [0, 1). With 0, the default, the
            validation rows drive the weights and are never trained on by the model (with `weight_estimator="none"`
            they only serve `validation_loss()`). Defaults to 0.5 where scores come
            from a model that is pulled by them as it trains: `"loss"`, and `"value_function"` with online updates.
        validation_loss_weight_decay (`float`, *optional*, defaults to `0.0`):
            Taken off lambda at the start of every further epoch (the paper's setting: 0.1). Never below 0.05.
        validation_batch_size (`int`, *optional*):
            Validation rows of an optimizer step that has the validation term, over all processes; and of the batches
            that estimators draw. Defaults to a quarter of the training rows of a step for the former, to as many as
            training rows for the latter.
        validation_weights (`dict[str, float]`, *optional*):
            Weight of each validation set when several are given; normalised to sum one. Defaults to equal weights.
        validation_every (`int`, *optional*, defaults to `4`):
            k: add the validation term on every k-th step only, k times as strong, so that the mean objective is the
            same. 1 for every step.
        estimator_refresh_steps (`int`, *optional*):
            M. `lookahead`, `alignment`: steps between refreshes (default 32 and 16). `value_function`: train the
            tracker and take scores on every M-th step only (default 1).
        lookahead_steps (`int`, *optional*):
            K, validation steps of a look-ahead (`lookahead`; `alignment` with `alignment_direction="displacement"`).
            Defaults to half of `pilot_steps`, at least 4, at the end of a pilot run, and to 4 for online updates.
        alignment_direction (`str`, *optional*, defaults to `"preconditioned"`):
            `alignment`: what the rows' gradients are compared with: the gradient of the validation loss as Adam would
            step along it (`"preconditioned"`), as it is (`"gradient"`), or the way that `lookahead_steps` validation
            steps take (`"displacement"`).
        alignment_averaging (`float`, *optional*, defaults to `0.5`):
            `alignment`: decay of the direction's running mean over refreshes, in [0, 1); 0 keeps the last one only.
        alignment_normalise (`bool`, *optional*, defaults to `False`):
            `alignment`: divide each score by the norm of the row's own gradient.
        selector_update (`str`, *optional*, defaults to `"calibrated"`):
            How scores become weights. `"calibrated"`: before training, a short pilot run on throwaway parameters
            scores every row once; the weights make the training rows score like validation rows that the pilot held
            back. `"sparse_centred"`: the standardised scores of every batch move the logits of its rows. `"adam"`:
            dense Adam on the gradient of the weighted loss (published, for reproduction).
        selector_weighting (`str`, *optional*):
            How weights reach the model. `"resample"` (default for `"calibrated"`): rows are visited in proportion to
            their weights, so no step is spent on rows of no weight. `"loss"` (default, and only choice, for the
            updates that move weights in every step, and with `packing`; default for fixed weights): rows are visited
            evenly, and their losses are multiplied by the weights. Both have the same expected gradient.
        selector_learning_rate (`float`, *optional*, defaults to `0.5`):
            Step size of the logits for `"sparse_centred"` and `"adam"`.
        selector_entropy_coef (`float`, *optional*, defaults to `0.02`):
            Strength of the pull towards uniform weights for `"sparse_centred"` and `"adam"`.
        selector_betas (`list[float]`, *optional*, defaults to `[0.9, 0.999]`):
            Two moment decays in [0, 1) for `"adam"`.
        selector_granularity (`str`, *optional*, defaults to `"sample"`):
            `"sample"`: a weight per row; `"group"`: one per value of `selector_group_column`.
        selector_group_column (`str`, *optional*):
            Column of the training set that names each row's group (its source, say).
        selector_key_column (`str`, *optional*):
            Streams: column whose value tells a row from others, and stays the same between runs (an id, a URL).
            Defaults to all that a row says.
        selector_table_size (`int`, *optional*, defaults to `1048576`):
            Streams: places of the table that keys are hashed to, 8 bytes each. Keys on one place share a weight: take
            ten times as many as there are rows (or groups) or more, where every one counts.
        stream_sample_rows (`int`, *optional*, defaults to `2048`):
            Streams: rows read at the start, which must be a fair sample (`stream.shuffle(buffer_size=...)`, or
            `shuffle_dataset=True`): the pilot runs on them, and they show how weights are spread.
        selector_activation (`str`, *optional*, defaults to `"softmax"`):
            `"softmax"` or `"sigmoid"` (bounds the ratio between two weights from above more softly).
        selector_preset (`str`, *optional*):
            Settings under one name. `"reliable"`: all rows are scored, and the validation term, if there is one, is in
            every step; `"balanced"`: the defaults; `"fast"`: the look-ahead scores half as many rows, and the others'
            weights are predicted from shallower features. `"paper"`, `"seal"`: estimator, update, step size and betas
            of the published code.
        selector_warmup_steps (`float`, *optional*, defaults to `0.17`):
            `"sparse_centred"`, `"adam"`: optimizer steps with uniform weights before scores count, or a fraction of
            all steps if below 1. Both ends of a loss difference have to learn the mixture first.
        selector_freeze_step (`int`, *optional*):
            Optimizer step from which the weights stay as they are.
        filter_rate (`float`, *optional*, defaults to `0.0`):
            Hard gate: after the warm-up, the share of rows with the lowest weights that gets weight 0, in [0, 1).
        pilot_steps (`int`, *optional*):
            `"calibrated"`: steps of the pilot run, on throwaway parameters, before all rows are scored. Defaults to a
            quarter of the run's steps, at least 8 and at most 24.
        pilot_learning_rate (`float`, *optional*):
            Learning rate of the pilot run's AdamW, constant. Defaults to 1e-3 for adapters, to `learning_rate` (but at
            least 5e-5) for full fine-tuning.
        pilot_batch_size (`int`, *optional*):
            Training rows per pilot step, over all processes. Defaults to the training rows of an optimizer step, at
            most 8 (or one per process).
        pilot_scored_rows (`int`, *optional*, defaults to `512`):
            `"calibrated"`: training rows that the pilot run scores, drawn at random; weights of the others are
            predicted from hidden states of the lower layers, by part of one forward in place of two whole ones (see
            docs/method.md). 0 for all rows.
        pilot_feature_depth (`float`, *optional*, defaults to `0.3`):
            Share of the layers that are computed to predict a weight, in (0, 1].
        pilot_smoothing (`bool`, *optional*, defaults to `True`):
            Weigh a scored row by what the other scored rows lead to expect, too, from hidden states after two thirds
            of the layers: odds of being good are multiplied. No effect where a row's own score leaves no doubt, where
            hidden states say nothing of the weights, on fewer than 16 rows, or on streams.
        calibration_sharpness (`float`, *optional*, defaults to `1.0`):
            `"calibrated"`: power to which the calibrated weights are raised. 1 reproduces the density of the
            validation rows' scores; above 1 trades variety of rows for purity.
        ess_alarm (`float`, *optional*, defaults to `0.02`):
            Warn when the effective sample size falls below this share of the rows.
        tracked_rows (`int`, *optional*, defaults to `10`):
            Rows of highest and of lowest weight whose text the trackers of `report_to` are shown; 0 for none.
        ignore_selector_fingerprint (`bool`, *optional*, defaults to `False`):
            Load a selector state although training data or selector settings have changed.
    """

    weight_estimator: str = field(
        default="value_function",
        metadata={"help": "Where scores come from: 'value_function', 'lookahead', 'alignment', 'loss' or 'none'."},
    )
    # None is gone after `__post_init__`.
    validation_loss_weight: float = field(
        default=None,  # type: ignore[assignment]
        metadata={"help": "lambda, weight of the validation loss in the objective, in [0, 1). Default: 0, if it can."},
    )
    validation_loss_weight_decay: float = field(
        default=0.0, metadata={"help": "Taken off lambda at the start of every further epoch; never below 0.05."}
    )
    validation_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Validation rows of a step that has them, over all processes. Default: a quarter of the training "
            "rows."
        },
    )
    validation_weights: dict[str, float] | str | None = field(
        default=None, metadata={"help": "Weight of each validation set when several are given. Default: equal."}
    )
    validation_every: int = field(
        default=4, metadata={"help": "Add the validation term on every k-th step only, k times as strong."}
    )
    estimator_refresh_steps: int | None = field(
        default=None,
        metadata={
            "help": "lookahead, alignment: steps between refreshes (32, 16). value_function: score on every M-th step "
            "(1)."
        },
    )
    lookahead_steps: int | None = field(
        default=None,
        metadata={"help": "Validation steps of a look-ahead. Default: half of the pilot's steps, 4 without a pilot."},
    )
    alignment_direction: str = field(
        default="preconditioned",
        metadata={"help": "alignment: 'preconditioned' or plain 'gradient' of validation, or its 'displacement'."},
    )
    alignment_averaging: float = field(
        default=0.5, metadata={"help": "alignment: decay of the direction's running mean over refreshes, in [0, 1)."}
    )
    alignment_normalise: bool = field(
        default=False, metadata={"help": "alignment: divide scores by the norm of the row's own gradient."}
    )
    selector_update: str = field(
        default="calibrated",
        metadata={"help": "How scores become weights: 'calibrated', 'sparse_centred' or 'adam'."},
    )
    selector_weighting: str | None = field(
        default=None,
        metadata={
            "help": "'resample' (visits in proportion to weights) or 'loss' (weighted losses). Default: by update."
        },
    )
    selector_learning_rate: float = field(
        default=0.5, metadata={"help": "Step size of the logits for 'sparse_centred' and 'adam'."}
    )
    selector_entropy_coef: float = field(
        default=0.02, metadata={"help": "Pull towards uniform weights for 'sparse_centred' and 'adam'."}
    )
    selector_betas: list[float] = field(
        default_factory=lambda: [0.9, 0.999], metadata={"help": "Two moment decays for 'adam'."}
    )
    selector_granularity: str = field(
        default="sample", metadata={"help": "'sample': a weight per row; 'group': per value of the group column."}
    )
    selector_group_column: str | None = field(
        default=None, metadata={"help": "Column of the training set that names each row's group."}
    )
    selector_key_column: str | None = field(
        default=None, metadata={"help": "Streams: column that tells rows apart. Default: all that a row says."}
    )
    selector_table_size: int = field(
        default=1 << 20, metadata={"help": "Streams: places of the table that rows or groups are hashed to."}
    )
    stream_sample_rows: int = field(
        default=2048, metadata={"help": "Streams: rows read at the start, a fair sample that the pilot runs on."}
    )
    selector_activation: str = field(default="softmax", metadata={"help": "'softmax' or 'sigmoid'."})
    selector_preset: str | None = field(
        default=None,
        metadata={"help": "'reliable', 'balanced' (the defaults), 'fast'; 'paper', 'seal': those of published code."},
    )
    selector_warmup_steps: float = field(
        default=0.17,
        metadata={"help": "Steps with uniform weights before scores count, or a fraction of all steps if below 1."},
    )
    selector_freeze_step: int | None = field(
        default=None, metadata={"help": "Step from which the weights stay as they are."}
    )
    filter_rate: float = field(
        default=0.0, metadata={"help": "Share of rows with the lowest weights that gets weight 0, in [0, 1)."}
    )
    pilot_steps: int | None = field(
        default=None,
        metadata={"help": "Steps of the pilot run, on throwaway parameters. Default: a quarter of the run, 8 to 24."},
    )
    pilot_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of the pilot run. Default: 1e-3 for adapters, else learning_rate or 5e-5."},
    )
    pilot_batch_size: int | None = field(
        default=None,
        metadata={"help": "Training rows per pilot step. Default: those of an optimizer step, at most 8."},
    )
    pilot_scored_rows: int = field(
        default=512,
        metadata={"help": "Rows that the pilot run scores; weights of the others are predicted. 0 for all rows."},
    )
    pilot_feature_depth: float = field(
        default=0.3, metadata={"help": "Share of the layers that are computed to predict a weight, in (0, 1]."}
    )
    pilot_smoothing: bool = field(
        default=True,
        metadata={"help": "Weigh a scored row by what rows like it score, too, as far as that explains weights."},
    )
    calibration_sharpness: float = field(
        default=1.0, metadata={"help": "Power of the calibrated weights: above 1 trades variety of rows for purity."}
    )
    ess_alarm: float = field(
        default=0.02, metadata={"help": "Warn when the effective sample size falls below this share of the rows."}
    )
    tracked_rows: int = field(
        default=10,
        metadata={"help": "Rows of highest and of lowest weight whose text trackers are shown; 0 for none."},
    )
    ignore_selector_fingerprint: bool = field(
        default=False, metadata={"help": "Load a selector state although data or selector settings have changed."}
    )

    _VALID_DICT_FIELDS = [*SFTConfig._VALID_DICT_FIELDS, "validation_weights"]

    def __post_init__(self) -> None:
        super().__post_init__()
        # A tuple or a list, by Python or by a config file.
        self.selector_betas = [float(beta) for beta in self.selector_betas]
        if self.selector_preset is not None:
            _one_of("selector_preset", self.selector_preset, PRESETS)
            defaults = {field.name: field.default for field in fields(self)} | {"selector_betas": [0.9, 0.999]}
            for name, value in PRESETS[self.selector_preset].items():
                if getattr(self, name) not in (value, defaults[name]):
                    logger.warning(
                        f"`selector_preset={self.selector_preset!r}` sets `{name}={value!r}`, in place of "
                        f"{getattr(self, name)!r}. Leave one of them out."
                    )
                setattr(self, name, copy.copy(value))
        _one_of("weight_estimator", self.weight_estimator, [*ESTIMATORS, "none"])
        _one_of("selector_granularity", self.selector_granularity, GRANULARITIES)
        _one_of("selector_activation", self.selector_activation, ACTIVATIONS)
        _one_of("selector_update", self.selector_update, UPDATES)
        _one_of("alignment_direction", self.alignment_direction, DIRECTIONS)
        if self.validation_loss_weight is None:
            online = self.weight_estimator == "value_function" and self.selector_update != "calibrated"
            self.validation_loss_weight = 0.5 if online or self.weight_estimator == "loss" else 0.0
        if self.validation_loss_weight_decay and self.validation_loss_weight == 0:
            raise ValueError(
                f"`validation_loss_weight_decay={self.validation_loss_weight_decay}` has nothing to take away: "
                "`validation_loss_weight` is 0. Set it, e.g. to 0.5."
            )
        if self.selector_weighting is None:
            resample = self.selector_update == "calibrated" and self.weight_estimator != "none" and not self.packing
            self.selector_weighting = "resample" if resample else "loss"
        _one_of("selector_weighting", self.selector_weighting, WEIGHTINGS)
        if self.selector_weighting == "resample" and self.selector_update != "calibrated":
            raise ValueError(
                f"`selector_weighting='resample'` needs `selector_update='calibrated'`, got {self.selector_update!r}: "
                "rows are drawn at the start of an epoch, before online updates know their weights. Use "
                "`selector_weighting='loss'`."
            )
        if self.selector_weighting == "resample" and self.packing:
            raise ValueError(
                "`selector_weighting='resample'` with `packing=True` is not supported: rows are packed before weights "
                "say how often each is drawn. Use `selector_weighting='loss'`, or `padding_free=True` with "
                "`max_length=None` in place of packing."
            )
        if len(self.selector_betas) != 2 or not all(0 <= beta < 1 for beta in self.selector_betas):
            raise ValueError(f"`selector_betas` must be two numbers in [0, 1), got {self.selector_betas!r}.")
        _in_range("validation_loss_weight", self.validation_loss_weight, 0.0, 1.0)
        _in_range("filter_rate", self.filter_rate, 0.0, 1.0)
        _in_range("ess_alarm", self.ess_alarm, 0.0, 1.0)
        _in_range("alignment_averaging", self.alignment_averaging, 0.0, 1.0)
        _in_range("selector_entropy_coef", self.selector_entropy_coef, 0.0, 1.0)
        for name in (
            "validation_batch_size",
            "validation_every",
            "estimator_refresh_steps",
            "lookahead_steps",
            "pilot_steps",
            "pilot_batch_size",
            "selector_table_size",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if not 0 < self.pilot_feature_depth <= 1:
            raise ValueError(f"`pilot_feature_depth` must lie in (0, 1], got {self.pilot_feature_depth}.")
        if self.pilot_scored_rows != 0 and self.pilot_scored_rows < MIN_SCORED_ROWS:
            raise ValueError(
                f"`pilot_scored_rows` must be at least {MIN_SCORED_ROWS}, got {self.pilot_scored_rows}: fewer rows do "
                "not show how weights depend on what a row says. Use 0 to score all rows."
            )
        if self.stream_sample_rows < 2 * MIN_SCORED_ROWS:
            raise ValueError(
                f"`stream_sample_rows` must be at least {2 * MIN_SCORED_ROWS}, got {self.stream_sample_rows}: half of "
                "them are scored, to predict the weights of all others."
            )
        if self.tracked_rows < 0:
            raise ValueError(f"`tracked_rows` must be at least 0, got {self.tracked_rows}.")
        for name in (
            "selector_learning_rate",
            "selector_warmup_steps",
            "validation_loss_weight_decay",
            "pilot_learning_rate",
            "calibration_sharpness",
        ):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise ValueError(f"`{name}` must be a finite number of at least 0, got {value}.")
        if self.selector_granularity == "group" and self.selector_group_column is None:
            raise ValueError(
                "`selector_granularity='group'` needs `selector_group_column`, the column that names each row's group."
            )
        if self.validation_loss_weight == 0 and self.weight_estimator == "loss":
            raise ValueError(
                "`validation_loss_weight=0` with `weight_estimator='loss'` leaves the validation set without any "
                "influence: the score of a row is its own loss. Set `validation_loss_weight` above 0, or use "
                "`weight_estimator='value_function'` or `'lookahead'`."
            )


def _one_of(name: str, value: Any, known: Any) -> None:
    if value not in known:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, known))}, got {value!r}.")


def _in_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value < high:
        raise ValueError(f"`{name}` must lie in [{low:g}, {high:g}), got {value!r}.")
