"""What hidden states of the model say of rows' weights: second opinions on scored rows, and weights of the rest."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast
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
from ..core.calibration import Calibration
from ..data.identity import SAMPLE_ID, sample_ids
from .bilevel_sft_config import MIN_SCORED_ROWS
from .passes import row_batches

if TYPE_CHECKING:
    from .bilevel_sft_trainer import BilevelSFTTrainer

logger = logging.getLogger(__name__)

# Scored rows that second opinions are fitted on at most, ten times: a random sample, as the work grows with its cube.
FITTED_ROWS = 2048
# After which share of the layers scored rows are read for a second opinion. They are few, and deeper layers say more.
SMOOTHING_DEPTH = 2 / 3


UNREADABLE = (
    "`pilot_smoothing` and `pilot_scored_rows` need them. Set `pilot_smoothing=False` and `pilot_scored_rows=0`: all "
    "rows are scored then, each for itself."
)


class _ReachedDepth(Exception):
    """Ends a forward once the features are there: the layers above are not computed."""


def reads_states(trainer: BilevelSFTTrainer) -> bool:
    """True if weights will rest on hidden states: of scored rows, to smooth theirs, or of rows that are not scored."""
    args, rows = trainer.args, len(trainer.rows)
    smooths = args.pilot_smoothing and rows >= MIN_SCORED_ROWS
    return smooths or trainer.predicts or 0 < args.pilot_scored_rows < rows


def decoder_layers(model: Any) -> tuple[Any, Any]:
    """The decoder of a (PEFT) language model, and its list of layers.

    Raises:
        ValueError: if the model is not built that way.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else None
    if decoder is base:
        decoder = getattr(base, "model", None)
    lists = {}
    if isinstance(decoder, torch.nn.Module):
        lists = {name: part for name, part in decoder.named_children() if isinstance(part, torch.nn.ModuleList)}
    count = getattr(base.config.get_text_config(), "num_hidden_layers", None)
    # Nearly all models name them so; GPT-2 and its kin do not.
    layers = lists.get("layers") or next((part for part in lists.values() if len(part) == count), None)
    if layers is None:
        raise ValueError(f"{type(base).__name__} has no list of layers to read hidden states from. {UNREADABLE}")
    return decoder, layers


def check_states(trainer: BilevelSFTTrainer) -> None:
    """Read one row, so that a model whose hidden states cannot be read is found out before the pilot run.

    Raises:
        ValueError: if its layers do not give states `[b, s, d]`.
    """
    if reads_states(trainer):
        with _evaluating(trainer):
            row_features(trainer, trainer.collate_rows([0]), [SMOOTHING_DEPTH])


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
    shape = batch["input_ids"].shape
    for state in found.values():
        if state.ndim != 3 or state.shape[:2] != shape:
            raise ValueError(
                f"The layers of {type(decoder).__name__} give states of shape {tuple(state.shape)} for tokens of "
                f"shape {tuple(shape)}, which cannot be read. {UNREADABLE}"
            )
    states = [found[place].float() for place in places]
    return [pair_features(_mean(each, prompt), _mean(each, answer)) for each in states]


def _mean(states: Tensor, tokens: Tensor) -> Tensor:
    """Mean state of some tokens of each row, `[b, d]`; zero where there is none."""
    return (states * tokens.unsqueeze(-1)).sum(1) / tokens.sum(1, keepdim=True).clamp(min=1)


def predict_weights(trainer: BilevelSFTTrainer, scored: Tensor, own: Calibration) -> Tensor:
    """Weights of all rows: of the scored ones smoothed (`pilot_smoothing`), of the others as their features predict.

    Cost: a forward without gradient through the lower layers for every row: two thirds of them for scored rows, if
    smoothed, `pilot_feature_depth` for the others.

    Args:
        scored (`Tensor` int64 `[n]`): sample ids of the scored rows, a random sample, ascending.
        own (`Calibration`): of their scores.

    Returns:
        `Tensor` float32 `[row_count]` on the CPU: between `FLOOR` and 1; 0 for rows that preparation dropped.
    """
    out = torch.zeros(trainer.row_count)
    with _evaluating(trainer):
        known = _scored_rows(trainer, scored, own)
        if len(known.others):
            found = _predict(trainer, known)
            mean = float(known.weights.mean())
            out[found.rows] = recalibrated(found.predicted, found.trusted, mean, found.trusted_weights)
    out[known.ids] = known.weights
    # Fits may round otherwise on another processor: every process takes the weights of the first one.
    return broadcast(out.to(trainer.args.device)).cpu() if trainer.args.world_size > 1 else out


def stream_predictor(trainer: BilevelSFTTrainer, scored: Tensor, own: Calibration) -> TabulatedPredictor:
    """What gives the weights of a stream's rows, fitted on its sample.

    Args:
        scored (`Tensor` int64 `[n]`): places in the sample of the scored rows, ascending. What is predicted for the
            others shows how predictions are spread.
        own (`Calibration`): of their scores.
    """
    with _evaluating(trainer):
        known = _scored_rows(trainer, scored, own)
        found = _predict(trainer, known)
    others = recalibrated(found.predicted, found.trusted, float(known.weights.mean()), found.trusted_weights)
    return tabulate(found.predictor, found.predicted, others**trainer.args.calibration_sharpness)


