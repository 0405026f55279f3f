"""Implicit weights: what the responses drawn for one question are worth, and when a round was worth it.

Pure functions on tensors. The G responses of a question stand next to each other, as TRL generates them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


def response_scores(reference_losses: Tensor, model_losses: Tensor) -> Tensor:
    """`ell(theta_hat) - ell(theta)` of each response, in nats per response token, `[Q * G]`.

    Losses are means over a response's own tokens, so this is `log(pi_theta / pi_theta_hat)(y | x) / |y|`: how much
    likelier the parameters that validation pulled find the response than those that it did not.
    """
    return reference_losses - model_losses


def implicit_weights(scores: Tensor, generations: int, temperature: float) -> Tensor:
    """Weights of responses, a softmax over the responses of each question (arXiv 2511.21056, implicit weights).

    `w_g = G exp(score_g / tau) / sum_h exp(score_h / tau)`. With `response_scores` this is the closed-form importance
    ratio `(pi_theta / pi_theta_hat)^(1 / (tau |y|)) / Z`. Scaled to mean one within a question, so that the size of
    the gradient does not depend on G; less one, it is the advantage whose policy gradient has the same expectation as
    weighted fine-tuning on the responses, with less variance.

    Args:
        scores (`Tensor` float `[Q * G]`): NaN for a response that is left out; it gets weight NaN, and the others of
            its question share the weight.
        generations, temperature: G, and tau in the units of the scores (nats per token).

    Returns:
        `Tensor` float32 `[Q * G]`.
    """
    if temperature <= 0:
        raise ValueError(f"`temperature` must be above 0, got {temperature}.")
    if scores.numel() % generations:
        raise ValueError(f"{scores.numel()} scores do not make groups of {generations}.")
    grouped = scores.double().view(-1, generations)
    known = ~torch.isnan(grouped)
    logits = torch.where(known, grouped / temperature, -torch.inf)
    # A question without any response left: no weight to give, and no NaN from an empty softmax.
    weights = torch.softmax(torch.where(known.any(-1, keepdim=True), logits, 0.0), dim=-1)
    weights = weights * known.sum(-1, keepdim=True)
    return torch.where(known, weights, torch.nan).flatten().float()


def question_weights(weights: Tensor) -> Tensor:
    """Explicit weights `[Q]` of the questions of a round, scaled to mean one over them; all one if all are zero.

    Questions are chosen because their answers weigh little. What counts within a round is how they compare.
    """
    mean = weights.double().mean()
    return torch.where(mean > 0, weights / mean.clamp(min=1e-30), 1.0).float()


@dataclass(frozen=True)
class Decision:
    """Whether the trained model of a round is kept, and why.

    Losses are selection losses of both candidates (nats per token, weighted mean over rows); the difference is trained
    less incoming, with its paired standard error.
    """

    kept: bool
    incoming_loss: float
    trained_loss: float
    difference: float
    standard_error: float
    reason: str


def decide(incoming: Tensor, trained: Tensor, weights: Tensor | None = None) -> Decision:
    """Keep the trained model if its selection loss is not above the incoming one's.

    All are `[n]`, of the selection rows: losses under both candidates, and shares of sum one (equal by default).
    """
    incoming, trained = incoming.double(), trained.double()
    count = len(incoming)
    share = torch.full_like(incoming, 1 / count) if weights is None else weights.to(incoming)
    change = trained - incoming
    difference = float((share * change).sum())
    spread = (share**2 * (change - difference) ** 2).sum().sqrt()
    error = float(spread * (count / (count - 1)) ** 0.5) if count > 1 else float("nan")
    if not bool(torch.isfinite(trained).all()):
        kept, reason = False, "the trained model has selection rows of NaN or infinite loss"
    elif difference > 0:
        kept, reason = False, "the selection loss rose"
    else:
        kept, reason = True, "the selection loss did not rise"
    return Decision(kept, float((share * incoming).sum()), float((share * trained).sum()), difference, error, reason)
