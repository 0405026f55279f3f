"""Weights for the rows that the pilot run did not score, from pooled hidden states of the frozen lower layers."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import Tensor

from ..core.amortised import fit_weight_predictor
from ..core.calibration import FLOOR
from ..data.identity import SAMPLE_ID, sample_ids
from .passes import row_batches

if TYPE_CHECKING:
    from .bilevel_sft_trainer import BilevelSFTTrainer

logger = logging.getLogger(__name__)

# How deep in the model features are read. Two thirds predict a little better and cost more (docs/results.md).
DEPTH = 0.4


class _ReachedDepth(Exception):
    """Ends a forward once the features are there: the layers above are not computed."""


def decoder_layers(model: Any) -> tuple[Any, Any]:
    """The decoder of a (PEFT) language model, and its list of layers.

    Raises:
        ValueError: if the model is not built that way.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else None
    layers = getattr(decoder, "layers", None)
    if layers is None:
        raise ValueError(
            f"`pilot_scored_rows` is not supported for {type(base).__name__}: its decoder has no list of layers to "
            "read features from. Unset it: all rows are scored then."
        )
    return decoder, layers


@torch.no_grad()
def pooled_states(trainer: BilevelSFTTrainer, batch: Mapping[str, Any], depth: float = DEPTH) -> Tensor:
    """Mean over each row's scored tokens of a hidden state, float32 `[b, d]` on the CPU.

    Args:
        batch: collated rows.
        depth (`float`): after which share of the layers; at least after the first one.
    """
    decoder, layers = decoder_layers(trainer.model)
    found: list[Tensor] = []

    def keep(layer: Any, args: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)
        raise _ReachedDepth

    inputs = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
    handle = layers[max(0, round(depth * len(layers)) - 1)].register_forward_hook(keep)
    try:
        with trainer.compute_loss_context_manager():
            decoder(**inputs, use_cache=False)
    except _ReachedDepth:
        pass
    finally:
        handle.remove()
    scored = (batch["labels"] != -100).unsqueeze(-1)
    return ((found[0].float() * scored).sum(1) / scored.sum(1).clamp(min=1)).cpu()


def predict_weights(trainer: BilevelSFTTrainer, scored: Tensor, weights: Tensor) -> Tensor:
    """Weights of all rows: of the scored ones as they are, of the others as their features predict.

    Cost: a forward without gradient through the lower `DEPTH` of the layers for every row.

    Args:
        scored (`Tensor` int64 `[n]`): sample ids of the scored rows, ascending.
        weights (`Tensor` float32 `[n]`): their weights, between 0 and 1.

    Returns:
        `Tensor` float32 `[row_count]` on the CPU: between `FLOOR` and 1; 0 for rows that preparation dropped.
    """
    order = trainer.row_order()
    scored, weights = scored.cpu(), weights.cpu().float()
    known = torch.isin(sample_ids(trainer.train_dataset)[order], scored)
    training = trainer.model.training
    trainer.model.eval()
    place = torch.full((trainer.row_count,), -1, dtype=torch.int64)
    place[scored] = torch.arange(len(scored))
    features = torch.zeros(len(scored), trainer.model.config.get_text_config().hidden_size)
    for batch in row_batches(trainer, order[known], "Reading scored rows"):
        features[place[batch[SAMPLE_ID].cpu()]] = pooled_states(trainer, batch)
    # Every process fits on the same features, to the last bit.
    predictor = fit_weight_predictor(_sum(trainer, features), weights)
    out = torch.zeros(trainer.row_count)
    for batch in row_batches(trainer, order[~known], "Predicting weights"):
        out[batch[SAMPLE_ID].cpu()] = predictor(pooled_states(trainer, batch)).clamp(FLOOR, 1.0)
    out = _sum(trainer, out)
    out[scored] = weights
    trainer.model.train(training)
    logger.info(
        f"Weights of {int((~known).sum())} rows are predicted from those of {len(scored)} scored ones: typical error "
        f"{predictor.error:.2f} of the largest weight, {max(0.0, predictor.explained):.0%} of the variance explained."
    )
    if predictor.explained < 0.1:
        logger.warning(
            f"The weights of the {len(scored)} scored rows can hardly be predicted ({predictor.explained:.0%} of the "
            "variance explained): the other rows get nearly equal weights. Raise `pilot_scored_rows`, or unset it."
        )
    return out


def _sum(trainer: BilevelSFTTrainer, values: Tensor) -> Tensor:
    if trainer.args.world_size == 1:
        return values
    return trainer.accelerator.reduce(values.to(trainer.args.device), reduction="sum").cpu()
