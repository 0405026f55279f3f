"""Two opinions on a row from the hidden states of the frozen model, and one score from both. Nothing is trained.

*Likeness.* Nobody has said which training rows are bad. But trusted rows look like the good ones: a classifier that
tells trusted rows from *all* training rows ranks good rows above bad ones (positive against unlabelled rows; Elkan and
Noto, 2008).

*Match.* Does the answer belong to its question? A second classifier tells the training rows as they are from the same
questions with answers of other rows. It needs no trusted row, so it says the same whatever topic they are about; and
it sees rows that likeness does not: good answers to another question.

Both are logistic regressions with an L2 penalty. The score is their weighted sum: an opinion counts as much as trusted
rows that it has not seen stand out by it (`opinion_weight`). Where they match no better than training rows do, the
match does not count at all.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import KFold
from torch import Tensor

from .statistics import evenly_spaced

# scikit-learn's C of standardised features, times the number of training rows in the fit. From half to four times as
# much was tried, and ranks as well within noise (docs/method.md). A choice by held-out trusted rows does worse where
# these are of another topic: the weaker the penalty, the better the topic is told.
STRENGTH = 0.2
# Parts of either kind of rows, each scored by a fit on the rest.
FOLDS = 5
# The spread of trusted rows, in standard deviations of the training rows, before any is seen; and how many rows that
# counts for.
PRIOR_SPREAD, PRIOR_ROWS = 0.5, 4.0


class Probe(NamedTuple):
    """A score of rows: linear in the states of the answer, of the prompt, and their product.

    Attributes:
        mean, scale (`Tensor` float64 `[2 d]`): of the states.
        coefficients (`Tensor` float64 `[3 d]`), intercept (`Tensor` float64 `[]`).
    """

    mean: Tensor
    scale: Tensor
    coefficients: Tensor
    intercept: Tensor

    def __call__(self, states: Tensor) -> Tensor:
        """Scores, float32 `[b]`, for states `[b, 2 d]`: larger is better."""
        values = _expand(states.cpu().double(), self.mean, self.scale) @ self.coefficients + self.intercept
        return values.float()

    def distance(self, states: Tensor) -> Tensor:
        """How far states `[b, 2 d]` lie from those that the probe was made from, float32 `[b]`: 1 on average there."""
        return ((states.cpu().double() - self.mean) / self.scale).square().mean(1).float()


class ProbeFit(NamedTuple):
    """A probe, and what it says of the rows that it was made from.

    Attributes:
        scores, trusted_scores (`Tensor` float32 `[n]`, `[c]`): of the training and of the trusted rows, each by fits
            that have not seen the row.
        probe (`Probe`): the mean of these fits, for all other rows.
        likeness_auc (`float`): area under the ROC curve of unseen trusted rows against unseen training rows, by
            likeness; .5 if the two cannot be told apart.
        likeness_weight, match_weight (`float`): what either counts, in nats per standard deviation.
    """

    scores: Tensor
    trusted_scores: Tensor
    probe: Probe
    likeness_auc: float
    likeness_weight: float
    match_weight: float


class Mismatched(NamedTuple):
    """States of training rows with the answers of other rows.

    Attributes:
        states (`Tensor` float `[m, 2 d]`).
        questions, answers (`Tensor` int64 `[m]`): the training row that each has the question and the answer of.
    """

    states: Tensor
    questions: Tensor
    answers: Tensor


def fit_probe(rows: Tensor, trusted: Tensor, shares: Tensor, mismatched: Mismatched | None = None) -> ProbeFit:
    """Score rows by likeness and match.

    Args:
        rows, trusted (`Tensor` float `[n, 2 d]`, `[c, 2 d]`): mean hidden states of the answer and of the prompt, one
            after the other; of training rows in random order, and of trusted rows; finite.
        shares (`Tensor` float `[c]`): how much each trusted row counts.
        mismatched ([`Mismatched`], *optional*): without it, or with too few rows, the score is likeness alone.

    Raises:
        ValueError: if there are fewer than two rows of either kind.
    """
    if len(rows) < 2 or len(trusted) < 2:
        raise ValueError(f"The probe needs at least 2 rows of either kind, got {len(rows)} and {len(trusted)}.")
    mean, scale = (_tensor(part) for part in _moments(rows.double().cpu().numpy()))
    x, y = (_expand(part.double().cpu(), mean, scale).numpy() for part in (rows, trusted))
    middle, spread = _moments(x)
    x, y = (x - middle) / spread, (y - middle) / spread
    share = shares.double().cpu().numpy()
    folds = min(FOLDS, len(x), len(y))
    fold = _folds(len(x), folds)
    opinions = [_likeness(x, y, share, fold, _folds(len(y), folds))]
    if mismatched is not None and len(mismatched.states) >= 2 * folds:
        swapped = (_expand(mismatched.states.double().cpu(), mean, scale).numpy() - middle) / spread
        opinions.append(_match(x, y, swapped, mismatched, fold))
    scores, trusted_scores, total = (np.zeros(size) for size in (len(x), len(y), x.shape[1]))
    constant, weights = 0.0, []
    for opinion in opinions:
        level, reach = opinion.rows.mean(), max(float(opinion.rows.std()), 1e-12)
        weight = opinion_weight((opinion.trusted - level) / reach, share)
        scores += weight * (opinion.rows - level) / reach
        trusted_scores += weight * (opinion.trusted - level) / reach
        total += weight / reach * opinion.coefficients
        constant += weight / reach * (opinion.intercept - level)
        weights.append(weight)
    auc = roc_auc_score(
        np.arange(len(x) + len(y)) >= len(x),
        np.concatenate([opinions[0].rows, opinions[0].trusted]),
        sample_weight=np.concatenate([np.full(len(x), 1 / len(x)), share / share.sum()]),
    )
    probe = Probe(mean, scale, _tensor(total / spread), _tensor(constant - float(total @ (middle / spread))))
    match = weights[1] if len(weights) > 1 else 0.0
    return ProbeFit(_tensor(scores).float(), _tensor(trusted_scores).float(), probe, float(auc), weights[0], match)


def opinion_weight(trusted: NDArray[Any], share: NDArray[Any]) -> float:
    """What an opinion counts, in nats per standard deviation; 0 or more.

    It is Fisher's discriminant: the log odds of two normal distributions of one variance rise by the distance of their
    means over that variance. Trusted rows show both, their mean `m` and their variance, where training rows have mean
    0. `m` is shrunk by what it would be by chance (James and Stein, the positive part), and the variance is drawn to
    `PRIOR_SPREAD` by `PRIOR_ROWS` rows: a few trusted rows prove little.

    Args:
        trusted (array float `[c]`): what the opinion says of trusted rows that it has not seen, standardised by what
            it says of training rows.
        share (array float `[c]`): how much each trusted row counts.
    """
    share = share / share.sum()
    count, mean = 1 / float((share**2).sum()), float((share * trusted).sum())
    squares = count * float((share * (trusted - mean) ** 2).sum())
    variance = (squares + PRIOR_ROWS * PRIOR_SPREAD**2) / (count - 1 + PRIOR_ROWS)
    return max(0.0, mean - variance / count / mean) / variance if mean > 0 else 0.0


class _Opinion(NamedTuple):
    """What fits say of rows that they have not seen, `[n]` and `[c]`; mean coefficients `[3 d]` and intercept."""

    rows: NDArray[Any]
    trusted: NDArray[Any]
    coefficients: NDArray[Any]
    intercept: float


def _likeness(
    x: NDArray[Any], y: NDArray[Any], share: NDArray[Any], fold: NDArray[Any], own: NDArray[Any]
) -> _Opinion:
    # The state of a prompt alone says what is asked, not how it is answered.
    width = x.shape[1] // 3
    used = np.r_[0:width, 2 * width : 3 * width]
    both, is_trusted = np.concatenate([x, y])[:, used], np.arange(len(x) + len(y)) >= len(x)
    counts = np.concatenate([np.full(len(x), 0.5 / len(x)), 0.5 * share / share.sum()]) * len(both)
    place = np.concatenate([fold, own])
    total = np.zeros(x.shape[1])
    found, total[used], intercept = _cross_fit(both, is_trusted, counts, place, place, STRENGTH / len(x))
    return _Opinion(found[: len(x)], found[len(x) :], total, intercept)


def _match(
    x: NDArray[Any], y: NDArray[Any], swapped: NDArray[Any], made_of: Mismatched, fold: NDArray[Any]
) -> _Opinion:
    both, is_own = np.concatenate([x, swapped]), np.arange(len(x) + len(swapped)) < len(x)
    counts = np.where(is_own, 1.0, len(x) / len(swapped))
    question, answer = (np.concatenate([fold, fold[part.numpy()]]) for part in made_of[1:])
    found, total, intercept = _cross_fit(both, is_own, counts, question, answer, STRENGTH / len(x))
    return _Opinion(found[: len(x)], y @ total + intercept, total, intercept)


def _cross_fit(
    x: NDArray[Any],
    labels: NDArray[Any],
    counts: NDArray[Any],
    fold: NDArray[Any],
    also: NDArray[Any],
    strength: float,
) -> tuple[NDArray[Any], NDArray[Any], float]:
    """Logistic regressions, each on the rows of which neither `fold` nor `also` is the one left out.

    Returns what is said of each row by the fit that leaves its `fold` out, `[n]`; mean coefficients and intercept. A
    fit with one class only says nothing.
    """
    found, total, intercept, folds = np.zeros(len(x)), np.zeros(x.shape[1]), 0.0, int(fold.max()) + 1
    for n in range(folds):
        seen, held = (fold != n) & (also != n), fold == n
        if labels[seen].all() or not labels[seen].any():
            continue
        with warnings.catch_warnings():
            # Good enough for a ranking.
            warnings.simplefilter("ignore", ConvergenceWarning)
            model = LogisticRegression(C=strength, tol=1e-3, max_iter=200)
            model.fit(x[seen], labels[seen], sample_weight=counts[seen])
        found[held] = model.decision_function(x[held])
        total += model.coef_[0] / folds
        intercept += float(model.intercept_[0]) / folds
    return found, total, intercept


def _folds(count: int, folds: int) -> NDArray[Any]:
    """Which fold each row is in, at random, int `[count]`."""
    fold = np.empty(count, dtype=int)
    for number, (_, held) in enumerate(KFold(folds, shuffle=True, random_state=0).split(np.arange(count))):
        fold[held] = number
    return fold


def _moments(x: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Mean and standard deviation of columns; an infinite one where a column does not vary, and says nothing."""
    mean, scale = x.mean(0), x.std(0)
    return mean, np.where(scale > 1e-6 * np.abs(mean) + 1e-12, scale, np.inf)


