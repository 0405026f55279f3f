"""What hidden states of the model say of rows' weights: second opinions on scored rows, and weights of the rest."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import Tensor

from ..core.amortised import (
    TabulatedPredictor,
    WeightPredictor,
    cross_predictions,
    fit_weight_predictor,
    pair_features,
    recalibrated,
    smoothed_logits,
    tabulate,
)
from ..data.identity import SAMPLE_ID, sample_ids
from .bilevel_sft_config import MIN_SCORED_ROWS
from .passes import row_batches

if TYPE_CHECKING:
    from .bilevel_sft_trainer import BilevelSFTTrainer

logger = logging.getLogger(__name__)

# Scored rows that a prediction is fitted on at most: a random sample of them, as the work grows with its cube.
FITTED_ROWS = 2048
# After which share of the layers scored rows are read for a second opinion. They are few, and deeper layers say more.
SMOOTHING_DEPTH = 2 / 3


class _ReachedDepth(Exception):
    """Ends a forward once the features are there: the layers above are not computed."""


def decoder_layers(model: Any) -> tuple[Any, Any]:
    """The decoder of a (PEFT) language model, and its list of layers.

    Raises:
        ValueError: if the model is not built that way.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else None
    count = base.config.get_text_config().num_hidden_layers
    # Under `layers` in most models, `h` in some.
    lists = [part for part in decoder.children() if isinstance(part, torch.nn.ModuleList)] if decoder else []
    layers = next((part for part in lists if len(part) == count), None)
    if layers is None:
        raise ValueError(
            f"{type(base).__name__} has no list of layers to read hidden states from, which `pilot_smoothing` and "
            "`pilot_scored_rows` need. Set `pilot_smoothing=False` and `pilot_scored_rows=0`: all rows are scored "
            "then, each for itself."
        )
    return decoder, layers


@torch.no_grad()
def row_features(trainer: BilevelSFTTrainer, batch: Mapping[str, Any], depths: Sequence[float]) -> list[Tensor]:
    """`core.amortised.pair_features` of hidden states, float32 `[b, 2 d]` for each depth.

    Args:
        batch: collated rows.
        depths: after which shares of the layers; at least after the first one.
    """
    decoder, layers = decoder_layers(trainer.model)
    places = [max(0, round(depth * len(layers)) - 1) for depth in depths]
    found: dict[int, Tensor] = {}

    def keep(place: int, output: Any) -> None:
        found[place] = output[0] if isinstance(output, tuple) else output
        if place == max(places):
            raise _ReachedDepth

    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    handles = [
        layers[place].register_forward_hook(lambda layer, args, output, place=place: keep(place, output))
        for place in set(places)
    ]
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
        for handle in handles:
            handle.remove()
    answer = batch["labels"] != -100
    prompt = batch["attention_mask"].bool() & ~answer
    states = [found[place].float() for place in places]
    return [pair_features(_mean(each, prompt), _mean(each, answer)) for each in states]


def _mean(states: Tensor, tokens: Tensor) -> Tensor:
    """Mean state of some tokens of each row, `[b, d]`; zero where there is none."""
    return (states * tokens.unsqueeze(-1)).sum(1) / tokens.sum(1, keepdim=True).clamp(min=1)


def predict_weights(trainer: BilevelSFTTrainer, scored: Tensor, weights: Tensor) -> Tensor:
    """Weights of all rows: of the scored ones smoothed (`pilot_smoothing`), of the others as their features predict.

    Cost: a forward without gradient through the lower layers for every row: two thirds of them for scored rows, if
    smoothed, `pilot_feature_depth` for the others.

    Args:
        scored (`Tensor` int64 `[n]`): sample ids of the scored rows, a random sample, ascending.
        weights (`Tensor` float32 `[n]`): their weights, between 0 and 1.

    Returns:
        `Tensor` float32 `[row_count]` on the CPU: between `FLOOR` and 1; 0 for rows that preparation dropped.
    """
    out = torch.zeros(trainer.row_count)
    with _evaluating(trainer):
        known = _scored_rows(trainer, scored, weights)
        if len(known.others):
            found = _predict(trainer, known)
            mean = float(known.weights.mean())
            out[found.rows] = recalibrated(found.predicted, found.trusted, mean, found.trusted_weights)
    out[scored.cpu()] = known.weights
    return out


