"""Scores: how much training on a row helps the validation loss. Larger is better. Pure functions of per-row losses.

All losses are means over the row's own response tokens (nats per token), so that a score does not depend on the batch
the row happens to be in.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class RowLosses(NamedTuple):
    """What a forward says of each row, `[B]` each, float32 (float64 for float64 input).

    Attributes:
        sums: summed negative log-likelihood of the scored tokens.
        counts: number of scored tokens, at least 1, so that a row without tokens has loss 0.
        endings: mean negative log-likelihood of the tokens that end a scored stretch (the end-of-turn token of each
            answer).
    """

    sums: Tensor
    counts: Tensor
    endings: Tensor

    def means(self) -> Tensor:
        """Mean loss per scored token, `[B]`, detached."""
        return (self.sums / self.counts).detach()


def difference_score(reference_losses: Tensor, model_losses: Tensor) -> Tensor:
    """`1 - ell_i(model) / ell_i(reference)`, `[b]`: by which share validation lowers the row's loss.

    `value_function`: the reference is the tracker of the lower level (trained without validation), the model is
    pulled by validation; the difference `ell_i(theta_hat) - ell_i(theta)` is the gradient of V-PBGD's penalty by the
    row's weight, up to sign (SEAL, Algorithm 1).

    The difference is taken relative to the reference loss: boilerplate is soon learned by heart at both ends, its two
    losses and their difference all tend to zero, and a plain difference then ranks it among the good rows (measured
    AUC on boilerplate after 24 steps: .86 plain, .999 relative). Both have the same sign.
    """
    return 1 - model_losses / reference_losses.clamp(min=1e-6)


def difference_scores(reference: RowLosses, model: RowLosses) -> Tensor:
    """Two columns, `[b, 2]`: the response's `difference_score`, and the ending's surprise under `model`.

    The surprise is the probability, between 0 and 1, that the model pulled by validation would have gone on where the
    answer ends.
    """
    response = difference_score(reference.means(), model.means())
    return torch.stack([response, 1 - torch.exp(-model.endings.detach())], dim=-1)


def row_losses(
    log_probs: Tensor, label_mask: Tensor, segments: Tensor | None = None, count: int | None = None
) -> RowLosses:
    """Losses of every row from per-token log-probabilities `[B, S]`, zero on ignored positions.

    Args:
        label_mask (`Tensor` bool `[B, S]`): true on scored positions.
        segments (`Tensor` int64 `[B, S]`, *optional*): row of each token where batch rows hold several of them,
            negative for padding; then `count` is the number of rows.
    """
    losses = -log_probs.to(torch.promote_types(log_probs.dtype, torch.float32)) * label_mask
    goes_on = torch.nn.functional.pad(label_mask[:, 1:], (0, 1), value=False)
    if segments is not None:
        goes_on = goes_on & (segments == torch.nn.functional.pad(segments[:, 1:], (0, 1), value=-1))
    ends = label_mask & ~goes_on

    def total(tokens: Tensor) -> Tensor:
        if segments is None:
            return tokens.sum(-1)
        assert count is not None
        # Padding goes into a bin of its own: picking tokens by a mask would wait for the device.
        index = torch.where(segments < 0, count, segments).flatten()
        return losses.new_zeros(count + 1).index_add_(0, index, tokens.to(losses.dtype).flatten())[:count]

    return RowLosses(
        sums=total(losses),
        counts=total(label_mask).clamp(min=1).to(losses.dtype),
        endings=total(losses * ends) / total(ends).clamp(min=1),
    )
