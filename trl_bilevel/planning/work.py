"""Work of a run in floating-point operations, multiply and add counted as two; docs/planning.md has the formulas."""

from dataclasses import replace
from typing import Any

from ..data.trusted import HELD_BACK_SHARE
from ..trainer.record import FOLLOWED_ROWS
from ..weights.adapters import RANK, upper_layers
from ..weights.choose import FITTED_ROWS
from ..weights.settings import MOST_PILOT_STEPS, PILOT_ROWS, PROBE_DEPTH, default_pilot_steps
from .shapes import ModelShape, RunShape

# Layers that read the input of attention.
ATTENTION_INPUTS = ("q_proj", "k_proj", "v_proj")
# Forwards that attention's backward takes; flash kernels, 2.5, compute the scores again.
SCORES = {"eager": 2.0}


def _forward(model: ModelShape, tokens: float) -> tuple[float, float, float]:
    """FLOPs of one row's forward through the decoder: of its linear layers, of their adapters, of attention."""
    linear, adapters = 2 * tokens * model.linear_parameters, 2 * tokens * model.adapter_parameters
    # As if every token saw every other: kernels skip up to half of it.
    return linear, adapters, 4 * tokens**2 * model.heads * model.head_size * model.layers


def _scored(run: RunShape, tokens: float) -> float:
    """Positions of which choosing computes logits."""
    return tokens - 1 if run.scored_tokens is None else min(run.scored_tokens, tokens - 1)


def _trained_row(model: ModelShape, run: RunShape, tokens: float, positions: float) -> float:
    """FLOPs of one row's forward and backward, with what checkpointing and the LM head compute again."""
    again, (linear, adapters, attention) = run.checkpointing, _forward(model, tokens)
    own = 2 * tokens * sum(x.inputs * x.outputs * x.number for x in model.linears if x.trained)
    decoder = (
        linear * (2 + again) + own + adapters * (3 + again) + attention * (1 + SCORES.get(run.attention, 2.5) + again)
    )
    # Logits, logits again in the backward, gradient, and the weight's if it has one.
    return decoder + 2 * positions * model.hidden * model.vocabulary * (3 + model.head_trained)


def _read_row(model: ModelShape, run: RunShape, tokens: float) -> float:
    """FLOPs of a row's loss without gradient, as choosing computes it."""
    # The model's own forward makes logits of one position, which nobody reads.
    return sum(_forward(model, tokens)) + 2 * (_scored(run, tokens) + 1) * model.hidden * model.vocabulary


def pilot_shape(model: ModelShape) -> ModelShape:
    """The layers that the pilot run's backward goes through, with its adapters; nothing else is trained there."""
    # Gradients count with the adapters, which hold them all the time, and compute in the dtype of their layer.
    top = upper_layers(model.layers)
    share = top / model.layers
    linears = tuple(x._replace(number=round(x.number * share), rank=RANK, trained=False) for x in model.linears)
    frozen: dict[str, Any] = dict.fromkeys(("head_trained", "embedding_trained", "norms_trained"), False)
    frozen |= {"trainable_bytes": 0, "copied_bytes": 0, "adapter_bytes": model.weight_bytes}
    return replace(model, layers=top, linears=linears, **frozen)


def pilot_row(model: ModelShape, run: RunShape, tokens: float) -> tuple[float, float]:
    """FLOPs of one row's forward, and of its forward and backward, under the pilot run's adapters."""
    top, again = pilot_shape(model), run.checkpointing
    linear, adapters, attention = _forward(top, tokens)
    forward = _read_row(model, run, tokens) + adapters
    # The model's own adapters are frozen here, as its layers are.
    frozen = _forward(model, tokens)[1] * top.layers / model.layers
    # What the lowest of these layers reads needs no gradient.
    lowest = sum(x.inputs * x.outputs for x in top.linears if x.name in ATTENTION_INPUTS)
    backward = (linear + frozen) * (1 + again) - 2 * tokens * lowest
    backward += adapters * (2 + again) + attention * (SCORES.get(run.attention, 2.5) + again)
    backward += 4 * _scored(run, tokens) * model.hidden * model.vocabulary
    return forward, forward + backward


def pilot_rows(run: RunShape) -> int:
    """Rows that the pilot run takes forward and backward, each pass counted."""
    # A long run has the most steps that there are.
    usual = MOST_PILOT_STEPS if run.training_rows is None else default_pilot_steps(run.training_rows)
    steps = run.pilot_steps or usual
    # Training rows under both sets of adapters, trusted rows under the second.
    return 3 * PILOT_ROWS * steps


def estimate_work(model: ModelShape, run: RunShape) -> dict[str, float | None]:
    """FLOPs of a run over all processes, rows of `run.mean_tokens` tokens; `None` where it is not known.

    Parts are named as in `text/plan.yaml`; `step` counts trusted rows and a tracker, `plain` is as many steps of SFT.
    """
    tokens, known, trusted = run.mean_tokens or run.tokens, run.training_rows, run.processes * run.validation_rows
    trained = _trained_row(model, run, tokens, tokens - 1)
    plain = run.rows_per_step * trained
    step = plain + run.joined * trained
    if run.estimator == "sparse_centred":
        step += run.rows_per_step * _trained_row(model, run, tokens, _scored(run, tokens))
    steps = run.steps if run.trains else 0
    work = dict.fromkeys(("reading", "pilot", "scoring", "following"), 0.0)
    if run.pilots:
        passed, pilot_trained = pilot_row(model, run, tokens)
        work["pilot"] = run.processes * pilot_rows(run) * pilot_trained
        work["scoring"] = 2 * ((known or 0) + HELD_BACK_SHARE * trusted) * passed
    if run.probes:
        share = max(1, round(PROBE_DEPTH * model.layers)) / model.layers
        # Some rows are read once more, with the answers of others.
        rows = (known or 0) + run.matches * min(known or 0, FITTED_ROWS) + trusted
        work["reading"] = share * rows * sum(_forward(model, tokens))
    if run.trains:
        work["following"] = 2 * min(trusted, run.processes * FOLLOWED_ROWS) * _read_row(model, run, tokens)
    work |= {"step": run.trains * step, "training": (steps or 0) * step, "plain": (steps or 0) * plain}
    work["total"] = sum(work[name] for name in ("training", "reading", "pilot", "scoring", "following"))
    unknown = {"training", "plain", "total"} if steps is None else set()
    if known is None:
        unknown |= {"reading", "total"} if run.probes else set()
        unknown |= {"scoring", "total"} if run.pilots else set()
    return {name: None if name in unknown else flops for name, flops in work.items()}
