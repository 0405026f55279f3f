"""The selector: explicit weights of the offline rows, learned from scores.

One fp32 logit `s_k` per *unit* (a row, or a group of rows). With an activation `a` (softmax: `exp`, sigmoid: the
logistic function) the weight of every row of unit `k` is `w_k = N a(s_k) / sum_j n_j a(s_j)`, where `n_j` is the
number of rows of unit `j` and `N = sum_j n_j`: the mean weight over the rows is one, and equal logits give weight one
exactly (arXiv 2511.21056, the selector of the bilevel data selection problem; normalised to mean one so that uniform
weights are plain fine-tuning).

The sums over units that the weights need are kept up to date by the change of the batch, in float64: an update costs
O(batch), whatever the number of rows. All functions are pure tensor code, on any device, without host-device syncs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

Activation = Literal["softmax", "sigmoid"]

# Logits are kept in a range where exp() of a difference is finite in float32 and float64 sums lose nothing that
# matters.
LOGIT_BOUND = 20.0
# Scores are relative differences of losses (or losses): a spread below this is rounding, not signal, and must not be
# blown up to unit size. At the first steps both ends of a difference are still the same.
SCORE_RESOLUTION = 1e-4


def log_activation(logits: Tensor, activation: Activation) -> Tensor:
    """Logarithm of the unnormalised weight, elementwise, in the dtype of `logits`."""
    return logits if activation == "softmax" else torch.nn.functional.logsigmoid(logits)


@dataclass
class SelectorState:
    """Everything the selector holds: 8 bytes per unit (plus 8 per *group* if units are groups) and a few scalars.

    Attributes:
        logits (`Tensor` float32 `[U]`): one logit per unit; `-inf` marks a unit without rows to train on.
        score_mean (`Tensor` float32 `[U]`): running mean of the unit's standardised scores, NaN before the first one.
        totals (`Tensor` float64 `[4]`): sums over units of `n a`, `n a^2`, `n a log a`, and the number of rows `N`.
        score_stats (`Tensor` float64 `[2]`): running mean and variance of the raw scores, NaN before the first batch.
        rows (`Tensor` int64 `[U]`, *optional*): rows per unit, for groups; `None` means one row each.
        moments (`Tensor` float32 `[2, U]`, *optional*): Adam's first and second moment, for `update_adam` only.
        step (`Tensor` int64 `[]`): number of updates done.
        since_refresh (`int`): logits changed since the sums were last computed afresh.
    """

    logits: Tensor
    score_mean: Tensor
    totals: Tensor
    score_stats: Tensor
    rows: Tensor | None = None
    moments: Tensor | None = None
    step: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64))
    since_refresh: int = 0
    activation: Activation = "softmax"

    def tensors(self) -> dict[str, Tensor]:
        """All state as named tensors, for a safetensors file."""
        out = {
            "logits": self.logits,
            "score_mean": self.score_mean,
            "totals": self.totals,
            "score_stats": self.score_stats,
            "step": self.step,
            "since_refresh": torch.tensor(self.since_refresh),
        }
        if self.rows is not None:
            out["rows"] = self.rows
        if self.moments is not None:
            out["moments"] = self.moments
        return {name: tensor.detach().cpu().contiguous() for name, tensor in out.items()}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `tensors()` gave, in place.

        Raises:
            ValueError: if names or shapes differ from this state's.
        """
        own = self.tensors()
        if {k: tuple(v.shape) for k, v in own.items()} != {k: tuple(v.shape) for k, v in tensors.items()}:
            raise ValueError(
                f"The selector state does not fit: it holds {_shapes(tensors)}, this run needs {_shapes(own)}. It "
                "belongs to other training data or other selector settings."
            )
        for name, tensor in tensors.items():
            if name == "since_refresh":
                self.since_refresh = int(tensor)
            else:
                getattr(self, name).copy_(tensor)


def _shapes(tensors: dict[str, Tensor]) -> str:
    return ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in sorted(tensors.items()))


