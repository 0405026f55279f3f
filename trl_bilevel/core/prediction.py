"""What rows say of each other: weights of rows that were not scored, and less noise in those of rows that were.

Bad rows look alike: a linear map from what the frozen model thinks of a row (a pooled hidden state) to its weight,
fitted on a few hundred scored rows, ranks the others nearly as well as scoring them (docs/results.md;
relatives: MATES, DataRater). For a scored row, what the other rows make it expect is a second opinion beside its own
score.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import KFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from .calibration import FLOOR, Calibration, calibrate
from .statistics import evenly_spaced

# Strengths of the ridge penalty that leave-one-out errors choose from.
PENALTIES = np.logspace(1, 6, 11)
# Probability of being good that the second opinion on a row gives at most, and of being bad.
SURE = 0.95
# Parts of the scored rows, each predicted from the others.
FOLDS = 10


@dataclass(frozen=True)
class WeightPredictor:
    """Predicts weights from features.

    Attributes:
        error (`float`): root mean square of the leave-one-out errors: how far a predicted weight is off.
        explained (`float`): share of the weights' variance that leave-one-out predictions explain; 0 or less if the
            features say nothing, and then all predictions are near the mean weight.
    """

    model: Any
    error: float
    explained: float

    def __call__(self, features: Tensor) -> Tensor:
        """Predicted weights, float32 `[b]`, for features `[b, d]`. Not bounded; see `recalibrated`."""
        return torch.from_numpy(self.model.predict(features.double().cpu().numpy())).float()

    @property
    def linear(self) -> tuple[Tensor, ...]:
        """Mean and scale of the features, coefficients and intercept, float64."""
        scaler, ridge = self.model[0], self.model[-1]
        return tuple(map(torch.as_tensor, (scaler.mean_, scaler.scale_, ridge.coef_.ravel(), float(ridge.intercept_))))


@dataclass(frozen=True)
class TabulatedPredictor:
    """A predictor and what its predictions mean, as plain tensors: weights of any row at any time, from features.

    Attributes:
        mean, scale, coefficients (`Tensor` float64 `[d]`), intercept (`Tensor` float64 `[]`): the linear map.
        knots, weights (`Tensor` float64 `[k]`): weights for predictions, linear between the knots, constant beyond.
    """

    mean: Tensor
    scale: Tensor
    coefficients: Tensor
    intercept: Tensor
    knots: Tensor
    weights: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """Weights, float32 `[b]`, for features `[b, d]`; mean one over the rows that `tabulate` saw."""
        predicted = (features.double() - self.mean) / self.scale @ self.coefficients + self.intercept
        right = torch.searchsorted(self.knots, predicted).clamp(1, len(self.knots) - 1)
        low, high = self.knots[right - 1], self.knots[right]
        share = ((predicted - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
        return torch.lerp(self.weights[right - 1], self.weights[right], share).float()


def tabulate(linear: Sequence[Tensor], predicted: Tensor, weights: Tensor, knots: int = 256) -> TabulatedPredictor:
    """What a linear map says, turned into weights as it was for a sample of rows.

    `linear` holds mean and scale of the features, coefficients and intercept; `predicted` and `weights` (float32
    `[n]`) are its values for the sample, and what calibration made of them.
    """
    order = torch.argsort(predicted)
    chosen = order[evenly_spaced(len(order), knots)]
    made = weights[chosen].double() / weights.double().mean()
    mean, scale, coefficients, intercept = (part.double() for part in linear)
    return TabulatedPredictor(mean, scale, coefficients, intercept, predicted[chosen].double(), made)


def pair_features(prompt: Tensor, answer: Tensor) -> Tensor:
    """What a row's weight is predicted from: its answer, and how the answer goes with the question, `[b, 2 d]`.

    A linear map of the answer's state alone sees answers that are bad whatever was asked; whether they fit shows in
    the product: without it, as good features need more layers.

    Args:
        prompt, answer (`Tensor` float `[b, d]`): mean hidden states of a row's prompt and of its scored tokens.
    """
    return torch.cat([answer, answer * prompt], dim=1)


def recalibrated(
    predicted: Tensor, trusted: Tensor, mean_weight: float, trusted_weights: Tensor | None = None
) -> Tensor:
    """Weights from predicted ones, by what is predicted for trusted rows.

    A regression draws its predictions to the mean, so predicted weights are too equal. The predictor has never seen
    the trusted rows, so what it says of them calibrates it like a score: predicted weights then hold as much of their
    mass on good rows as scored ones (59% each on 1,280 rows, docs/results.md).

    Args:
        predicted, trusted (`Tensor` float32 `[N]`, `[c]`): of rows that were not scored, and of trusted rows.
        mean_weight (`float`): mean weight of the scored rows, a random sample of the same rows.
        trusted_weights (`Tensor` float32 `[c]`, *optional*): how much each trusted row counts; equal by default.

    Returns:
        `Tensor` float32 `[N]`: between `FLOOR` and 1, with mean `mean_weight` unless that takes weights over 1.
    """
    weights = calibrate(predicted, trusted, trusted_weights).logits.exp()
    return (weights * (mean_weight / float(weights.mean()))).clamp(FLOOR, 1.0)


def smoothed_logits(
    own: Calibration, second: Tensor, trusted: Tensor, explained: float, trusted_weights: Tensor | None = None
) -> Tensor:
    """Log weights of scored rows, with what the other rows say of them.

    A score is one noisy look at a row. The weight that the other rows lead to expect (`cross_predictions`) is another
    one, with an error of its own; calibrated like a score, it is a second density ratio. Both give the odds of being
    good, and odds are multiplied (naive Bayes): a row whose own score leaves no doubt keeps its weight, and where the
    own scores tell little the second opinion decides. It is never surer than `SURE`, and raised to the root of the
    variance that it explains: where features say nothing, the weights stay as they are.

    Args:
        own (`Calibration`): of the rows' own scores, `[n]`; other factors of the weights may be in its logits.
        second, trusted (`Tensor` float32 `[n]`, `[c]`): weights predicted for the same rows, and for trusted rows.
        explained (`float`): share of the weights' variance that `second` explains; no effect at 0 or less.
        trusted_weights (`Tensor` float32 `[c]`, *optional*): how much each trusted row counts; equal by default.

    Returns:
        `Tensor` float32 `[n]`: between `log(FLOOR)` and 0, the largest 0 (`own.logits` without effect).
    """
    if explained <= 0:
        return own.logits
    other = calibrate(second, trusted, trusted_weights)
    # Each knows an upper bound of the share of good rows.
    share = min(own.good_share, other.good_share, 1 - FLOOR)
    good = (own.logits.exp() * (share / own.good_share)).clamp(FLOOR, 1 - FLOOR)
    good_too = (other.logits.to(good).exp() * (share / other.good_share)).clamp(1 - SURE, SURE)
    prior = math.log(share / (1 - share))
    together = torch.sigmoid(torch.logit(good) + explained**0.5 * (torch.logit(good_too) - prior)).log()
    return (together - together.max()).clamp(min=math.log(FLOOR))


def cross_predictions(features: Tensor, weights: Tensor) -> tuple[Tensor, float]:
    """Weight of each row as predicted from the others: in `FOLDS` parts, each by a fit on the rest.

    Takes what `fit_weight_predictor` takes, rows in random order. Returns the predictions, float32 `[n]`, and the
    share of the weights' variance that they explain (0 or less if nothing).
    """
    x, y = _arrays(features, weights, least=4)
    predicted = cross_val_predict(_regression(), x, y, cv=KFold(min(FOLDS, len(y) // 2)))
    return torch.from_numpy(predicted).float(), _explained(y, ((y - predicted) ** 2).mean())


def fit_weight_predictor(features: Tensor, weights: Tensor) -> WeightPredictor:
    """Ridge regression of weights `[n]` on features `[n, d]`, the penalty chosen by leave-one-out errors.

    Weights, not their logarithms: a least-squares prediction is then the expected weight given the features, the
    posterior of being good up to the scale, so rows that the features do not tell apart share their mean weight.
    """
    x, y = _arrays(features, weights, least=2)
    model = _regression().fit(x, y)
    errors = model[-1].cv_results_.reshape(len(y), -1).mean(0).min()
    return WeightPredictor(model, float(errors**0.5), _explained(y, errors))


def _explained(y: np.ndarray, squared_error: Any) -> float:
    variance = float(y.var())
    return 1 - float(squared_error) / variance if variance > 0 else 0.0


def _arrays(features: Tensor, weights: Tensor, least: int) -> tuple[np.ndarray, np.ndarray]:
    if len(features) != len(weights) or len(weights) < least:
        raise ValueError(
            f"Needs features and weights of the same rows, at least {least}; got {len(features)}, {len(weights)}."
        )
    if not bool(torch.isfinite(features).all() and torch.isfinite(weights).all()):
        raise ValueError("Needs finite features and weights; got NaN or infinite ones.")
    return features.double().cpu().numpy(), weights.double().cpu().numpy()


def _regression() -> Any:
    return make_pipeline(StandardScaler(), RidgeCV(alphas=PENALTIES, store_cv_results=True))
