"""What hidden states say of rows' weights: a second opinion on scored rows, and the weights of all others."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.calibration import Calibration
from ..core.prediction import (
    TabulatedPredictor,
    WeightPredictor,
    cross_predictions,
    fit_weight_predictor,
    pair_features,
    recalibrated,
    smoothed_logits,
    tabulate,
)
from ..data.rows import Rows
from ..data.trusted import TrustedSets
from .language_model import LanguageModel
from .pilot import BATCH_ROWS, BATCH_TOKENS, trusted_values
from .processes import Processes
from .progress import Progress, tokens_of
from .settings import MIN_SCORED_ROWS

logger = logging.getLogger(__name__)

# Scored rows that fits look at, at most: a random sample, as the work grows with its cube.
FITTED_ROWS = 2048
# After which share of the layers scored rows are read for a second opinion. They are few, and deeper layers say more.
SMOOTHING_DEPTH = 2 / 3


@dataclass
class Prediction:
    """Reads all rows and all trusted rows, fits, and predicts.

    Attributes:
        model: within `left_as_it_was`.
        depth (`float`): share of the layers that predictions rest on.
        seed (`int`): of the order of the rows.
    """

    model: LanguageModel
    rows: Rows
    trusted: TrustedSets
    depth: float
    seed: int
    processes: Processes
    progress: Progress

    def weigh(
        self, scored: Tensor, own: Calibration, sharpness: float = 1.0, further: bool = False
    ) -> tuple[Tensor, float | None, TabulatedPredictor | None]:
        """Weights of all rows: of the scored ones with what rows alike say, of the others as their states predict.

        Cost: a forward without gradient through the lower layers for every row: two thirds of them for scored rows,
        `depth` for the others.

        Args:
            scored (`Tensor` int64 `[n]`): row numbers of the scored rows, a random sample, ascending.
            own (`Calibration`): of their scores.
            sharpness (`float`): of the weights that a predictor of further rows gives, which is made if `further`.

        Returns:
            Weights float32 `[count]` of the caller's rows, between `FLOOR` and 1, 0 for dropped rows; the share of
            the weights' variance that rows alike explain, None if weights are not smoothed; the predictor.
        """
        # In the order by content: results do not depend on the caller's, and the first rows are a random sample.
        order = self.rows.order(self.seed)
        known = torch.isin(self.rows.ids[order], scored)
        places, others = order[known], order[~known]
        ids = self.rows.ids[places]
        logits = torch.zeros(self.rows.count)
        logits[scored] = own.logits.float().cpu()
        own = own._replace(logits=logits[ids])
        weights = own_weights = own.logits.exp()
        smooths = len(ids) >= MIN_SCORED_ROWS and bool(weights.max() > weights.min())
        depths = [*([self.depth] if len(others) else []), *([SMOOTHING_DEPTH] if smooths else [])]
        fitted = places[:FITTED_ROWS]
        features = self.read(fitted, depths, "Reading scored rows")
        smoothing = None
        if smooths:
            second, explained = cross_predictions(features[-1], own_weights[: len(fitted)])
            smoother = fit_weight_predictor(features[-1], own_weights[: len(fitted)])
            rest = self._predict(smoother, places[len(fitted) :], SMOOTHING_DEPTH)
            trusted = self._trusted(smoother, SMOOTHING_DEPTH)
            weights = smoothed_logits(own, torch.cat([second, rest]), trusted, explained, self.trusted.shares()).exp()
            smoothing = explained if explained > 0 else None
            logger.info(
                f"Rows that look like it explain {max(0.0, explained):.0%} of the variance of a row's weight "
                f"({len(ids)} scored rows): their weights take that into account."
            )
        out = torch.zeros(self.rows.count)
        out[ids] = weights
        predictor = None
        if len(others):
            # On weights by own scores: smoothed ones are a function of states themselves, and easier to explain.
            fit = fit_weight_predictor(features[0], own_weights[: len(fitted)])
            predicted, trusted = self._predict(fit, others, self.depth), self._trusted(fit, self.depth)
            found = recalibrated(predicted, trusted, float(weights.mean()), self.trusted.shares())
            out[self.rows.ids[others]] = found
            self._tell(fit, len(ids), len(others))
            predictor = tabulate(fit.linear, predicted, found**sharpness) if further else None
        return self.processes.first(out), smoothing, predictor

    def _tell(self, fit: WeightPredictor, scored: int, others: int) -> None:
        logger.info(
            f"Weights of {others} rows are predicted from those of {scored} scored ones: typical error "
            f"{fit.error:.2f} of the largest weight, {max(0.0, fit.explained):.0%} of the variance explained."
        )
        if fit.explained < 0.1:
            logger.warning(
                f"The weights of the {scored} scored rows can hardly be predicted ({fit.explained:.0%} of the "
                "variance explained): the other rows get nearly equal weights. Raise `pilot_scored_rows`, or set it "
                "to 0."
            )

    def read(self, places: Tensor, depths: Sequence[float], stage: str) -> list[Tensor]:
        """Features float32 `[n, 2 d]` of rows at each depth; every process has all of them, to the last bit."""
        if not depths or len(places) == 0:
            return []
        out: list[Tensor] = []
        line = {place: n for n, place in enumerate(places.tolist())}
        for batch, found in self._passes(places, depths, stage):
            out = out or [torch.zeros(len(places), part.shape[1]) for part in found]
            for all_rows, part in zip(out, found, strict=True):
                all_rows[[line[place] for place in batch]] = part
        # A process without rows still takes part in the sum.
        width = 2 * self.model.base.config.get_text_config().hidden_size
        return [self.processes.sum(part) for part in out or [torch.zeros(len(places), width) for _ in depths]]

    def _predict(self, fit: WeightPredictor, places: Tensor, depth: float) -> Tensor:
        """What is predicted for rows, float32 `[n]`."""
        out = torch.zeros(len(self.rows))
        for batch, found in self._passes(places, [depth], "Predicting weights"):
            out[batch] = fit(*found)
        return self.processes.sum(out)[places]

    def _passes(self, places: Tensor, depths: Sequence[float], stage: str) -> Any:
        """This process's batches of rows, and their features."""
        self.progress.set_description(stage)
        batches = self.rows.batches(places.tolist(), BATCH_TOKENS, BATCH_ROWS)
        for batch in self.processes.own(batches):
            yield batch, features(self.model, self.rows.batch(batch), depths)
            self.progress.done(max(depths) * tokens_of(self.rows.lengths, batch) * self.processes.count)

    def _trusted(self, fit: WeightPredictor, depth: float) -> Tensor:
        """What is predicted for the trusted rows, float32 `[c]`; the same on every process."""
        values = trusted_values(self.trusted, lambda batch: fit(*features(self.model, batch, [depth])))
        return self.processes.first(values)


def features(model: LanguageModel, batch: Mapping[str, Any], depths: Sequence[float]) -> list[Tensor]:
    """`core.prediction.pair_features` of hidden states, float32 `[b, 2 d]` on the CPU for each depth."""
    states = model.states(batch, depths)
    answer = (batch["labels"] != -100).to(states[0].device)
    prompt = batch["attention_mask"].to(states[0].device).bool() & ~answer
    return [pair_features(_mean(each, prompt), _mean(each, answer)).cpu() for each in states]


def _mean(states: Tensor, tokens: Tensor) -> Tensor:
    """Mean state of some tokens of each row, `[b, d]`; zero where there is none."""
    return (states * tokens.unsqueeze(-1)).sum(1) / tokens.sum(1, keepdim=True).clamp(min=1)


def prediction_tokens(rows: Rows, scored: int, depth: float) -> float:
    """About how many tokens pass through the model for `weigh`, a whole forward counted once."""
    share = scored / max(1, len(rows))
    return sum(rows.lengths) * (share * SMOOTHING_DEPTH + (1 - share) * depth)