def stream_predictor(trainer: BilevelSFTTrainer, scored: Tensor, weights: Tensor) -> TabulatedPredictor:
    """What gives the weights of a stream's rows, fitted on its sample.

    Args:
        scored (`Tensor` int64 `[n]`): places in the sample of the scored rows, ascending. What is predicted for the
            others shows how predictions are spread.
        weights (`Tensor` float32 `[n]`): their weights, between 0 and 1.
    """
    with _evaluating(trainer):
        known = _scored_rows(trainer, scored, weights)
        found = _predict(trainer, known)
    others = recalibrated(found.predicted, found.trusted, float(known.weights.mean()), found.trusted_weights)
    return tabulate(found.predictor, found.predicted, others**trainer.args.calibration_sharpness)


@dataclass(frozen=True)
class _ScoredRows:
    """The scored rows' weights, by ascending sample id, and what predictions are fitted on.

    Attributes:
        weights: of all scored rows.
        fitted_weights, features: of the rows that predictions are fitted on; features at `pilot_feature_depth`.
        others: places in the prepared set of the rows that are not scored.
    """

    weights: Tensor
    fitted_weights: Tensor
    features: Tensor
    others: Tensor


@dataclass(frozen=True)
class _Predictions:
    """A fitted predictor; what it says of the rows that are not scored (their sample ids), and of the trusted ones."""

    predictor: WeightPredictor
    rows: Tensor
    predicted: Tensor
    trusted: Tensor
    trusted_weights: Tensor


def _scored_rows(trainer: BilevelSFTTrainer, scored: Tensor, weights: Tensor) -> _ScoredRows:
    """Read the scored rows, and smooth their weights if that is asked for."""
    order, scored = trainer.row_order(), scored.cpu()
    known = torch.isin(sample_ids(trainer.rows)[order], scored)
    # The order is one by content, so its first rows are a random sample, whatever the order of the caller's.
    fitted, rest = order[known][:FITTED_ROWS], order[known][FITTED_ROWS:]
    ids = sample_ids(trainer.rows)[fitted]
    by_id = torch.zeros(trainer.row_count)
    by_id[scored] = weights.cpu().float()
    enough = len(scored) >= MIN_SCORED_ROWS and bool(weights.max() > weights.min())
    smooths = trainer.args.pilot_smoothing and enough
    depths = [trainer.args.pilot_feature_depth] if len(order) > len(scored) else []
    if smooths:
        depths.append(SMOOTHING_DEPTH)
    features = _read(trainer, fitted, ids, depths)
    if smooths:
        by_id[scored] = _smooth(trainer, features[-1], ids, rest, scored, by_id).exp()
    return _ScoredRows(by_id[scored], by_id[ids], features[0] if depths else by_id[ids], order[~known])


def _smooth(
    trainer: BilevelSFTTrainer, features: Tensor, ids: Tensor, rest: Tensor, scored: Tensor, weights: Tensor
) -> Tensor:
    """Smoothed log weights of the scored rows.

    Args:
        features, ids: of the rows that the second opinion is fitted on.
        rest: places of the other scored rows.
        scored: sample ids of all scored rows.
        weights: by sample id.
    """
    predictions, explained = cross_predictions(features, weights[ids])
    predictor = fit_weight_predictor(features, weights[ids])
    second = _predict_rows(trainer, predictor, rest, SMOOTHING_DEPTH, "Reading scored rows")
    second[ids] = predictions
    trusted, shares = _trusted(trainer, predictor, SMOOTHING_DEPTH)
    logger.info(
        f"Weights of the {len(scored)} scored rows are smoothed: rows like it explain {max(0.0, explained):.0%} of "
        "the variance of a row's weight."
    )
    return smoothed_logits(weights[scored].log(), second[scored], trusted, explained, shares)


