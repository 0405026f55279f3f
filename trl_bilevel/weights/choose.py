"""The heart of choosing: a model, prepared rows and trusted rows in, a weight per row out.

opinions on each row, and on trusted rows that they have not seen
    probe: does it look like trusted rows, does its answer belong to its question     core/probe.py
    pilot: do trusted rows lower its loss, in a short training of two adapters        weights/pilot.py
weights that make the rows score like trusted rows                                    core/calibration.py
"""

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._version import __version__
from ..core.calibration import calibrate, ending_logits, winsorised
from ..core.probe import Mismatched, Probe, Scorer, fit_probe, opinion_weight, tabulate
from ..data.rows import Rows
from ..data.sampling import content_hash
from ..data.trusted import TrustedSets
from .errors import NonFiniteScoreError, row_list
from .language_model import LanguageModel, left_as_it_was, model_hash
from .pilot import BATCH_ROWS, BATCH_TOKENS, Pilot, PilotRecipe, pilot_tokens, trusted_values
from .processes import Processes
from .progress import Progress, tokens_of
from .reading import Reading, mean_states
from .settings import PILOTS, PROBE_DEPTH, PROBES, WeightSettings, default_pilot_steps
from .store import Store

logger = logging.getLogger(__name__)

# Trusted rows that calibration needs at least.
MIN_TRUSTED_ROWS = 8
# Training rows that the probe is made from, a random sample: more say no more.
FITTED_ROWS = 2048
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
        scores (`Tensor` float32 `[count, 2]`): score and surprise of the end of each row (0 without a pilot); NaN for
            rows that preparation dropped.
        held_back (`TrustedSets`): the trusted rows that calibrate the scores.
        trusted_scores (`Tensor` float32 `[c, 2]`): theirs, in the order of `places()`.
        facts (`dict`): steps, seconds and so on, as plain values.
        scorer (`Scorer`, *optional*): gives the weights of further rows; of a probe alone.
    """

    weights: Tensor
    scores: Tensor
    held_back: TrustedSets
    trusted_scores: Tensor
    facts: dict[str, Any]
    scorer: Scorer | None = None


@dataclass
class Opinion:
    """Scores of rows, and of trusted rows whose scores can be compared to them: nothing was fitted to these.

    Attributes:
        scores (`Tensor` float32 `[count, 2]`), trusted_scores (`Tensor` float32 `[c, 2]`): see `Choice`.
        facts (`dict`): what is told of it.
    """

    scores: Tensor
    trusted_scores: Tensor
    facts: dict[str, Any] = field(default_factory=dict)


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
) -> Choice:
    """Learn what each row is worth. A function of its arguments: nothing about the model is changed.

    Args:
        rows, trusted: prepared alike, so that the same kind of tokens is scored.
        settings ([`WeightSettings`]): resolved.
        seed (`int`): of the pilot, and of the rows that the probe is made from.
        groups (`Tensor` int64 `[rows.count]`, *optional*): group of each of the caller's rows; one weight per group.
        checkpointing (`bool`): compute layers again in the pilot's backward, to save memory.
        folder (`Path`, *optional*): where to note scores, so that a killed run goes on from them; removed in the end.
        also: what else must be the same for notes to be used, as plain values.

    Raises:
        ValueError: if there are too few rows of either kind, or the model cannot be read.
        NonFiniteScoreError: if a score is NaN or infinite.
    """
    check_sizes(rows, trusted)
    start, processes, estimator = time.perf_counter(), Processes.now(), settings.weight_estimator
    store = Store(folder, {} if folder is None else _identity(model, rows, trusted, settings, [seed, also]))
    held_back, probe = trusted, None
    with left_as_it_was(model.model), Progress(hidden_progress or processes.rank > 0) as progress:
        reading = Reading(model, rows, trusted, PROBE_DEPTH, processes, progress)
        # Read one row: a model that cannot be read is found out before anything is done.
        mean_states(model, rows.batch([0]), reading.depth)
        pilot = _Pilot(reading, settings, seed, checkpointing) if estimator in PILOTS else None
        tokens = 0 if pilot is None else pilot.tokens
        if estimator in PROBES:
            tokens += _probe_tokens(reading, settings.matches)
        progress.plan(tokens, sum(rows.lengths), 0 if pilot is None else pilot.pilot.bytes)
        found: Opinion | None = None
        if estimator in PROBES:
            found, probe = _ask_probe(reading, rows.order(seed), settings.matches, store)
        if pilot is not None:
            second, held_back = pilot.ask(store), pilot.held_back
            found = second if found is None else _added(found, second, rows.kept, trusted.which(pilot.held), held_back)
        assert found is not None
    facts = found.facts | {"pilot_seconds": round(time.perf_counter() - start, 2), "estimator": estimator}
    weights, logits, equal = _weigh(found, rows.kept, held_back, settings, groups)
    scorer = None
    if probe is not None and pilot is None:
        scorer = tabulate(probe, found.scores[rows.kept, 0], logits.exp() ** settings.calibration_sharpness)
    store.remove()
    known = found.scores[rows.kept, 0]
    facts |= {"score_mean": float(known.mean()), "score_std": float(known.std(unbiased=False)), "equal": equal}
    facts |= {"seconds": round(time.perf_counter() - start, 2)}
    return Choice(weights, found.scores, held_back, found.trusted_scores, facts, scorer)


def _probe_tokens(reading: Reading, matches: bool) -> float:
    """How many tokens pass through the model for the probe, a whole forward counted once."""
    lengths = reading.rows.lengths
    twice = min(1.0, FITTED_ROWS / max(1, len(lengths))) if matches else 0.0
    return reading.depth * sum(lengths) * (1 + twice)


def _ask_probe(reading: Reading, order: Tensor, matches: bool, store: Store) -> tuple[Opinion, Probe]:
    """What sets trusted rows apart, and whether answers match. Every row is read, and nothing is trained."""
    model, rows, depth, processes = reading.model, reading.rows, reading.depth, reading.processes
    sample, others = order[:FITTED_ROWS], order[FITTED_ROWS:]
    states, known = reading.states(sample), reading.trusted_states()
    swapped = reading.mismatched(sample) if matches else None
    bad = torch.full((rows.count, 1), torch.nan)
    bad[rows.ids[sample[~states.isfinite().all(-1)]]] = torch.inf
    _check(bad, known, "")
    if swapped is not None:
        whole = swapped.states.isfinite().all(-1)
        swapped = Mismatched(*(part[whole] for part in swapped))
    fit = fit_probe(states, known, reading.trusted.shares(), swapped)
    # Fits may round otherwise on another processor.
    probe = Probe(*map(processes.first, fit.probe))
    told = ("likeness_auc", "likeness_weight", "match_weight")
    facts = {name: round(getattr(fit, name), 4) for name in told}
    # One row in a hundred lies further out.
    facts["far"] = round(float(probe.distance(states).quantile(0.99)), 4)
    logger.info(
        f"Trusted rows are told from training rows with an AUC of {fit.likeness_auc:.2f}. Likeness to trusted rows "
        f"counts {fit.likeness_weight:.2f} nats per standard deviation, how well an answer matches its question "
        f"{fit.match_weight:.2f}."
    )

    def score(batch: Any) -> Tensor:
        return _first_of_two(probe(mean_states(model, batch, depth)))

    scores = _row_scores("probe", score, depth, reading, others, store)
    scores[rows.ids[sample]] = _first_of_two(processes.first(fit.scores))
    unseen = _first_of_two(processes.first(fit.trusted_scores))
    _check(scores, unseen, "")
    return Opinion(scores, unseen, facts | {"steps": 0, "learning_rate": 0.0, "rows_scored": len(rows)}), probe


def _first_of_two(scores: Tensor) -> Tensor:
    """Scores `[b]`, and 0 for the surprise of the ends, `[b, 2]`."""
    return torch.stack([scores, torch.zeros_like(scores)], dim=-1)


class _Pilot:
    """What trusted rows do to the losses of training rows, seen in a short training of two adapters."""

    def __init__(self, reading: Reading, settings: WeightSettings, seed: int, checkpointing: bool):
        rows, trusted = reading.rows, reading.trusted
        steps = settings.pilot_steps or default_pilot_steps(len(rows))
        self.reading, self.seed = reading, seed
        self.recipe = PilotRecipe(steps, settings.pilot_learning_rate, seed, checkpointing=checkpointing)
        self.held = trusted.held_places(seed)
        self.pulling, self.held_back = trusted.split(seed)
        reading.model.check_logits(rows.batch([0]))
        self.pilot = Pilot(reading.model, self.recipe)
        self.tokens = pilot_tokens(rows, self.pulling, self.recipe) + 2 * sum(rows.lengths)

    def ask(self, store: Store) -> Opinion:
        """Train, and score all rows and the trusted rows that were held back."""
        reading, pilot, recipe = self.reading, self.pilot, self.recipe
        _train(pilot, reading.rows, self.pulling, store, reading.progress)
        unseen = reading.processes.first(trusted_values(self.held_back, pilot.scores))
        scores = _row_scores("pilot-scores", pilot.scores, 2, reading, reading.rows.order(self.seed), store)
        _check(scores, unseen, f"lower `pilot_learning_rate` (now {recipe.learning_rate:g}), or ")
        facts = {"steps": recipe.steps, "learning_rate": recipe.learning_rate, "rows_scored": len(reading.rows)}
        return Opinion(scores, unseen, facts)


def _added(first: Opinion, second: Opinion, kept: Tensor, held: Tensor, held_back: TrustedSets) -> Opinion:
    """Both in one score: the second one counts as much as trusted rows stand out by it.

    `held` (bool `[c]`) says which trusted rows of the first the second has held back.
    """
    known = winsorised(second.scores[kept, 0].double(), second.scores[kept, 0].double())
    level, reach = known.mean(), known.std(unbiased=False).clamp(min=1e-12)
    unseen = (winsorised(second.trusted_scores[:, 0].double(), second.scores[kept, 0].double()) - level) / reach
    weight = opinion_weight(unseen.numpy(), held_back.shares().double().numpy())
    scores, trusted = second.scores.clone(), second.trusted_scores.clone()
    scores[kept, 0] = (first.scores[kept, 0] + weight * (known - level) / reach).float()
    trusted[:, 0] = (first.trusted_scores[held, 0] + weight * unseen).float()
    logger.info(f"What the pilot says counts {weight:.2f} nats per standard deviation.")
    return Opinion(scores, trusted, first.facts | second.facts | {"pilot_weight": round(weight, 4)})


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
    if len(rows) == 1:
        raise ValueError("`train_dataset` has a single usable row: there is nothing to choose from. Give more rows.")
    if len(trusted) < MIN_TRUSTED_ROWS:
        raise ValueError(
            f"`validation_dataset` has {len(trusted)} usable rows; at least {MIN_TRUSTED_ROWS} are needed: they "
            "say what the scores of training rows mean. Give more trusted rows."
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
    name: str, score: Callable[[Any], Tensor], passes: float, reading: Reading, sample: Tensor, store: Store
) -> Tensor:
    """Scores of some rows by the caller's row number, float32 `[count, 2]`; NaN for all others.

    `score` gives those of a batch, in so many `passes` through the model.
    """
    rows, processes, progress = reading.rows, reading.processes, reading.progress
    progress.set_description("Scoring rows")
    scores = torch.zeros(rows.count, 2)
    own = processes.own(rows.batches(sample.tolist(), BATCH_TOKENS, BATCH_ROWS))
    name, done = f"{name}-{processes.rank}", 0
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


def _weigh(
    found: Opinion, kept: Tensor, held_back: TrustedSets, settings: WeightSettings, groups: Tensor | None
) -> tuple[Tensor, Tensor, bool]:
    """Weights of all rows, float32 `[count]`; log weights of those that are kept; whether all weights are equal."""
    scores, shares = found.scores[kept], held_back.shares()
    logits = calibrate(scores[:, 0], found.trusted_scores[:, 0], shares).logits
    logits = logits + ending_logits(scores[:, 1], found.trusted_scores[:, 1], logits.exp(), shares)
    equal = float(logits.max() - logits.min()) == 0
    if equal:
        logger.warning(
            "The scores do not differ, or trusted rows score no better than training rows: there is nothing to select "
            "by, and all rows get the same weight. More trusted rows may help."
        )
        return torch.where(kept, 1.0, torch.nan), logits, True
    z = (scores[:, 0] - scores[:, 0].mean()) / scores[:, 0].std(unbiased=False).clamp(min=1e-8)
    tilted = settings.calibration_sharpness * (logits - logits.max()) + TILT * z.clamp(-5, 5)
    weights = torch.zeros(len(kept))
    weights[kept] = tilted.clamp(-RANGE, RANGE).exp()
    return finished(weights, kept, groups, settings.filter_rate), logits, False


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
