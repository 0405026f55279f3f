"""The settings of choosing, declared once: `learn_weights`, `trl-bilevel rank` and both trainers take them."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

# Those that ask a probe, those that train a pilot, and all that choose before training.
PROBES, PILOTS = ("probe", "both"), ("value_function", "both")
ESTIMATORS = ("probe", "value_function", "both")
# Share of the layers after which the probe reads rows. Two thirds of them say as much, a third or nearly all less
# (docs/method.md).
PROBE_DEPTH = 1 / 2
# The pilot's rows of a step, of either kind: all results were measured with as many.
PILOT_ROWS = 8
# Steps of the pilot that is given none: one pass over the rows, within these limits. Fewer have not learned the bad
# rows, more learn the good ones by heart (docs/results.md).
LEAST_PILOT_STEPS, MOST_PILOT_STEPS = 8, 24
# Learning rate of the pilot's AdamW. Its adapters are always the same, so this need not follow the trainer's.
PILOT_LEARNING_RATE = 1e-3
# Settings of earlier versions: what to use instead. Those of both trainers.
RENAMED = {
    "pilot_batch_size": "nothing: 8 rows, as measured",
    "pilot_feature_depth": "nothing: half of the layers, as measured",
    "pilot_scored_rows": "nothing: the default reads all rows without a pilot, and a pilot scores all rows",
    "pilot_smoothing": "nothing: 'both' of `weight_estimator` adds what hidden states say to a pilot",
    "tracked_rows": "nothing: trackers get figures of the weights, and no text of rows",
}


@dataclass(frozen=True)
class Preset:
    """What a preset says where the caller has said nothing.

    With `matches`, the probe also asks whether answers match their questions. With `published`, weights move with
    every training step (`weights/published.py`).
    """

    estimator: str = "probe"
    matches: bool = True
    published: bool = False


PRESETS = {
    "balanced": Preset(),
    "reliable": Preset("both"),
    "fast": Preset(matches=False),
    "paper": Preset("loss", published=True),
    "seal": Preset("loss", published=True),
    "sparse_centred": Preset("value_function", published=True),
}


def gone(name: str, instead: str) -> str:
    """What to do about a setting of earlier versions; "nothing: ..." says why there is none in its place."""
    advice = f"Leave it out: {instead[9:]}" if instead.startswith("nothing: ") else f"Use {instead}"
    return f"`{name}` is gone. {advice}."


def takes_old_names(renamed: Mapping[str, str]) -> Callable[[type], type]:
    """Decorates a config class, whose constructor then says what has come in place of an old setting."""

    def decorate(config: type) -> type:
        construct = config.__init__  # type: ignore[misc]

        def __init__(self: Any, *args: Any, **given: Any) -> None:
            old = next((name for name in given if name in renamed), None)
            if old is not None:
                raise TypeError(gone(old, renamed[old]))
            construct(self, *args, **given)

        __init__.__wrapped__ = construct  # type: ignore[attr-defined]
        config.__init__ = __init__  # type: ignore[misc]
        return config

    return decorate


@dataclass
class PilotSettings:
    r"""
    What choosing needs to know, wherever it is done.

    Parameters:
        weight_estimator (`str`, *optional*):
            Where scores come from: `"probe"` (the default; the model's hidden states tell whether a row looks like
            trusted rows, and whether its answer matches its question; nothing is trained), `"value_function"` (a
            pilot: two small adapters learn the training rows, one of them the trusted rows as well; the score is the
            difference of a row's losses), `"both"`, or `"none"` (equal weights).
        selector_preset (`str`, *optional*, defaults to `"balanced"`):
            `"balanced"` is the probe, `"fast"` the probe without its look at whether answers match their questions,
            `"reliable"` probe and pilot. What is given by its own name wins over a preset. `"paper"`, `"seal"`
            (published) and `"sparse_centred"`: weights that move with every training step, for `BilevelSFTTrainer`
            only.
        validation_weights (`dict[str, float]`, *optional*):
            Weight of each trusted set when several are given; normalised to sum one. Equal by default.
        pilot_steps (`int`, *optional*):
            Steps of the pilot, of 8 training rows each. By default one pass over the rows, at least 8 steps and at
            most 24.
        pilot_learning_rate (`float`, *optional*, defaults to `1e-3`):
            Learning rate of the pilot's adapters.
        calibration_sharpness (`float`, *optional*, defaults to `1.0`):
            Power to which the weights are raised. Above 1 trades variety of rows for purity.
    """

    # None is gone after `resolve`.
    weight_estimator: str = field(
        default=None,  # type: ignore[assignment]
        metadata={"help": "Where scores come from: 'probe' (default), 'value_function', 'both' or 'none'."},
    )
    selector_preset: str = field(
        default="balanced",
        metadata={"help": "'balanced', 'reliable', 'fast'; 'paper', 'seal', 'sparse_centred': weights that move."},
    )
    validation_weights: dict[str, float] | str | None = field(
        default=None, metadata={"help": "Weight of each trusted set when several are given. Default: equal."}
    )
    pilot_steps: int | None = field(
        default=None, metadata={"help": "Steps of the pilot, of 8 training rows each. Default: one pass, 8 to 24."}
    )
    pilot_learning_rate: float = field(
        default=PILOT_LEARNING_RATE, metadata={"help": "Learning rate of the pilot's adapters."}
    )
    calibration_sharpness: float = field(
        default=1.0, metadata={"help": "Power of the weights: above 1 trades variety of rows for purity."}
    )

    @property
    def published(self) -> bool:
        """True if weights move with every training step."""
        return self.weight_estimator != "none" and PRESETS[self.selector_preset].published

    @property
    def matches(self) -> bool:
        """True if the probe asks whether answers match their questions."""
        return PRESETS[self.selector_preset].matches

    def resolve(self) -> None:
        """Fill in what the preset says where nothing was given; check what was.

        Raises:
            ValueError: for a value that cannot work; the message names the argument, the value and the remedy.
        """
        if self.selector_preset is None:
            self.selector_preset = "balanced"
        one_of("selector_preset", self.selector_preset, PRESETS)
        preset = PRESETS[self.selector_preset]
        if self.weight_estimator is None:
            self.weight_estimator = preset.estimator
        if preset.published and self.weight_estimator not in ("none", preset.estimator):
            raise ValueError(
                f"`selector_preset={self.selector_preset!r}` scores rows by {preset.estimator!r}, but "
                f"`weight_estimator={self.weight_estimator!r}` is given too. Leave one of them out."
            )
        if self.weight_estimator == "loss" and not preset.published:
            raise ValueError(
                "`weight_estimator='loss'` is what the published selectors use: set `selector_preset='seal'` or "
                "'paper' to reproduce them. It prefers easy bad rows; use 'probe' to choose rows."
            )
        if self.weight_estimator in ("alignment", "lookahead"):
            raise ValueError(
                f"`weight_estimator={self.weight_estimator!r}` is gone: others rank better at a lower cost (docs/"
                "method.md). Use 'probe', which trains nothing, or 'value_function'."
            )
        if not preset.published:
            one_of("weight_estimator", self.weight_estimator, (*ESTIMATORS, "none"))
        if self.weight_estimator == "probe" and self.pilot_steps is not None:
            raise ValueError(
                f"`pilot_steps={self.pilot_steps}` has no meaning with `weight_estimator='probe'`, which trains no "
                "pilot. Leave it out, or use 'value_function' or 'both'."
            )
        if self.pilot_steps is not None:
            at_least("pilot_steps", self.pilot_steps, 1)
        for name in ("pilot_learning_rate", "calibration_sharpness"):
            finite_number(name, getattr(self, name))


@takes_old_names(RENAMED)
@dataclass
class WeightSettings(PilotSettings):
    r"""
    The settings of `learn_weights`: those of [`PilotSettings`], and what is done with weights that are known.

    Parameters:
        selector_group_column (`str`, *optional*):
            Column that names each row's group (its source, say): one weight per group, the mean of its rows'.
        filter_rate (`float`, *optional*, defaults to `0.0`):
            Share of the rows, those of the lowest weights, that gets weight 0, in [0, 1).
    """

    selector_group_column: str | None = field(
        default=None, metadata={"help": "Column that names each row's group: one weight per group. Default: per row."}
    )
    filter_rate: float = field(
        default=0.0, metadata={"help": "Share of rows with the lowest weights that gets weight 0, in [0, 1)."}
    )

    def resolve(self) -> None:
        """As the parent's, with the settings of this class."""
        super().resolve()
        in_range("filter_rate", self.filter_rate, 0.0, 1.0)


def default_pilot_steps(rows: int) -> int:
    """Pilot steps for so many training rows: one pass, at least 8 steps and at most 24."""
    return min(MOST_PILOT_STEPS, max(LEAST_PILOT_STEPS, rows // PILOT_ROWS))


def one_of(name: str, value: Any, known: Collection[str]) -> None:
    """Refuse a value that is none of the known ones."""
    if value not in known:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, known))}, got {value!r}.")


def in_range(name: str, value: float, low: float, high: float) -> None:
    """Refuse a number outside of `[low, high)`."""
    if not low <= value < high:
        raise ValueError(f"`{name}` must lie in [{low:g}, {high:g}), got {value!r}.")


def at_least(name: str, value: int, least: int) -> None:
    """Refuse a number below `least`."""
    if value < least:
        raise ValueError(f"`{name}` must be at least {least}, got {value}.")


def finite_number(name: str, value: float) -> None:
    """Refuse a number that is negative or not finite."""
    if not 0 <= value < float("inf"):
        raise ValueError(f"`{name}` must be a finite number of at least 0, got {value}.")