def _predict(trainer: BilevelSFTTrainer, known: _ScoredRows) -> _Predictions:
    """Fit a predictor on the scored rows; ask it about the others and the trusted rows."""
    predictor, depth = fit_weight_predictor(known.features, known.fitted_weights), trainer.args.pilot_feature_depth
    predicted = _predict_rows(trainer, predictor, known.others, depth, "Predicting weights")
    trusted, shares = _trusted(trainer, predictor, depth)
    count = len(known.weights)
    others = "a stream's" if trainer.streams else str(len(known.others))
    logger.info(
        f"Weights of {others} rows are predicted from those of {count} scored ones: typical error "
        f"{predictor.error:.2f} of the largest weight, {max(0.0, predictor.explained):.0%} of the variance explained."
    )
    if predictor.explained < 0.1:
        logger.warning(
            f"The weights of the {count} scored rows can hardly be predicted ({predictor.explained:.0%} of the "
            "variance explained): the other rows get nearly equal weights. Raise `pilot_scored_rows`"
            f"{'' if trainer.streams else ', or set it to 0'}."
        )
    rows = sample_ids(trainer.rows)[known.others]
    return _Predictions(predictor, rows, predicted[rows], trusted, shares)


def _read(trainer: BilevelSFTTrainer, places: Tensor, ids: Tensor, depths: Sequence[float]) -> list[Tensor]:
    """Features `[n, 2 d]` of rows at each depth; every process has all of them, to the last bit."""
    width = 2 * trainer.model.config.get_text_config().hidden_size
    features = [torch.zeros(len(places), width) for _ in depths]
    line = torch.zeros(trainer.row_count, dtype=torch.int64)
    line[ids] = torch.arange(len(ids))
    for batch in row_batches(trainer, places, "Reading scored rows") if depths else ():
        for each, found in zip(features, row_features(trainer, batch, depths), strict=True):
            each[line[batch[SAMPLE_ID].cpu()]] = found.cpu()
    return [_sum(trainer, each) for each in features]


def _predict_rows(
    trainer: BilevelSFTTrainer, predictor: WeightPredictor, places: Tensor, depth: float, description: str
) -> Tensor:
    """What is predicted for rows, by sample id `[row_count]`; zero for all others."""
    predicted = torch.zeros(trainer.row_count)
    for batch in row_batches(trainer, places, description):
        predicted[batch[SAMPLE_ID].cpu()] = predictor(*row_features(trainer, batch, [depth]))
    return _sum(trainer, predicted)


@contextmanager
def _evaluating(trainer: BilevelSFTTrainer) -> Iterator[None]:
    training = trainer.model.training
    trainer.model.eval()
    try:
        yield
    finally:
        trainer.model.train(training)


@torch.no_grad()
def stream_weights(trainer: BilevelSFTTrainer, batch: Mapping[str, Any]) -> Tensor:
    """Weights of a stream's rows in a collated batch, float32 `[b]`; a function of what the rows say.

    Cost: a forward without gradient through the lower layers (`pilot_feature_depth`).
    """
    predictor = trainer.selection.predictor
    assert predictor is not None
    with _evaluating(trainer):
        return predictor(*row_features(trainer, batch, [trainer.args.pilot_feature_depth]))


def _trusted(trainer: BilevelSFTTrainer, predictor: WeightPredictor, depth: float) -> tuple[Tensor, Tensor]:
    """What is predicted for the validation rows, and each row's share in the validation loss."""
    assert trainer.pulling is not None
    sets, found, shares = trainer.pulling, [], []
    for name, batch in sets.all_batches(trainer.args.per_device_eval_batch_size):
        found.append(predictor(*row_features(trainer, trainer._prepare_inputs(batch), [depth])))
        shares.append(torch.full((len(found[-1]),), sets.weights[name] / len(sets.datasets[name])))
    # Every process reads all of them, and must come to the same weights to the last bit.
    return _sum(trainer, torch.cat(found)) / trainer.args.world_size, torch.cat(shares)


def _sum(trainer: BilevelSFTTrainer, values: Tensor) -> Tensor:
    if trainer.args.world_size == 1:
        return values
    return trainer.accelerator.reduce(values.to(trainer.args.device), reduction="sum").cpu()
