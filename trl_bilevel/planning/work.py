"""Work of a run in floating-point operations, multiply and add counted as two; docs/planning.md has the formulas."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from .activations import ATTENTION_INPUTS, head_is_trained
from .shapes import Linear, ModelShape, RunShape

# The pilot run's own settings, as `trl_bilevel/weights` has them. Sets of adapters, each with two AdamW states and a
# gradient, all of it in fp32:
PILOT_SETS, PILOT_RANK, PILOT_BYTES = 2, 8, 16
# Share of the layers that have adapters, from the top, and how many have them at least.
PILOT_DEPTH, PILOT_LAYERS = 1 / 3, 2
# Rows of a batch, over all processes; steps at least and at most; those of the look-ahead that ends them, at least.
PILOT_BATCH, PILOT_STEPS, LOOKAHEAD_STEPS = 8, (8, 24), 4
# Tokens of a micro-batch, training and scoring alike, and positions whose logits are there at a time.
PILOT_TOKENS, PILOT_POSITIONS = 4096, 512
# Whether the layers above compute their activations again in the backward, in place of keeping them.
PILOT_CHECKPOINTING = False
# Products of the LM head's size for a row's loss and its gradient: logits, logits again in the backward, gradient.
PILOT_HEAD = 3
# Share of the trusted rows that only get scored.
HELD_BACK_SHARE = 0.25
# Share of the layers through which scored and trusted rows are read, to weigh a row by what rows like it score.
SMOOTHING_DEPTH = 2 / 3


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
        plain (`float`, *optional*): of as many steps of plain SFT.
    """

    step: float
    training: float | None
    pilot: float
    scoring: float
    prediction: float | None
    plain: float | None

    @property
    def total(self) -> float | None:
        """Of the whole run."""
        if self.training is None or self.prediction is None:
            return None
        return self.training + self.pilot + self.scoring + self.prediction


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


def pilot_shape(model: ModelShape) -> ModelShape:
    """The layers that the pilot run's backward goes through, with its adapters; nothing else is trained there.

    Its gradients count with the adapters, which hold them all the time: `trainable_bytes` is 0. Adapters compute in
    the dtype of the layer that they are on.
    """
    top = min(model.layers, max(PILOT_LAYERS, round(PILOT_DEPTH * model.layers)))
    numbers: Counter[tuple[str, int, int]] = Counter()
    for x in model.linears:
        numbers[x.name, x.inputs, x.outputs] += x.number
    linears = tuple(Linear(*key, round(number * top / model.layers), PILOT_RANK) for key, number in numbers.items())
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
    whole, top = forward_parts(model, tokens), pilot_shape(model)
    back = forward_parts(top, tokens)
    # What the lowest of these layers reads needs no gradient.
    lowest = sum(x.inputs * x.outputs for x in top.linears if x.name in ATTENTION_INPUTS)
    forward = sum(whole.values()) + back["adapters"]
    # The model's own adapters are frozen here, as its layers are.
    frozen, again = whole["adapters"] * top.layers / model.layers, 1 if PILOT_CHECKPOINTING else 0
    backward = (back["linear layers"] + frozen) * (1 + again) - 2 * tokens * lowest
    backward += back["adapters"] * (2 + again) + back["attention"] * (_attention_backward(run) + again)
    backward += back["LM head"] * (PILOT_HEAD - 1)
    return forward, forward + backward


def estimate_work(model: ModelShape, run: RunShape) -> WorkPlan:
    """FLOPs of a step, and of the run with its pilot.

    Args:
        model (`ModelShape`), run (`RunShape`): as for `memory.estimate_memory`; rows count `run.mean_tokens` tokens.
    """
    tokens = run.mean_tokens or run.tokens
    trained = sum(training_parts(model, run, tokens).values())
    plain = run.rows_per_step * trained
    step = plain + run.joined_rows * run.accumulation * run.processes * trained
    if run.estimator == "sparse_centred":
        # Its tracker trains on the same rows.
        step += plain
    steps, known = run.steps, run.training_rows
    pilot, scoring, prediction = 0.0, 0.0, None if run.pilots and known is None else 0.0
    if run.pilots:
        scored = min(run.scored_rows or known or 0, known or run.scored_rows)
        passed, pilot_trained = pilot_row(model, run, tokens)
        pilot = pilot_rows(run) * pilot_trained
        scoring = 2 * (scored + HELD_BACK_SHARE * run.validation_rows) * passed
        if known is not None:
            read = (scored + run.validation_rows) * _lower(model, tokens, SMOOTHING_DEPTH)
            prediction = read + (known - scored) * _lower(model, tokens, run.read_depth)
    return WorkPlan(
        step=step,
        training=None if steps is None else steps * step,
        pilot=pilot,
        scoring=scoring,
        prediction=prediction,
        plain=None if steps is None else steps * plain,
    )


def pilot_rows(run: RunShape) -> int:
    """Rows that the pilot run takes forward and backward, each pass counted."""
    least, most = PILOT_STEPS
    # One pass over the rows, within limits; a long run has the most steps that there are.
    wanted = most if run.training_rows is None else -(-run.training_rows // PILOT_BATCH)
    steps = run.pilot_steps or min(most, max(least, wanted))
    if run.estimator == "lookahead":
        return PILOT_BATCH * (steps + max(LOOKAHEAD_STEPS, steps // 2))
    # Training rows under both sets of adapters, trusted rows under the second.
    return 3 * PILOT_BATCH * steps


def _lower(model: ModelShape, tokens: float, depth: float) -> float:
    """FLOPs of one row's forward through a share of the layers."""
    return sum(forward_parts(model, tokens, max(1, round(depth * model.layers))).values())
