"""Work of a run in floating-point operations, multiply and add counted as two; docs/planning.md has the formulas."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .activations import head_is_trained
from .shapes import ModelShape, RunShape


@dataclass(frozen=True)
class WorkPlan:
    """Estimated work, FLOPs over all processes.

    Attributes:
        step (`float`): of an optimizer step, validation rows and online estimators at their mean.
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
        "adapters": 2 * tokens * sum(x.rank * (x.inputs + x.outputs) * x.number for x in model.linears) * share,
        # As if every token saw every other: kernels skip up to half of it.
        "attention": 4 * tokens**2 * model.heads * model.head_size * model.layers * share,
        "LM head": 0.0 if layers is not None else 2 * (tokens - 1) * model.hidden * model.vocabulary,
    }


def training_parts(model: ModelShape, run: RunShape, tokens: float) -> dict[str, float]:
    """FLOPs of one row's forward and backward, by part, with what checkpointing and the LM head compute again."""
    forward = forward_parts(model, tokens)
    again = 1 if run.checkpointing else 0
    trained = sum(x.inputs * x.outputs * x.number for x in model.linears if x.trained)
    # Flash kernels compute the scores again in the backward.
    attention = 2.0 if run.attention == "eager" else 2.5
    return {
        "linear layers": forward["linear layers"] * (2 + again) + 2 * tokens * trained,
        "adapters": forward["adapters"] * (3 + again),
        "attention": forward["attention"] * (1 + attention + again),
        "LM head": forward["LM head"] * (3 + head_is_trained(model)),
    }


def estimate_work(model: ModelShape, run: RunShape) -> WorkPlan:
    """FLOPs of a step, and of the run with its pilot.

    Args:
        model (`ModelShape`), run (`RunShape`): as for `memory.estimate_memory`; rows count `run.mean_tokens` tokens.
    """
    from ..trainer.pilot import HELD_BACK_SHARE

    tokens = run.mean_tokens or run.tokens
    trained, passed = sum(training_parts(model, run, tokens).values()), sum(forward_parts(model, tokens).values())
    rows = run.rows_per_step
    joined = run.joined_rows * run.accumulation * run.processes / run.joined_every
    plain = rows * trained
    step = plain + joined * trained + _online(run, trained, passed)
    steps = run.steps
    pilot, scoring, prediction = 0.0, 0.0, 0.0
    known = run.training_rows
    if run.estimator != "none" and not run.online:
        pilot = _pilot_work(run, trained, passed)
        scored = run.scored_rows or known or 0
        if known is not None:
            scored = min(scored, known)
        each = trained if run.estimator == "alignment" else passed * (1 if run.estimator == "loss" else 2)
        scoring = (scored + HELD_BACK_SHARE * run.validation_rows) * each
        if known is not None:
            prediction = _reading_work(model, run, tokens, scored, known)
    return WorkPlan(
        step=step,
        training=None if steps is None else steps * step,
        pilot=pilot,
        scoring=scoring,
        prediction=prediction if known is not None or run.estimator == "none" or run.online else None,
        plain=None if steps is None else steps * plain,
    )


def pilot_steps(run: RunShape) -> int:
    """Steps of the pilot run."""
    from ..trainer.pilot import default_pilot_steps

    # A long run has the most that there are.
    return run.pilot_steps or default_pilot_steps(run.steps or 10**6)


def _pilot_work(run: RunShape, trained: float, passed: float) -> float:
    """FLOPs of the pilot run's steps, and of getting ready to score; estimators start each step as in training."""
    from ..estimators.alignment import SCORING_DRAWS
    from ..trainer.pilot import pilot_lookahead

    steps = pilot_steps(run)
    own = steps * run.pilot_batch * trained
    pulling = steps * run.pulling_batch * trained
    refreshes = math.ceil(steps / run.estimator_every)
    if run.estimator == "lookahead":
        ahead = (run.lookahead_steps or pilot_lookahead(steps)) * run.pulling_batch * trained
        return own + steps * run.pilot_batch * passed + (refreshes + 1) * ahead
    if run.estimator == "value_function":
        return own + pulling + refreshes * run.pilot_batch * trained
    if run.estimator == "alignment":
        return own + pulling + (refreshes + SCORING_DRAWS) * run.pulling_batch * trained
    return own + pulling


def _reading_work(model: ModelShape, run: RunShape, tokens: float, scored: int, known: int) -> float:
    """FLOPs of the forwards through lower layers that read hidden states of rows."""
    from ..trainer.amortise import SMOOTHING_DEPTH
    from ..trainer.bilevel_sft_config import MIN_SCORED_ROWS

    def lower(depth: float) -> float:
        return sum(forward_parts(model, tokens, max(1, round(depth * model.layers))).values())

    found = 0.0
    if scored < known:
        found += (known - scored + run.validation_rows) * lower(run.feature_depth)
    if run.smooths and scored >= MIN_SCORED_ROWS:
        # Where the others are predicted, what that reads of scored rows is on the way to the deeper layer.
        return found + (scored + run.validation_rows) * lower(max(SMOOTHING_DEPTH, run.feature_depth))
    return found + (scored * lower(run.feature_depth) if scored < known else 0.0)


def _online(run: RunShape, trained: float, passed: float) -> float:
    """Mean work of an estimator in a step of training."""
    if not run.online:
        return 0.0
    if run.estimator == "value_function":
        return run.rows_per_step * trained / run.estimator_every
    if run.estimator == "lookahead":
        refresh = (run.lookahead_steps or 4) * run.pulling_batch * trained
        return run.rows_per_step * passed + refresh / run.estimator_every
    if run.estimator == "alignment":
        return run.pulling_batch * trained / run.estimator_every
    return 0.0
