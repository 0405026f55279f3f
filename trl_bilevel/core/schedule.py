"""Schedules of the validation term."""

from __future__ import annotations


def validation_loss_weight(initial: float, decay_per_epoch: float, epoch: float, floor: float = 0.05) -> float:
    """lambda at a point of training: `initial` less `decay_per_epoch` at the start of every further epoch.

    The weight is clamped to `[min(initial, floor), 0.99]`, so that a long run never loses the pull of the validation
    set (the weight estimators live on it), and never loses the training rows. An `initial` of 0 stays 0.

    Args:
        initial (`float`): lambda of the first epoch, in [0, 1).
        decay_per_epoch (`float`): amount taken off per whole epoch.
        epoch (`float`): epochs done so far, fractional.
    """
    return min(0.99, max(min(initial, floor), initial - decay_per_epoch * int(epoch)))
