"""Weights for the rows that the pilot run did not score, from pooled hidden states of the frozen lower layers."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import Tensor

from ..core.amortised import (
    TabulatedPredictor,
    WeightPredictor,
    fit_weight_predictor,
    pair_features,
    recalibrated,
    tabulate,
)
from ..data.identity import SAMPLE_ID, sample_ids
from .passes import row_batches

if TYPE_CHECKING:
    from .bilevel_sft_trainer import BilevelSFTTrainer

logger = logging.getLogger(__name__)


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
            "read features from. Set `pilot_scored_rows=0`: all rows are scored then."
        )
    return decoder, layers


@torch.no_grad()
def row_features(trainer: BilevelSFTTrainer, batch: Mapping[str, Any], depth: float) -> Tensor:
    """`core.amortised.pair_features` of a hidden state, float32 `[b, 2 d]`.

    Args:
        batch: collated rows.
        depth (`float`): after which share of the layers; at least after the first one.
    """
    decoder, layers = decoder_layers(trainer.model)
    found: list[Tensor] = []

    def keep(layer: Any, args: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)
        raise _ReachedDepth

    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    handle = layers[max(0, round(depth * len(layers)) - 1)].register_forward_hook(keep)
    # A stream's rows are looked at all through training: what their weights rest on must stay as it was.
    adapter = (
        trainer.model.disable_adapter() if trainer.streams and isinstance(trainer.model, PeftModel) else nullcontext()
    )
    try:
        with trainer.compute_loss_context_manager(), adapter:
            decoder(**inputs, use_cache=False)
    except _ReachedDepth:
        pass
    finally:
        handle.remove()
    states = found[0].float()
    answer = batch["labels"] != -100
    prompt = batch["attention_mask"].bool() & ~answer
    return pair_features(_mean(states, prompt), _mean(states, answer))


def _mean(states: Tensor, tokens: Tensor) -> Tensor:
    """Mean state of some tokens of each row, `[b, d]`; zero where there is none."""
    return (states * tokens.unsqueeze(-1)).sum(1) / tokens.sum(1, keepdim=True).clamp(min=1)


def predict_weights(trainer: BilevelSFTTrainer, scored: Tensor, weights: Tensor) -> Tensor:
    """Weights of all rows: of the scored ones as they are, of the others as their features predict.

    Cost: a forward without gradient through the lower layers (`pilot_feature_depth`) for every row.

    Args:
        scored (`Tensor` int64 `[n]`): sample ids of the scored rows, a random sample, ascending.
        weights (`Tensor` float32 `[n]`): their weights, between 0 and 1.

    Returns:
        `Tensor` float32 `[row_count]` on the CPU: between `FLOOR` and 1; 0 for rows that preparation dropped.
    """
    weights = weights.cpu().float()
    found = _predict(trainer, scored, weights)
    out = torch.zeros(trainer.row_count)
    out[found.rows] = recalibrated(found.predicted, found.trusted, float(weights.mean()), found.trusted_weights)
    out[scored.cpu()] = weights
    return out


def stream_predictor(trainer: BilevelSFTTrainer, scored: Tensor, weights: Tensor) -> TabulatedPredictor:
    """What gives the weights of a stream's rows, fitted on its sample.

    Args:
        scored (`Tensor` int64 `[n]`): places in the sample of the scored rows, ascending. What is predicted for the
            others shows how predictions are spread.
        weights (`Tensor` float32 `[n]`): their weights, between 0 and 1.
    """
    weights = weights.cpu().float()
    found = _predict(trainer, scored, weights)
    others = recalibrated(found.predicted, found.trusted, float(weights.mean()), found.trusted_weights)
    return tabulate(found.predictor, found.predicted, others**trainer.args.calibration_sharpness)


@dataclass(frozen=True)
class _Predictions:
    """A fitted predictor; what it says of the rows that are not scored (their sample ids), and of the trusted ones."""

    predictor: WeightPredictor
    rows: Tensor
    predicted: Tensor
    trusted: Tensor
    trusted_weights: Tensor


def _predict(trainer: BilevelSFTTrainer, scored: Tensor, weights: Tensor) -> _Predictions:
    order = trainer.row_order()
    ids = sample_ids(trainer.rows)[order]
    scored = scored.cpu()
    known = torch.isin(ids, scored)
    training, depth = trainer.model.training, trainer.args.pilot_feature_depth
    trainer.model.eval()
    place = torch.full((trainer.row_count,), -1, dtype=torch.int64)
    place[scored] = torch.arange(len(scored))
    features = torch.zeros(len(scored), 2 * trainer.model.config.get_text_config().hidden_size)
    for batch in row_batches(trainer, order[known], "Reading scored rows"):
        features[place[batch[SAMPLE_ID].cpu()]] = row_features(trainer, batch, depth).cpu()
    # Every process fits on the same features, to the last bit.
    predictor = fit_weight_predictor(_sum(trainer, features), weights)
    predicted = torch.zeros(trainer.row_count)
    for batch in row_batches(trainer, order[~known], "Predicting weights"):
        predicted[batch[SAMPLE_ID].cpu()] = predictor(row_features(trainer, batch, depth))
    predicted = _sum(trainer, predicted)
    trusted, shares = _trusted(trainer, predictor)
    trainer.model.train(training)
    others = "a stream's" if trainer.streams else str(int((~known).sum()))
    logger.info(
        f"Weights of {others} rows are predicted from those of {len(scored)} scored ones: typical error "
        f"{predictor.error:.2f} of the largest weight, {max(0.0, predictor.explained):.0%} of the variance explained."
    )
    if predictor.explained < 0.1:
        logger.warning(
            f"The weights of the {len(scored)} scored rows can hardly be predicted ({predictor.explained:.0%} of the "
            "variance explained): the other rows get nearly equal weights. Raise `pilot_scored_rows`"
            f"{'' if trainer.streams else ', or set it to 0'}."
        )
    return _Predictions(predictor, ids[~known], predicted[ids[~known]], trusted, shares)


@torch.no_grad()
def stream_weights(trainer: BilevelSFTTrainer, batch: Mapping[str, Any]) -> Tensor:
    """Weights of a stream's rows in a collated batch, float32 `[b]`; a function of what the rows say.

    Cost: a forward without gradient through the lower layers (`pilot_feature_depth`).
    """
    predictor = trainer.selection.predictor
    assert predictor is not None
    training = trainer.model.training
    trainer.model.eval()
    weights = predictor(row_features(trainer, batch, trainer.args.pilot_feature_depth))
    trainer.model.train(training)
    return weights


def _trusted(trainer: BilevelSFTTrainer, predictor: WeightPredictor) -> tuple[Tensor, Tensor]:
    """What is predicted for the validation rows, and each row's share in the validation loss."""
    assert trainer.pulling is not None
    sets, found, shares = trainer.pulling, [], []
    for name, batch in sets.all_batches(trainer.args.per_device_eval_batch_size):
        features = row_features(trainer, trainer._prepare_inputs(batch), trainer.args.pilot_feature_depth)
        found.append(predictor(features))
        shares.append(torch.full((len(found[-1]),), sets.weights[name] / len(sets.datasets[name])))
    # Every process reads all of them, and must come to the same weights to the last bit.
    return _sum(trainer, torch.cat(found)) / trainer.args.world_size, torch.cat(shares)


def _sum(trainer: BilevelSFTTrainer, values: Tensor) -> Tensor:
    if trainer.args.world_size == 1:
        return values
    return trainer.accelerator.reduce(values.to(trainer.args.device), reduction="sum").cpu()
