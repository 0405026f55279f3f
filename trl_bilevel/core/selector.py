"""The published selector: weights of the rows that move with every training step, by the scores of its batch.

One fp32 logit `s_k` per row, and weights `w_k = N exp(s_k) / sum_j exp(s_j)`: the mean weight over the `N` rows is
one, and equal logits give weight one exactly (arXiv 2511.21056, the selector of the bilevel data selection problem;
normalised to mean one so that uniform weights are plain fine-tuning).

The sum over rows that the weights need is kept up to date by the change of the batch, in float64: a sparse update
costs O(batch), whatever the number of rows. The state lives on the CPU.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# Logits are kept in a range where exp() of a difference is finite in float32 and float64 sums lose nothing that
# matters.
LOGIT_BOUND = 20.0
# Scores are relative differences of losses (or losses): a spread below this is rounding, not signal, and must not be
# blown up to unit size. At the first steps both ends of a difference are still the same.
SCORE_RESOLUTION = 1e-4


@dataclass
class SelectorState:
    """Everything the selector holds: 8 bytes per row (16 with moments) and a few scalars.

    Attributes:
        logits (`Tensor` float32 `[N]`): one per row; `-inf` marks a row that is not trained on.
        score_mean (`Tensor` float32 `[N]`): running mean of the row's standardised scores, NaN before the first one.
        total (`Tensor` float64 `[2]`): sum of `exp(logits)`, and the number of rows that are trained on.
        score_stats (`Tensor` float64 `[2]`): running mean and variance of the raw scores, NaN before the first batch.
        step, changed (`Tensor` int64 `[]`): updates done; logits changed since the sum was last computed afresh.
        moments (`Tensor` float32 `[2, N]`, *optional*): Adam's first and second moment, for `update_adam` only.
    """

    logits: Tensor
    score_mean: Tensor
    total: Tensor
    score_stats: Tensor
    step: Tensor
    changed: Tensor
    moments: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """All state as named tensors."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `tensors()` gave, in place; refuse other names or shapes."""
        own = self.tensors()
        if {k: tuple(v.shape) for k, v in own.items()} != {k: tuple(v.shape) for k, v in tensors.items()}:
            raise ValueError(
                "The saved selector does not fit: it belongs to other training data or to another `selector_preset`."
            )
        for name, value in own.items():
            value.copy_(tensors[name])


def init_selector(active: Tensor, adam: bool = False) -> SelectorState:
    """A uniform selector of the `active` rows (bool `[N]`); with the moments that `update_adam` needs, if asked."""
    if not bool(active.any()):
        raise ValueError("The selector needs at least one row to weigh, got none.")
    logits = torch.zeros(active.shape).masked_fill_(~active, -torch.inf)
    count = float(active.sum())
    return SelectorState(
        logits=logits,
        score_mean=torch.full_like(logits, torch.nan),
        total=torch.tensor([count, count], dtype=torch.float64),
        score_stats=torch.full((2,), torch.nan, dtype=torch.float64),
        step=torch.zeros((), dtype=torch.int64),
        changed=torch.zeros((), dtype=torch.int64),
        moments=torch.zeros(2, *logits.shape) if adam else None,
    )


def refresh_total(state: SelectorState) -> None:
    """Compute the sum over all rows afresh: O(N), so only once in at least N changes."""
    state.total[0] = state.logits.double().exp().sum()
    state.changed.zero_()


def sample_weights(state: SelectorState, rows: Tensor | slice) -> Tensor:
    """Weights float32 `[b]` of the given rows, of mean one over all rows; zero for rows that are not trained on."""
    return (state.logits[rows].double().exp() * (state.total[1] / state.total[0])).float()


