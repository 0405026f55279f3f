"""TRL's LM head in the dtype of the model.

The fused head computes log-probabilities in fp32, and differently rounded with every batch shape. Tests that compare
what two ways of batching or of sharing work give take this plain one on a float64 model, and can be exact.
"""

from typing import Any

import torch
from trl.trainer import utils


class ExactHead:
    """In place of the fused head's autograd function."""

    @staticmethod
    def apply(
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        temperature: float,
        chunk_size: int,
        softcapping: float | None,
        scale: float,
        outputs: tuple[str, ...],
    ) -> tuple[Any, ...]:
        """Log-probabilities of the labels, entropy, and whether the label is the likeliest token, `[N]` each."""
        assert softcapping is None
        logits = torch.nn.functional.linear(hidden, weight, bias) * scale / temperature
        logp = logits.log_softmax(-1)
        entropy = -(logp.exp() * logp).sum(-1).detach() if "entropy" in outputs else None
        top = logits.argmax(-1) == labels if "is_top1" in outputs else None
        return logp.gather(-1, labels.unsqueeze(-1)).squeeze(-1), entropy, None, None, top


def use_exact_head() -> None:
    """For the rest of the process."""
    assert hasattr(utils, "_ChunkedLogProbFunction"), "TRL's fused head has changed: see trl.trainer.utils"
    utils._ChunkedLogProbFunction = ExactHead