def _expand(states: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """Standardised states of answer and prompt, and their product, `[b, 3 d]`.

    The product shows how the answer goes with the prompt, which neither state does alone. Its parts are standardised:
    else a few wide dimensions are all of it.
    """
    answer, prompt = ((states - mean) / scale).chunk(2, dim=1)
    return torch.cat([answer, prompt, answer * prompt], dim=1)


def _tensor(values: Any) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


class Scorer(NamedTuple):
    """Weights of any row at any time: a probe, and what its scores mean.

    Attributes:
        probe (`Probe`).
        knots, weights (`Tensor` float64 `[k]`): weights at some scores; linear between them, constant beyond.
    """

    probe: Probe
    knots: Tensor
    weights: Tensor

    def __call__(self, states: Tensor) -> Tensor:
        """Weights, float32 `[b]`, for states `[b, 2 d]`; mean one over the rows that `tabulate` saw."""
        scores = self.probe(states).double()
        right = torch.searchsorted(self.knots, scores).clamp(1, len(self.knots) - 1)
        low, high = self.knots[right - 1], self.knots[right]
        share = ((scores - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
        return torch.lerp(self.weights[right - 1], self.weights[right], share).float()

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """All of it, for a file."""
        parts = self.probe._asdict() | {"knots": self.knots, "weights": self.weights}
        return {prefix + name: value for name, value in parts.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], prefix: str = "") -> Scorer:
        """Restore what `tensors` gave."""
        probe = Probe(*(tensors[prefix + name] for name in Probe._fields))
        return cls(probe, tensors[prefix + "knots"], tensors[prefix + "weights"])


def tabulate(probe: Probe, scores: Tensor, weights: Tensor, knots: int = 256) -> Scorer:
    """What a probe says, turned into weights as it was for a sample of rows, float32 `[n]` of either."""
    order = torch.argsort(scores)
    chosen = order[evenly_spaced(len(order), knots)]
    return Scorer(probe, scores[chosen].double(), weights[chosen].double() / weights.double().mean())