def standardise(state: SelectorState, scores: Tensor, momentum: float = 0.9) -> Tensor:
    """Scores float32 `[b]` centred and scaled by running statistics, which then take this batch in.

    Running statistics, not the batch's own, so that a batch of one row moves its weight too.
    """
    scores = scores.double()
    mean, var = scores.mean(), scores.var(unbiased=False)
    first = torch.isnan(state.score_stats[0])
    old_mean = torch.where(first, mean, state.score_stats[0])
    old_var = torch.where(first, var, state.score_stats[1])
    new_mean = momentum * old_mean + (1 - momentum) * mean
    new_var = momentum * old_var + (1 - momentum) * (var + (mean - old_mean) ** 2)
    state.score_stats.copy_(torch.stack([new_mean, new_var]))
    return ((scores - new_mean) / (new_var.sqrt() + SCORE_RESOLUTION)).float()


def update_sparse_centred(
    state: SelectorState, rows: Tensor, scores: Tensor, *, learning_rate: float, entropy_coef: float
) -> None:
    """Move the logits of the rows in the batch by their standardised score, and pull them towards uniform.

    `s_k <- (1 - entropy_coef) s_k + learning_rate z_k` for the rows of the batch only. The pull is the gradient step
    of the negative entropy for logits near zero; without it weights collapse (ESS to 1), since one useful row is
    enough to attain the bilevel optimum.

    Args:
        rows (`Tensor` int64 `[b]`): rows of the batch; repeated rows count once, with their mean score.
        scores (`Tensor` float32 `[b]`): larger means that training on the row helps the validation loss more.
    """
    rows, z = _take_scores(state, rows, scores)
    old = state.logits[rows]
    new = ((1 - entropy_coef) * old + learning_rate * z).clamp(-LOGIT_BOUND, LOGIT_BOUND)
    state.total[0] += (new.double().exp() - old.double().exp()).sum()
    state.logits[rows] = new
    # When a large weight leaves, the sum keeps its rounding: compute it afresh once in N changes.
    state.changed += len(rows)
    if int(state.changed) >= len(state.logits):
        refresh_total(state)
    state.step += 1


def minibatch_gradient(state: SelectorState, rows: Tensor, losses: Tensor) -> Tensor:
    """Gradient of the weighted minibatch loss `(1/B) sum_{i in B} w_i loss_i` by all logits, float32 `[N]`.

    `d/ds_k = (N/B) p_k (1[k in B] loss_k - sum_{i in B} p_i loss_i)` with `p = softmax(s)`. Dense in `k`.
    """
    p = state.logits.double().exp() / state.total[0]
    weighted = p[rows] * losses.double()
    grad = (-p * weighted.sum()).index_add(0, rows, weighted)
    return (grad * state.total[1] / rows.numel()).float()


def update_adam(
    state: SelectorState, rows: Tensor, scores: Tensor, *, learning_rate: float, betas: tuple[float, float]
) -> None:
    """Adam on the dense gradient of `-(1/B) sum w_i score_i`.

    The update of the authors' code, kept to reproduce it: O(N) per step, 8 more bytes per row, and all logits drift
    since Adam normalises the tiny push that every off-batch logit gets.
    """
    assert state.moments is not None
    _take_scores(state, rows, scores)
    grad = minibatch_gradient(state, rows, -scores)
    state.step += 1
    first, second = state.moments
    first.lerp_(grad, 1 - betas[0])
    second.lerp_(grad * grad, 1 - betas[1])
    corrected = first / (1 - betas[0] ** state.step)
    scale = (second / (1 - betas[1] ** state.step)).sqrt() + 1e-8
    state.logits -= learning_rate * corrected / scale
    refresh_total(state)


def _take_scores(state: SelectorState, rows: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """The different rows of a batch and their standardised scores, which `score_mean` takes in.

    Rows may repeat, as the dataloader pads the last batch of several processes: then a score is their mean.
    """
    unique, place = rows.unique(return_inverse=True)
    values = standardise(state, scores)
    z = torch.zeros(len(unique), dtype=values.dtype).index_add_(0, place, values) / torch.bincount(place)
    old = state.score_mean[unique]
    state.score_mean[unique] = torch.where(torch.isnan(old), z, 0.5 * old + 0.5 * z)
    return unique, z
