"""Scores: how much training on a row helps the validation loss. Larger is better. Pure functions of per-row losses.

All losses are means over the row's own response tokens (nats per token), so that a score does not depend on the batch
the row happens to be in.
"""

from __future__ import annotations

import torch
from torch import Tensor


def loss_score(model_losses: Tensor) -> Tensor:
    """`-ell_i(theta)`, `[b]`: the score of the published selector.

    Mixes "harmful" with "hard": low-effort answers become easy, so it learns to prefer them.
    """
    return -model_losses


def difference_score(reference_losses: Tensor, model_losses: Tensor) -> Tensor:
    """`1 - ell_i(model) / ell_i(reference)`, `[b]`: by which share validation lowers the row's loss.

    `value_function`: the reference is the tracker of the lower level (trained without validation), the model is
    pulled by validation; the difference `ell_i(theta_hat) - ell_i(theta)` is the gradient of V-PBGD's penalty by the
    row's weight, up to sign (SEAL, Algorithm 1). `lookahead`: the reference is the model, the second one the model
    after K validation steps.

    The difference is taken relative to the reference loss: boilerplate is soon learned by heart at both ends, its two
    losses and their difference all tend to zero, and a plain difference then ranks it among the good rows (measured
    AUC on boilerplate after 24 steps: .86 plain, .999 relative). Both have the same
    sign.
    """
    return 1 - model_losses / reference_losses.clamp(min=1e-6)


def row_losses(log_probs: Tensor, label_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Summed negative log-likelihood and number of scored tokens of every row.

    Args:
        log_probs (`Tensor` `[B, S]`): per-token log-probabilities, zero on ignored positions.
        label_mask (`Tensor` bool `[B, S]`): true on scored positions.

    Returns:
        `tuple` of `Tensor` `[B]`, float32 (float64 for float64 input): sums, and counts of at least 1, so that a row
        without tokens has loss 0.
    """
    dtype = torch.promote_types(log_probs.dtype, torch.float32)
    sums = -(log_probs.to(dtype) * label_mask).sum(-1)
    return sums, label_mask.sum(-1).clamp(min=1).to(dtype)