def init_selector(
    active: Tensor,
    *,
    rows: Tensor | None = None,
    activation: Activation = "softmax",
    adam: bool = False,
    joinable: bool = False,
) -> SelectorState:
    """A uniform selector.

    Args:
        active (`Tensor` bool `[U]`): units that have rows to train on; the others get no weight.
        rows (`Tensor` int64 `[U]`, *optional*): rows per unit, for groups.
        activation (`str`, defaults to `"softmax"`): `"softmax"` or `"sigmoid"`.
        adam (`bool`, defaults to `False`): keep the moments that `update_adam` needs (8 more bytes per unit).
        joinable (`bool`, defaults to `False`): units may join later, by `admit`, so that none need be active.

    Raises:
        ValueError: if no unit is active and none can join.
    """
    if not joinable and not bool(active.any()):
        raise ValueError("The selector needs at least one row to weigh, got none.")
    logits = torch.zeros(active.shape, dtype=torch.float32, device=active.device)
    logits.masked_fill_(~active, -torch.inf)
    state = SelectorState(
        logits=logits,
        score_mean=torch.full_like(logits, torch.nan),
        totals=torch.zeros(4, dtype=torch.float64, device=active.device),
        score_stats=torch.full((2,), torch.nan, dtype=torch.float64, device=active.device),
        rows=rows,
        moments=torch.zeros(2, *logits.shape, dtype=torch.float32, device=active.device) if adam else None,
        step=torch.zeros((), dtype=torch.int64, device=active.device),
        activation=activation,
    )
    refresh_totals(state)
    return state


def _terms(logits: Tensor, activation: Activation) -> Tensor:
    """Per unit `(a, a^2, a log a, 1)` in float64, `[..., 4]`; zero for units without rows."""
    log_a = log_activation(logits.double(), activation)
    a = log_a.exp()
    live = ~torch.isneginf(logits)
    return torch.stack([a, a * a, torch.where(live, a * log_a, 0.0), live.double()], dim=-1)


def refresh_totals(state: SelectorState, chunk: int = 1 << 20) -> None:
    """Compute the sums over all units afresh: O(U), so only at the start and once in at least U changes."""
    totals = torch.zeros_like(state.totals)
    for start in range(0, state.logits.numel(), chunk):
        part = _terms(state.logits[start : start + chunk], state.activation)
        if state.rows is not None:
            part = part * state.rows[start : start + chunk].unsqueeze(-1)
        totals += part.sum(0)
    state.totals.copy_(totals)
    state.since_refresh = 0


def sample_weights(state: SelectorState, units: Tensor | slice) -> Tensor:
    """Weight of each given unit's rows.

    Args:
        units (`Tensor` int64 `[b]`, or `slice`): indices of units.

    Returns:
        `Tensor` float32 `[b]`: weights of mean one over all rows; zero for units without rows.
    """
    log_a = log_activation(state.logits[units].double(), state.activation)
    return (log_a.exp() * (state.totals[3] / state.totals[0])).float()


def open_weights(state: SelectorState, units: Tensor) -> Tensor:
    """As `sample_weights`, for a selector that units join when they are first seen: until then their weight is 1."""
    return torch.where(torch.isneginf(state.logits[units]), 1.0, sample_weights(state, units))


def admit(state: SelectorState, units: Tensor) -> None:
    """Count rows of an open selector: a unit seen for the first time joins with weight 1, the mean. O(batch).

    Args:
        units (`Tensor` int64 `[b]`): unit of each row. A unit counts once, or as often as it is seen if units are
            groups (`state.rows`).
    """
    new = torch.isneginf(state.logits[units])
    mean = torch.where(state.totals[3] > 0, state.totals[0] / state.totals[3], 1.0)
    # The logit of activation `mean`: log(a), or the logistic function's inverse.
    logit = mean.log()
    if state.activation == "sigmoid":
        mean = torch.where(state.totals[3] > 0, mean, 0.5)
        logit = torch.logit(mean)
    joined = torch.where(new, logit.float().clamp(-LOGIT_BOUND, LOGIT_BOUND), state.logits[units])
    terms = _terms(joined, state.activation)
    state.logits[units] = joined
    if state.rows is None:
        _, first = _merge_duplicates(units, joined)
        state.totals += (terms * (new & first).unsqueeze(-1)).sum(0)
    else:
        state.rows.index_add_(0, units, torch.ones_like(units))
        state.totals += terms.sum(0)