@dataclass(frozen=True)
class _ScoredRows:
    """The scored rows, in content order.

    Attributes:
        ids: sample ids.
        weights, own_weights: with what other rows say of them, and by their own scores.
        features (*optional*): at `pilot_feature_depth`; None if there are no others.
        others: places in the prepared set of the rows that are not scored.
    """

    ids: Tensor
    weights: Tensor
    own_weights: Tensor
    features: Tensor | None
    others: Tensor


@dataclass(frozen=True)
class _Predictions:
    """A fitted predictor; what it says of the rows that are not scored (their sample ids), and of the trusted ones."""

    predictor: WeightPredictor
    rows: Tensor
    predicted: Tensor
    trusted: Tensor
    trusted_weights: Tensor


def _scored_rows(trainer: BilevelSFTTrainer, scored: Tensor, own: Calibration) -> _ScoredRows:
    """Read the scored rows, and smooth their weights if that is asked for."""
    # In the order by content: results do not depend on the caller's, and the first rows are a random sample.
    order = trainer.row_order()
    known = torch.isin(sample_ids(trainer.rows)[order], scored.cpu())
    places, others = order[known], order[~known]
    ids = sample_ids(trainer.rows)[places]
    logits = torch.zeros(trainer.row_count)
    logits[scored.cpu()] = own.logits.cpu().float()
    own = own._replace(logits=logits[ids])
    weights = own_weights = own.logits.exp()
    # A stream's weights are all predicted: nobody asks for those of its scored rows.
    smooths = trainer.args.pilot_smoothing and not trainer.predicts
    smooths = smooths and len(ids) >= MIN_SCORED_ROWS and bool(weights.max() > weights.min())
    depths = [trainer.args.pilot_feature_depth] if len(others) else []
    if not smooths:
        features = _read(trainer, places, depths)
    else:
        depths.append(SMOOTHING_DEPTH)
        features = _read(trainer, places[:FITTED_ROWS], depths)
        second, explained = cross_predictions(features[-1], own_weights[:FITTED_ROWS])
        smoother = fit_weight_predictor(features[-1], own_weights[:FITTED_ROWS])
        rest = _read(trainer, places[FITTED_ROWS:], depths, smoother)
        second = torch.cat([second, rest[-1].squeeze(1)])
        features = [torch.cat(parts) for parts in zip(features[:-1], rest[:-1], strict=True)]
        trusted, shares = _trusted(trainer, smoother, SMOOTHING_DEPTH)
        weights = smoothed_logits(own, second, trusted, explained, shares).exp()
        trainer.selection.smoothing = explained if explained > 0 else None
        logger.info(
            f"Weights of the {len(ids)} scored rows are smoothed: rows that look like it explain "
            f"{max(0.0, explained):.0%} of the variance of a row's weight."
        )
    return _ScoredRows(ids, weights, own_weights, features[0] if len(others) else None, others)


def _predict(trainer: BilevelSFTTrainer, known: _ScoredRows) -> _Predictions:
    """Fit a predictor on the scored rows; ask it about the others and the trusted rows."""
    assert known.features is not None
    # On weights by own scores: smoothed ones are a function of hidden states themselves, and easier to explain.
    predictor, depth = fit_weight_predictor(known.features, known.own_weights), trainer.args.pilot_feature_depth
    predicted = _predict_rows(trainer, predictor, known.others, depth, "Predicting weights")
    trusted, shares = _trusted(trainer, predictor, depth)
    count = len(known.ids)
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


def _read(
    trainer: BilevelSFTTrainer, places: Tensor, depths: Sequence[float], smoother: WeightPredictor | None = None
) -> list[Tensor]:
    """Features `[n, 2 d]` of rows at each depth; every process has all of them, to the last bit.

    Args:
        places: of the rows in the prepared set.
        depths: see `row_features`.
        smoother (*optional*): takes the place of the features at the last depth, `[n, 1]`.
    """
    width = 2 * trainer.model.config.get_text_config().hidden_size
    features = [torch.zeros(len(places), width) for _ in depths]
    if smoother is not None:
        features[-1] = torch.zeros(len(places), 1)
    if not depths or len(places) == 0:
        return features
    line = torch.zeros(trainer.row_count, dtype=torch.int64)
    line[sample_ids(trainer.rows)[places]] = torch.arange(len(places))
    for batch in row_batches(trainer, places, "Reading scored rows"):
        found = row_features(trainer, batch, depths)
        if smoother is not None:
            found[-1] = smoother(found[-1]).unsqueeze(1)
        for each, read in zip(features, found, strict=True):
            each[line[batch[SAMPLE_ID].cpu()]] = read.cpu()
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
