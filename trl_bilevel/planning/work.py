"""Work of a run in floating-point operations, multiply and add counted as two; docs/planning.md has the formulas."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from ..data.trusted import HELD_BACK_SHARE
from ..trainer.record import FOLLOWED_ROWS
from ..weights.adapters import RANK, upper_layers
from ..weights.prediction import SMOOTHING_DEPTH
from ..weights.settings import MOST_PILOT_STEPS, PILOT_ROWS, default_pilot_steps, lookahead_steps
from .activations import ATTENTION_INPUTS, head_is_trained
from .shapes import Linear, ModelShape, RunShape

# Sets of the pilot's adapters, each with two AdamW states and a gradient, all of it in fp32.
PILOT_SETS, PILOT_BYTES = 2, 16
# Products of the LM head's size for the losses of a row outside of TRL's trainer and their gradient: logits, logits
# again in the backward, gradient.
HEAD_PRODUCTS = 3


@dataclass(frozen=True)
class WorkPlan:
    """Estimated work, FLOPs over all processes.

    Attributes:
        step (`float`): of an optimizer step, validation rows and a tracker included.
        training (`float`, *optional*): of all steps; `None` if the length of the run is not known.
        pilot (`float`): of the pilot run's steps.
        scoring (`float`): of scoring rows after it.
        prediction (`float`, *optional*): of reading hidden states, to smooth the weights of scored rows and to predict
            the others'; `None` if the number of rows is not known.
        following (`float`): of the trusted rows' losses before and after training, for the report.
        plain (`float`, *optional*): of as many steps of plain SFT.
    """

    step: float
    training: float | None
    pilot: float
    scoring: float
    prediction: float | None
    following: float
    plain: float | None

    @property
    def total(self) -> float | None:
        """Of the whole run."""
        if self.training is None or self.prediction is None:
            return None
        return self.training + self.pilot + self.scoring + self.prediction + self.following


def forward_parts(model: ModelShape, tokens: float, layers: int | None = None) -> dict[str, float]:
    """FLOPs of one row's forward, by part; through the lowest `layers` only, without LM head, if given."""
    share = 1.0 if layers is None else layers / model.layers
    return {
        "linear layers": 2 * tokens * model.linear_parameters * share,
        "adapters": 2 * tokens * model.adapter_parameters * share,
        # As if every token saw every other: kernels skip up to half of it.
        "attention": 4 * tokens**2 * model.heads * model.head_size * model.layers * share,
        "LM head": 0.0 if layers is not None else 2 * (tokens - 1) * model.hidden * model.vocabulary,
    }


def training_parts(model: ModelShape, run: RunShape, tokens: float) -> dict[str, float]:
    """FLOPs of one row's forward and backward, by part, with what checkpointing and the LM head compute again."""
    forward = forward_parts(model, tokens)
    again = 1 if run.checkpointing else 0
    trained = sum(x.inputs * x.outputs * x.number for x in model.linears if x.trained)
    return {
        "linear layers": forward["linear layers"] * (2 + again) + 2 * tokens * trained,
        "adapters": forward["adapters"] * (3 + again),
        "attention": forward["attention"] * (1 + _attention_backward(run) + again),
        "LM head": forward["LM head"] * (3 + head_is_trained(model)),
    }


def _attention_backward(run: RunShape) -> float:
    """Backward of attention in forwards: flash kernels compute the scores again."""
    return 2.0 if run.attention == "eager" else 2.5


def scored_head(model: ModelShape, run: RunShape, tokens: float) -> float:
    """FLOPs of the logits of a row's scored positions, which are all that choosing computes."""
    scored = tokens - 1 if run.scored_tokens is None else min(run.scored_tokens, tokens - 1)
    return 2 * scored * model.hidden * model.vocabulary


def read_row(model: ModelShape, run: RunShape, tokens: float) -> float:
    """FLOPs of a row's loss without gradient, as choosing computes it."""
    # The model's own forward makes logits of one position, which nobody reads.
    head = scored_head(model, run, tokens) + 2 * model.hidden * model.vocabulary
    return sum((forward_parts(model, tokens) | {"LM head": head}).values())


def tracker_row(model: ModelShape, run: RunShape, tokens: float) -> float:
    """FLOPs of a row's forward and backward under the tracker of the published update."""
    head = scored_head(model, run, tokens) * (HEAD_PRODUCTS + head_is_trained(model))
    return sum((training_parts(model, run, tokens) | {"LM head": head}).values())