def assign_weights(state: SelectorState, units: Tensor, weights: Tensor) -> None:
    """Set the weights of some units of an open softmax selector, up to a common factor. O(batch).

    Args:
        units (`Tensor` int64 `[b]`): repeated units take their mean.
        weights (`Tensor` float32 `[b]`): above 0.
    """
    admit(state, units)
    values, first = _merge_duplicates(units, weights)
    _set_logits(state, units, values.log(), first)


def effective_sample_size(state: SelectorState) -> Tensor:
    """`ESS = (sum w)^2 / sum w^2` over the rows, `[]` float64: between 1 and N. O(1)."""
    return state.totals[0] ** 2 / state.totals[1]


def weight_entropy(state: SelectorState) -> Tensor:
    """Entropy of the normalised weights divided by `log N` (1 = uniform), `[]` float64. O(1)."""
    total = state.totals[0]
    return (total.log() - state.totals[2] / total) / state.totals[3].log().clamp(min=1e-12)


def _set_logits(state: SelectorState, units: Tensor, new: Tensor, first: Tensor) -> None:
    """Write `new` logits and carry the sums along; `first` marks each unit's first place in `units`."""
    new = new.clamp(-LOGIT_BOUND, LOGIT_BOUND)
    change = _terms(new, state.activation) - _terms(state.logits[units], state.activation)
    if state.rows is not None:
        change = change * state.rows[units].unsqueeze(-1)
    state.totals += (change * first.unsqueeze(-1)).sum(0)
    state.logits[units] = new
    # When a large weight leaves, the sums keep its rounding: refresh them once in U changes, O(1) per change.
    state.since_refresh += units.numel()
    if state.since_refresh >= state.logits.numel():
        refresh_totals(state)


def replace_logits(state: SelectorState, live: Tensor, logits: Tensor) -> None:
    """Set the logits of all units at once: `logits` float32, one per true entry of `live` (bool `[U]`). O(U)."""
    state.logits[live] = logits.float().clamp(-LOGIT_BOUND, LOGIT_BOUND)
    state.step += 1
    refresh_totals(state)


def _merge_duplicates(units: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of `values` over equal units, the same bits at each of them, and a mark (bool) at each unit's first place.

    A batch of several processes may hold a row twice (the dataloader pads the last batch), groups always repeat. The
    comparison is O(b^2) small integers, and needs no host-device sync where `torch.unique` would.
    """
    same = units.unsqueeze(0) == units.unsqueeze(1)
    place = torch.arange(units.numel(), device=units.device)
    first = torch.where(same, place, units.numel()).amin(1)
    mean = (same.to(values.dtype) @ values) / same.sum(1)
    # Equal units are summed in the same order, but a matrix product need not round equal rows alike.
    return mean[first], first == place


def standardise(state: SelectorState, scores: Tensor, momentum: float = 0.9) -> Tensor:
    """Scores centred and scaled by running statistics, which then take this batch in. `[b]` float32 in, float32 out.

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
    state: SelectorState, units: Tensor, scores: Tensor, *, learning_rate: float, entropy_coef: float
) -> Tensor:
    """Move the logits of the rows in the batch by their standardised score, and pull them towards uniform.

    `s_k <- (1 - entropy_coef) s_k + learning_rate z_k` for the units of the batch only. The pull is the gradient step
    of the negative entropy for logits near zero; without it weights collapse (ESS to 1), since one useful row is
    enough to attain the bilevel optimum.

    Args:
        units (`Tensor` int64 `[b]`): units of the batch; repeated units count once, with their mean score.
        scores (`Tensor` float32 `[b]`): larger means that training on the row helps the validation loss more.

    Returns:
        `Tensor` float32 `[b]`: the standardised scores.
    """
    z, first = _merge_duplicates(units, standardise(state, scores))
    _remember(state, units, z)
    new = (1 - entropy_coef) * state.logits[units] + learning_rate * z
    _set_logits(state, units, new, first)
    state.step += 1
    return z


