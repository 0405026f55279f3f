"""The heart of choosing: a model, prepared rows and trusted rows in, a weight per row out.

pilot: two adapters learn the rows, one is pulled by the trusted rows       weights/pilot.py
scores of a sample of the rows, and of trusted rows that neither has seen
weights that make the rows score like trusted rows                          core/calibration.py
what rows alike say, and weights of the rows that have no score             weights/prediction.py

Or, with nothing trained (`weight_estimator="probe"`): scores of all rows by what sets trusted rows apart from training
rows (`core/probe.py`), and weights of them in the same way.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._version import __version__
from ..core.calibration import calibrate, ending_logits
from ..core.prediction import TabulatedPredictor, tabulate
from ..core.probe import Probe, fit_probe
from ..data.rows import Rows
from ..data.sampling import content_hash
from ..data.trusted import TrustedSets
from .errors import NonFiniteScoreError, row_list
from .language_model import LanguageModel, left_as_it_was, model_hash
from .pilot import BATCH_ROWS, BATCH_TOKENS, Pilot, PilotRecipe, pilot_tokens, trusted_values
from .prediction import FITTED_ROWS, Prediction, features, prediction_tokens
from .processes import Processes
from .progress import Progress, tokens_of
from .settings import WeightSettings, default_pilot_steps
from .store import Store

logger = logging.getLogger(__name__)

# Trusted rows that calibration needs at least: a quarter of them is held back.
MIN_TRUSTED_ROWS = 8
# How much of its standardised score a row's log weight carries: calibrated weights have plateaus, and this keeps the
# rows on one in order.
TILT = 0.01
# No weight is further below the largest one than this, in nats.
RANGE = 20.0


@dataclass
class Choice:
    """What choosing found out.

    Attributes:
        weights (`Tensor` float32 `[count]`): of the caller's rows, mean one; NaN for rows that preparation dropped.
        scores (`Tensor` float32 `[count, 2]`): score and surprise of the end of each row; NaN where not scored.
        held_back (`TrustedSets`): the trusted rows that were held back.
        trusted_scores (`Tensor` float32 `[c, 2]`): theirs, in the order of `places()`.
        facts (`dict`): steps, rows scored, seconds and so on, as plain values.
        predictor (`TabulatedPredictor`, *optional*): gives the weights of further rows.
    """

    weights: Tensor
    scores: Tensor
    held_back: TrustedSets
    trusted_scores: Tensor
    facts: dict[str, Any]
    predictor: TabulatedPredictor | None = None


def choose(
    model: LanguageModel,
    rows: Rows,
    trusted: TrustedSets,
    settings: WeightSettings,
    *,
    seed: int,
    groups: Tensor | None = None,
    checkpointing: bool = False,
    folder: Path | None = None,
    also: Any = None,
    hidden_progress: bool = True,
    further: bool = False,
) -> Choice:
    """Learn what each row is worth. A function of its arguments: nothing about the model is changed.

    Args:
        rows, trusted: prepared alike, so that the same kind of tokens is scored.
        settings ([`WeightSettings`]): resolved.
        seed (`int`): of the pilot.
        groups (`Tensor` int64 `[rows.count]`, *optional*): group of each of the caller's rows; one weight per group.
        checkpointing (`bool`): compute layers again in the pilot's backward, to save memory.
        folder (`Path`, *optional*): where to note scores, so that a killed run goes on from them; removed in the end.
        also: what else must be the same for notes to be used, as plain values.
        further (`bool`): also make a predictor for rows that are not here (`Choice.predictor`); at most half of the
            rows are scored then.

    Raises:
        ValueError: if there are too few rows of either kind, or the model cannot be read.
        NonFiniteScoreError: if a score is NaN or infinite.
    """
    check_sizes(rows, trusted)
    start, processes = time.perf_counter(), Processes.now()
    store = Store(folder, {} if folder is None else _identity(model, rows, trusted, settings, [seed, also]))
    with left_as_it_was(model.model), Progress(hidden_progress or processes.rank > 0) as progress:
        # Read one row: a model that cannot be read is found out before anything is trained.
        model.states(rows.batch([0]), [settings.feature_depth])
        reading = Prediction(model, rows, trusted, settings.feature_depth, seed, processes, progress)
        if settings.weight_estimator == "probe":
            choice = _by_probe(reading, settings, store, groups, further)
        else:
            choice = _by_pilot(reading, settings, store, groups, further, checkpointing)
    store.remove()
    choice.facts |= {"estimator": settings.weight_estimator, "seconds": round(time.perf_counter() - start, 2)}
    return choice


def _by_pilot(
    reading: Prediction,
    settings: WeightSettings,
    store: Store,
    groups: Tensor | None,
    further: bool,
    checkpointing: bool,
) -> Choice:
    """Weights by what trusted rows do to the losses of training rows, seen in a short training of two adapters."""
    start, model, rows, seed = time.perf_counter(), reading.model, reading.rows, reading.seed
    processes, progress = reading.processes, reading.progress
    steps = settings.pilot_steps or default_pilot_steps(len(rows))
    rate = settings.pilot_learning_rate
    recipe = PilotRecipe(settings.weight_estimator, steps, rate, seed, checkpointing=checkpointing)
    count = min(settings.pilot_scored_rows or len(rows), len(rows) // 2 if further else len(rows))
    pulling, held_back = reading.trusted.split(seed)
    sample = rows.order(seed)[:count]
    model.check_logits(rows.batch([0]))
    pilot = Pilot(model, recipe)
    reads = 2 * tokens_of(rows.lengths, sample.tolist()) + prediction_tokens(rows, count, settings.feature_depth)
    progress.plan(pilot_tokens(rows, pulling, recipe) + reads, sum(rows.lengths), pilot.bytes)
    _train(pilot, rows, pulling, store, progress)
    trusted_scores = processes.first(trusted_values(held_back, pilot.scores))
    scores = _row_scores(pilot.scores, 2, rows, sample, processes, store, progress)
    _check(scores, trusted_scores, f"lower `pilot_learning_rate` (now {rate:g}), or ")
    seconds = time.perf_counter() - start
    weights, facts, predictor = _weigh(scores, trusted_scores, held_back.shares(), reading, settings, groups, further)
    facts |= {"steps": steps, "learning_rate": rate, "rows_scored": count, "pilot_seconds": round(seconds, 2)}
    return Choice(weights, scores, held_back, trusted_scores, facts, predictor)


def _by_probe(
    reading: Prediction, settings: WeightSettings, store: Store, groups: Tensor | None, further: bool
) -> Choice:
    """Weights by what sets trusted rows apart from training rows. Every row is read once, and nothing is trained."""
    start, model, rows, trusted = time.perf_counter(), reading.model, reading.rows, reading.trusted
    processes, progress, depths = reading.processes, reading.progress, [settings.feature_depth]
    order = rows.order(reading.seed)
    sample, others = order[:FITTED_ROWS], order[FITTED_ROWS:]
    progress.plan(depths[0] * sum(rows.lengths), sum(rows.lengths), 0)
    (seen,) = reading.read(sample, depths, "Reading rows")
    known = processes.first(trusted_values(trusted, lambda batch: features(model, batch, depths)[0]))
    scores = torch.full((rows.count, 2), torch.nan)
    scores[rows.ids[sample[~seen.isfinite().all(-1)]]] = torch.inf
    _check(scores, known, "")
    fit = fit_probe(seen, known, trusted.shares())
    # Fits may round otherwise on another processor.
    probe = Probe(*map(processes.first, fit.probe))

    def score(batch: Any) -> Tensor:
        values = probe(features(model, batch, depths)[0])
        return torch.stack([values, torch.zeros_like(values)], dim=-1)

    scores = _row_scores(score, depths[0], rows, others, processes, store, progress)
    scores[rows.ids[sample]] = torch.stack([processes.first(fit.scores), torch.zeros(len(sample))], dim=-1)
    _check(scores, known, "")
    own, unseen = scores[rows.kept, 0], processes.first(fit.trusted_scores)
    found = calibrate(own, unseen, trusted.shares())
    facts = _facts(own, found.logits) | {"probe_auc": round(fit.auc, 4), "probe_strength": fit.strength}
    facts |= {"steps": 0, "learning_rate": 0.0, "rows_scored": len(rows)}
    facts["pilot_seconds"] = round(time.perf_counter() - start, 2)
    logits, predictor = torch.zeros(rows.count), None
    logits[rows.kept] = found.logits
    weights = _finish(logits, scores[:, 0], rows.kept, settings, groups, facts["equal"])
    if further and not facts["equal"]:
        predictor = tabulate(probe, own, found.logits.exp() ** settings.calibration_sharpness)
    trusted_scores = torch.stack([unseen, torch.zeros_like(unseen)], dim=-1)
    return Choice(weights, scores, trusted, trusted_scores, facts, predictor)


def _identity(model: LanguageModel, rows: Rows, trusted: TrustedSets, settings: Any, also: Any) -> dict[str, Any]:
    """What notes of scores depend on; reads all rows."""
    return {
        "rows": content_hash(rows.dataset),
        "trusted": {name: content_hash(part.dataset) for name, part in trusted.sets.items()},
        "shares": trusted.weights,
        "settings": asdict(settings) | {"bf16": model.bf16},
        "version": __version__,
        "also": also,
        "model": model_hash(model.model),
    }


def check_sizes(rows: Rows, trusted: TrustedSets) -> None:
    """Refuse too few rows by a `ValueError` that says how many are needed."""
    if len(rows) == 0:
        raise ValueError(
            f"None of the {rows.count} training rows has a token to learn from within `max_length`. Raise it, or look "
            "at the rows: are their answers empty?"
        )
    if len(trusted) < MIN_TRUSTED_ROWS:
        raise ValueError(
            f"`validation_dataset` has {len(trusted)} usable rows; at least {MIN_TRUSTED_ROWS} are needed, of which a "
            "quarter is held back to calibrate the weights. Give more trusted rows."
        )
    if max(len(part) for name, part in trusted.sets.items() if trusted.weights[name] > 0) < 2:
        raise ValueError(
            "Every set of `validation_dataset` that counts (`validation_weights`) has a single row: give at least two "
            "in one, or merge them."
        )


def _train(pilot: Pilot, rows: Rows, pulling: TrustedSets, store: Store, progress: Progress) -> None:
    progress.set_description("Training the pilot")
    saved = store.read("pilot")
    if saved is None:
        pilot.train(rows, pulling, progress.done)
        store.write("pilot", pilot.tensors())
    else:
        pilot.load_tensors(saved)
        progress.done(pilot_tokens(rows, pulling, pilot.recipe))


def _row_scores(
    score: Callable[[Any], Tensor],
    passes: float,
    rows: Rows,
    sample: Tensor,
    processes: Processes,
    store: Store,
    progress: Progress,
) -> Tensor:
    """Scores of the sampled rows by the caller's row number, float32 `[count, 2]`; NaN for all others.

    `score` gives those of a batch, in so many `passes` through the model.
    """
    progress.set_description("Scoring rows")
    scores = torch.zeros(rows.count, 2)
    own = processes.own(rows.batches(sample.tolist(), BATCH_TOKENS, BATCH_ROWS))
    name, done = f"scores-{processes.rank}", 0
    saved = store.read(name)
    if saved is not None:
        scores, done = saved["scores"], int(saved["done"])
    for number, batch in enumerate(own):
        if number >= done:
            scores[rows.ids[batch]] = score(rows.batch(batch))
            store.write(name, {"scores": scores, "done": torch.tensor(number + 1)}, pause=True)
        progress.done(passes * tokens_of(rows.lengths, batch) * processes.count)
    scores = processes.sum(scores)
    out = torch.full_like(scores, torch.nan)
    # NaN means "not scored": a score that is not a number is told from that.
    out[rows.ids[sample]] = scores[rows.ids[sample]].nan_to_num(nan=torch.inf)
    return out


def _check(scores: Tensor, trusted: Tensor, remedy: str) -> None:
    bad = torch.isinf(scores).any(-1)
    if not bool(bad.any()) and bool(torch.isfinite(trusted).all()):
        return
    where = f"training rows (sample_id) {row_list(bad.nonzero().squeeze(1))}" if bool(bad.any()) else "trusted rows"
    raise NonFiniteScoreError(
        f"The scores of {where} are NaN or infinite. Nothing has been trained yet. Look at these rows, {remedy}"
        f"{'' if remedy else 'or '}use bf16 instead of fp16."
    )


def _facts(scores: Tensor, logits: Tensor) -> dict[str, Any]:
    """What is told of scores and of the weights that calibration made of them; a warning if these are equal."""
    equal = float(logits.max() - logits.min()) == 0
    if equal:
        logger.warning(
            "The scores do not differ, or trusted rows score no better than training rows: there is nothing to select "
            "by, and all rows get the same weight. More trusted rows or `pilot_steps` may help."
        )
    mean, spread = float(scores.mean()), float(scores.std(unbiased=False))
    return {"score_mean": mean, "score_std": spread, "equal": equal, "smoothing": None}


def _finish(
    logits: Tensor, scores: Tensor, kept: Tensor, settings: WeightSettings, groups: Tensor | None, equal: bool
) -> Tensor:
    """Weights from log weights (`[N]`) of all rows, told apart by their scores (NaN where there is none)."""
    if equal:
        return torch.where(kept, 1.0, torch.nan)
    known = scores[~torch.isnan(scores)]
    z = ((scores - known.mean()) / known.std(unbiased=False).clamp(min=1e-8)).nan_to_num(nan=0.0)
    logits = settings.calibration_sharpness * (logits - logits[kept].max()) + TILT * z.clamp(-5, 5)
    return finished(logits.clamp(-RANGE, RANGE).exp(), kept, groups, settings.filter_rate)


def _weigh(
    scores: Tensor,
    trusted_scores: Tensor,
    shares: Tensor,
    predict: Prediction,
    settings: WeightSettings,
    groups: Tensor | None,
    further: bool,
) -> tuple[Tensor, dict[str, Any], TabulatedPredictor | None]:
    """Weights of all rows from scores of some; facts about them; a predictor of further ones, if wanted."""
    known = ~torch.isnan(scores).any(-1)
    first = scores[known, 0]
    found = calibrate(first, trusted_scores[:, 0], shares)
    ends = ending_logits(scores[known, 1], trusted_scores[:, 1], found.logits.exp(), shares)
    found = found._replace(logits=found.logits + ends)
    facts, weights, predictor = _facts(first, found.logits), torch.ones(len(scores)), None
    if not facts["equal"]:
        weights, facts["smoothing"], predictor = predict.weigh(
            known.nonzero().squeeze(1), found, settings.calibration_sharpness, further
        )
    logits = weights.clamp(min=1e-30).log()
    weights = _finish(logits, scores[:, 0], predict.rows.kept, settings, groups, facts["equal"])
    return weights, facts, predictor


def finished(weights: Tensor, kept: Tensor, groups: Tensor | None = None, filter_rate: float = 0.0) -> Tensor:
    """Weights float32 `[N]` of mean one over the rows that are `kept`, NaN for the others.

    Args:
        weights (`Tensor` float `[N]`): above 0.
        groups (`Tensor` int64 `[N]`, *optional*): a group's weight is the mean of its rows'.
        filter_rate (`float`): share of the rows, those of the lowest weights, that gets weight 0.
    """
    values = weights.double()
    if groups is not None:
        sums = torch.zeros(int(groups.max()) + 1, dtype=torch.float64).index_add_(0, groups[kept], values[kept])
        counts = torch.bincount(groups[kept], minlength=len(sums)).clamp(min=1)
        values = (sums / counts)[groups]
    if filter_rate > 0:
        values = torch.where(values < float(np.quantile(values[kept].numpy(), filter_rate)), 0.0, values)
    return torch.where(kept, values / values[kept].mean(), torch.nan).float()