def pilot_shape(model: ModelShape) -> ModelShape:
    """The layers that the pilot run's backward goes through, with its adapters; nothing else is trained there.

    Its gradients count with the adapters, which hold them all the time: `trainable_bytes` is 0. Adapters compute in
    the dtype of the layer that they are on.
    """
    top = upper_layers(model.layers)
    numbers: Counter[tuple[str, int, int]] = Counter()
    for x in model.linears:
        numbers[x.name, x.inputs, x.outputs] += x.number
    linears = tuple(Linear(*key, round(number * top / model.layers), RANK) for key, number in numbers.items())
    return replace(
        model,
        layers=top,
        linears=linears,
        trainable_bytes=0,
        copied_bytes=0,
        adapter_bytes=model.weight_bytes,
        head_trained=False,
        embedding_trained=False,
        norms_trained=False,
    )


def pilot_row(model: ModelShape, run: RunShape, tokens: float) -> tuple[float, float]:
    """FLOPs of one row's forward, and of its forward and backward, under the pilot run's adapters."""
    top = pilot_shape(model)
    back = forward_parts(top, tokens)
    # What the lowest of these layers reads needs no gradient.
    lowest = sum(x.inputs * x.outputs for x in top.linears if x.name in ATTENTION_INPUTS)
    forward = read_row(model, run, tokens) + back["adapters"]
    # The model's own adapters are frozen here, as its layers are.
    frozen = forward_parts(model, tokens)["adapters"] * top.layers / model.layers
    again = 1 if run.checkpointing else 0
    backward = (back["linear layers"] + frozen) * (1 + again) - 2 * tokens * lowest
    backward += back["adapters"] * (2 + again) + back["attention"] * (_attention_backward(run) + again)
    backward += scored_head(model, run, tokens) * (HEAD_PRODUCTS - 1)
    return forward, forward + backward


def estimate_work(model: ModelShape, run: RunShape) -> WorkPlan:
    """FLOPs of a step, and of the run with its pilot.

    Args:
        model (`ModelShape`), run (`RunShape`): as for `memory.estimate_memory`; rows count `run.mean_tokens` tokens.
    """
    tokens = run.mean_tokens or run.tokens
    trained = sum(training_parts(model, run, tokens).values())
    plain = run.rows_per_step * trained
    step = plain + run.joined_per_step * trained
    if run.estimator == "sparse_centred":
        step += run.rows_per_step * tracker_row(model, run, tokens)
    steps, known = run.steps, run.training_rows
    pilot, scoring, prediction = 0.0, 0.0, None if run.pilots and known is None else 0.0
    # Of what every process does for itself.
    trusted = run.processes * run.validation_rows
    if run.pilots:
        scored = run.rows_scored
        passed, pilot_trained = pilot_row(model, run, tokens)
        pilot = run.processes * pilot_rows(run) * pilot_trained
        scoring = 2 * (scored + HELD_BACK_SHARE * trusted) * passed
        if known is not None:
            others = known - scored
            prediction = (scored + trusted) * _lower(model, tokens, SMOOTHING_DEPTH)
            prediction += (others + trusted) * _lower(model, tokens, run.read_depth) if others else 0.0
    following = 0.0
    if run.estimator != "none" or run.joins:
        following = 2 * min(trusted, run.processes * FOLLOWED_ROWS) * read_row(model, run, tokens)
    return WorkPlan(
        step=step,
        training=None if steps is None else steps * step,
        pilot=pilot,
        scoring=scoring,
        prediction=prediction,
        following=following,
        plain=None if steps is None else steps * plain,
    )


def pilot_rows(run: RunShape) -> int:
    """Rows that the pilot run takes forward and backward, each pass counted."""
    # A long run has the most steps that there are.
    usual = MOST_PILOT_STEPS if run.training_rows is None else default_pilot_steps(run.training_rows)
    steps = run.pilot_steps or usual
    if run.estimator == "lookahead":
        return PILOT_ROWS * (steps + lookahead_steps(steps))
    # Training rows under both sets of adapters, trusted rows under the second.
    return 3 * PILOT_ROWS * steps


def _lower(model: ModelShape, tokens: float, depth: float) -> float:
    """FLOPs of one row's forward through a share of the layers."""
    return sum(forward_parts(model, tokens, max(1, round(depth * model.layers))).values())