def _remember(state: SelectorState, units: Tensor, z: Tensor, momentum: float = 0.5) -> None:
    old = state.score_mean[units]
    state.score_mean[units] = torch.where(torch.isnan(old), z, momentum * old + (1 - momentum) * z)


def minibatch_gradient(state: SelectorState, units: Tensor, losses: Tensor) -> Tensor:
    """Gradient of the weighted minibatch loss `(1/B) sum_{i in B} w_i loss_i` by all logits, in closed form.

    `d/ds_k = phi_k (N/B) [sum_{i in B, u(i)=k} a_k loss_i / A - n_k a_k / A * sum_{i in B} a_i loss_i / A]`, with
    `A = sum_j n_j a_j` and `phi = d log a / ds` (1 for softmax, `1 - sigmoid(s)` for sigmoid). For softmax over rows
    this is `(N/B) p_k (1[k in B] loss_k - sum_{i in B} p_i loss_i)`. Dense in `k`.

    Args:
        units (`Tensor` int64 `[B]`), losses (`Tensor` `[B]`).

    Returns:
        `Tensor` float32 `[U]`.
    """
    total, number = state.totals[0], state.totals[3]
    p = log_activation(state.logits.double(), state.activation).exp() / total
    weighted = p[units] * losses.double()
    mass = p if state.rows is None else p * state.rows
    grad = -mass * weighted.sum()
    grad = grad.index_add(0, units, weighted) * number / units.numel()
    return (grad * _slope(state)).float()


def negative_entropy_gradient(state: SelectorState) -> Tensor:
    """Gradient of `sum_i p_i log p_i` by all logits `[U]`: `phi_k n_k p_k (log p_k - sum_i p_i log p_i)`."""
    total = state.totals[0]
    log_a = log_activation(state.logits.double(), state.activation)
    p = log_a.exp() / total
    log_p = torch.where(p > 0, log_a - total.log(), 0.0)
    mass = p if state.rows is None else p * state.rows
    return (mass * (log_p - (mass * log_p).sum()) * _slope(state)).float()


def _slope(state: SelectorState) -> Tensor:
    if state.activation == "softmax":
        return torch.ones_like(state.logits, dtype=torch.float64)
    return 1 - torch.sigmoid(state.logits.double())


def update_adam(
    state: SelectorState,
    units: Tensor,
    scores: Tensor,
    *,
    learning_rate: float,
    entropy_coef: float,
    betas: tuple[float, float],
    eps: float = 1e-8,
) -> Tensor:
    """Adam on the dense gradient of `-(1/B) sum w_i score_i + entropy_coef * negative entropy`.

    The update of the authors' code, kept to reproduce it: O(U) per step, 8 more bytes per unit, and all logits drift
    since Adam normalises the tiny push that every off-batch logit gets.

    Args:
        betas (`tuple[float, float]`): decay of the moments, as in `torch.optim.Adam`.

    Returns:
        `Tensor` float32 `[b]`: the standardised scores (for the record only; the step uses the raw ones).
    """
    if state.moments is None:
        raise ValueError("update_adam needs a selector made by init_selector(..., adam=True).")
    z, _ = _merge_duplicates(units, standardise(state, scores))
    _remember(state, units, z)
    grad = minibatch_gradient(state, units, -scores)
    if entropy_coef:
        grad = grad + entropy_coef * negative_entropy_gradient(state)
    state.step += 1
    first, second = state.moments
    first.lerp_(grad, 1 - betas[0])
    second.lerp_(grad * grad, 1 - betas[1])
    corrected = first / (1 - betas[0] ** state.step)
    scale = (second / (1 - betas[1] ** state.step)).sqrt() + eps
    state.logits -= learning_rate * corrected / scale
    refresh_totals(state)
    return z
