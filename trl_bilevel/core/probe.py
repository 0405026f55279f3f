"""What sets trusted rows apart from training rows: a linear probe on features of the frozen model.

Nobody has said which training rows are bad. But trusted rows look like the good ones: a classifier that tells trusted
rows from *all* training rows ranks good rows above bad ones (positive against unlabelled rows; Elkan and Noto, 2008).
It is logistic regression with an L2 penalty. The strength of the penalty is chosen by how well trusted rows are told
from training rows when neither has been seen, and a row's score comes from a fit that has not seen the row.
"""

import warnings
from typing import NamedTuple

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import KFold
from torch import Tensor

# scikit-learn's C of standardised features, from weak to strong. Among equals the strongest counts. Weaker ones (1e-2)
# ranked worse on every task that was tried.
STRENGTHS = (1e-3, 1e-4, 1e-5)
# Parts of either kind of rows, each scored by a fit on the rest.
FOLDS = 5


class Probe(NamedTuple):
    """A linear score of features.

    Attributes:
        mean, scale, coefficients (`Tensor` float64 `[d]`), intercept (`Tensor` float64 `[]`).
    """

    mean: Tensor
    scale: Tensor
    coefficients: Tensor
    intercept: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """Scores, float32 `[b]`, for features `[b, d]`: larger is more like trusted rows."""
        values = (features.cpu().double() - self.mean) / self.scale @ self.coefficients + self.intercept
        return values.float()


class ProbeFit(NamedTuple):
    """A probe, and what it says of the rows that it was made from.

    Attributes:
        scores, trusted_scores (`Tensor` float32 `[n]`, `[c]`): of the training and of the trusted rows, each by a fit
            that has not seen the row.
        probe (`Probe`): the mean of these fits, for all other rows.
        auc (`float`): area under the ROC curve of unseen trusted rows against unseen training rows; .5 if the two
            cannot be told apart.
        strength (`float`): C.
    """

    scores: Tensor
    trusted_scores: Tensor
    probe: Probe
    auc: float
    strength: float


def fit_probe(features: Tensor, trusted: Tensor, shares: Tensor) -> ProbeFit:
    """Tell trusted rows from training rows.

    Args:
        features, trusted (`Tensor` float `[n, d]`, `[c, d]`): of training rows in random order, and of trusted rows;
            finite.
        shares (`Tensor` float `[c]`): how much each trusted row counts.

    Raises:
        ValueError: if there are fewer than two rows of either kind.
    """
    if len(features) < 2 or len(trusted) < 2:
        raise ValueError(f"The probe needs at least 2 rows of either kind, got {len(features)} and {len(trusted)}.")
    x, y = features.double().cpu().numpy(), trusted.double().cpu().numpy()
    mean, scale = x.mean(0), x.std(0)
    # A feature that does not vary says nothing.
    scale = np.where(scale > 1e-6 * np.abs(mean) + 1e-12, scale, np.inf)
    both = np.concatenate([(x - mean) / scale, (y - mean) / scale])
    basis = None
    if both.shape[1] > len(both):
        # As many directions as there are rows hold all that the fit can see.
        left, sizes, basis = np.linalg.svd(both, full_matrices=False)
        both = left * sizes
    share = shares.double().cpu().numpy()
    counts = np.concatenate([np.full(len(x), 0.5 / len(x)), 0.5 * share / share.sum()]) * len(both)
    found = [(strength, *_cross_fit(both, len(x), counts, strength)) for strength in STRENGTHS]
    is_trusted = np.arange(len(both)) >= len(x)
    aucs = [roc_auc_score(is_trusted, scores, sample_weight=counts) for _, scores, _, _ in found]
    best = max(range(len(found)), key=lambda n: (round(aucs[n], 3), n))
    strength, scores, coefficients, intercept = found[best]
    coefficients = coefficients if basis is None else coefficients @ basis
    parts = (mean, scale, coefficients, np.float64(intercept))
    known = torch.from_numpy(scores).float()
    return ProbeFit(known[: len(x)], known[len(x) :], Probe(*map(torch.as_tensor, parts)), aucs[best], strength)


def _cross_fit(
    both: np.ndarray, rows: int, counts: np.ndarray, strength: float
) -> tuple[np.ndarray, np.ndarray, float]:
    """Score of each row by a fit on the other folds; the mean coefficients and intercept of the fits."""
    is_trusted = np.arange(len(both)) >= rows
    folds = min(FOLDS, rows, len(both) - rows)
    fold = np.empty(len(both), dtype=int)
    for kind in (~is_trusted, is_trusted):
        places = kind.nonzero()[0]
        for number, (_, held) in enumerate(KFold(folds, shuffle=True, random_state=0).split(places)):
            fold[places[held]] = number
    scores, coefficients, intercept = np.empty(len(both)), np.zeros(both.shape[1]), 0.0
    for number in range(folds):
        own = fold != number
        model = LogisticRegression(C=strength, tol=1e-3, max_iter=200)
        with warnings.catch_warnings():
            # Good enough for a ranking; the strength is chosen by what comes of it.
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(both[own], is_trusted[own], sample_weight=counts[own])
        scores[~own] = model.decision_function(both[~own])
        coefficients += model.coef_[0] / folds
        intercept += float(model.intercept_[0]) / folds
    return scores, coefficients, intercept
