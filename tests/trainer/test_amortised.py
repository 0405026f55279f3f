"""Weights of rows that the pilot run does not score, and what rows say of each other."""

import functools

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from sklearn.metrics import roc_auc_score
from transformers import GPT2Config, GPT2LMHeadModel
from trl_bilevel.trainer.amortise import decoder_layers, predict_weights, row_features

from tests.conftest import parameters
from trl_bilevel import BilevelSFTTrainer


@pytest.fixture
def mixed(rows):
    """Half of the answers are boilerplate."""
    clean = [*rows[:40], *rows[60:120]]
    data = [row | {"completion": "I do not know, sorry."} if i % 2 else row for i, row in enumerate(clean)]
    return Dataset.from_list(data)


@pytest.fixture
def build(config, tiny_model, mixed, validation_rows, tokenizer):
    def make(train=None, adapter=True, **overrides):
        settings = {"pilot_steps": 12, "pilot_learning_rate": 1e-2, "validation_loss_weight": 0.0} | overrides
        return BilevelSFTTrainer(
            tiny_model(),
            config(**settings),
            train_dataset=mixed if train is None else train,
            validation_dataset=validation_rows,
            processing_class=tokenizer,
            peft_config=LoraConfig(r=4, target_modules="all-linear") if adapter else None,
        )

    return make


@pytest.mark.parametrize("adapter", [True, False], ids=["lora", "full"])
def test_bad_rows_are_found_without_being_scored(build, adapter):
    trainer = build(pilot_scored_rows=32, adapter=adapter, pilot_learning_rate=1e-2 if adapter else 3e-3)
    before = parameters(trainer)
    trainer.start_selection()
    weights = trainer.sample_weights()
    assert all(torch.equal(a, b) for a, b in zip(before, parameters(trainer), strict=True))
    unscored = trainer.row_order()[32:]
    good = [int(row) % 2 == 0 for row in unscored]
    assert roc_auc_score(good, weights[unscored]) > 0.9
    assert torch.isfinite(weights).all() and float(weights.mean()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("smoothing", [False, True])
def test_scored_rows_keep_their_weights(build, smoothing):
    """Weights among the scored rows are those that the same scores give without any row that was not scored."""
    found = {}

    def watch(trainer):
        calibrate = trainer.selection.calibrate

        def watched(scores, *rest):
            found["scores"], found["rest"] = scores, rest[:2]
            calibrate(scores, *rest)

        trainer.selection.calibrate = watched
        trainer.start_selection()
        return trainer.sample_weights()

    partly = watch(build(pilot_scored_rows=40, pilot_smoothing=smoothing))
    scored = ~torch.isnan(found["scores"]).any(-1)
    assert int(scored.sum()) == 40
    alone = build(train=build().train_dataset.select(scored.nonzero().squeeze(1).tolist()).remove_columns("sample_id"))
    predict = functools.partial(predict_weights, alone)
    alone.selection.calibrate(found["scores"][scored], *found["rest"], predict, smoothing)
    expected = alone.sample_weights()
    ratio = partly[scored] / expected
    torch.testing.assert_close(ratio, torch.full_like(ratio, float(ratio.mean())), rtol=1e-4, atol=0)


def test_only_lower_layers_are_computed(build):
    trainer = build()
    _, layers = decoder_layers(trainer.model)
    used = []
    for number, layer in enumerate(layers):
        layer.register_forward_hook(lambda *_, number=number: used.append(number))
    batch = trainer.collate_rows([0, 1, 2])
    (states,) = row_features(trainer, batch, [0.5])
    assert states.shape == (3, 64) and states.dtype == torch.float32
    assert used == [0]
    alone = torch.cat([row_features(trainer, trainer.collate_rows([row]), [0.5])[0] for row in (0, 1, 2)])
    torch.testing.assert_close(states, alone, atol=1e-5, rtol=1e-4)


def noisy(trainer, noise):
    """Have the trainer's scores drowned in noise."""
    calibrate = trainer.selection.calibrate

    def drowned(scores, *rest):
        generator = torch.Generator().manual_seed(0)
        spread = scores[:, :1].std()
        return calibrate(scores + noise * spread * torch.randn(scores.shape, generator=generator), *rest)

    trainer.selection.calibrate = drowned
    return trainer


@pytest.mark.parametrize("fitted", [2048, 80], ids=["all", "sample"])
def test_smoothing_finds_bad_rows_in_noisy_scores(build, mixed, monkeypatch, fitted):
    """Also where only a part of the scored rows is fitted on."""
    monkeypatch.setattr("trl_bilevel.trainer.amortise.FITTED_ROWS", fitted)
    good = [i % 2 == 0 for i in range(len(mixed))]
    quality = {}
    for smoothing in (False, True):
        trainer = noisy(build(pilot_smoothing=smoothing), 1.5)
        trainer.start_selection()
        weights = trainer.sample_weights()
        assert torch.isfinite(weights).all() and float(weights.mean()) == pytest.approx(1, abs=1e-5)
        quality[smoothing] = roc_auc_score(good, weights)
    assert quality[False] < 0.85 and quality[True] > quality[False] + 0.08


def test_few_rows_are_not_smoothed(build, mixed):
    """Fewer than 16 rows say nothing of each other."""
    weights = []
    for smoothing in (False, True):
        trainer = build(train=mixed.select(range(12)), pilot_smoothing=smoothing)
        trainer.start_selection()
        weights.append(trainer.sample_weights())
    torch.testing.assert_close(*weights)


def test_what_was_smoothed_is_recorded(build, tmp_path):
    trainer = build()
    trainer.start_selection()
    assert 0 < trainer.selection.smoothing < 1
    trainer.selection.save(tmp_path, {})
    other = build()
    other.selection.load(tmp_path)
    assert other.selection.smoothing == trainer.selection.smoothing
    plain = build(pilot_smoothing=False)
    plain.start_selection()
    assert plain.selection.smoothing is None


def test_layers_are_found_under_other_names(rows, tokenizer):
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=len(tokenizer))
    decoder, layers = decoder_layers(GPT2LMHeadModel(config))
    assert layers is decoder.h and len(layers) == 2


def test_models_without_a_list_of_layers_are_refused(tiny_model):
    model = tiny_model()
    model.model.layers = torch.nn.Sequential(*model.model.layers)
    with pytest.raises(ValueError, match="has no list of layers.*Set `pilot_smoothing=False`"):
        decoder_layers(model)


def test_states_of_another_shape_are_refused_before_the_pilot(build, monkeypatch):
    trainer = build()
    _, layers = decoder_layers(trainer.model)
    layers[0].register_forward_hook(lambda layer, args, output: output[None])
    monkeypatch.setattr(trainer, "row_losses", None)
    with pytest.raises(ValueError, match="cannot be read.*Set `pilot_smoothing=False`"):
        trainer.start_selection()
    assert trainer.model.training


def test_the_order_of_rows_does_not_matter(build, mixed):
    order = torch.randperm(len(mixed), generator=torch.Generator().manual_seed(3)).tolist()
    first, second = build(pilot_scored_rows=32), build(pilot_scored_rows=32, train=mixed.select(order))
    first.start_selection()
    second.start_selection()
    torch.testing.assert_close(second.sample_weights(), first.sample_weights()[order], atol=1e-5, rtol=1e-4)


def test_more_scored_rows_than_there_are(build):
    whole, capped = build(), build(pilot_scored_rows=1000)
    whole.start_selection()
    capped.start_selection()
    assert torch.equal(whole.sample_weights(), capped.sample_weights())


def test_groups_take_the_mean_of_predicted_weights(build, mixed):
    train = mixed.add_column("source", ["bad" if i % 2 else "good" for i in range(len(mixed))])
    trainer = build(train=train, pilot_scored_rows=32, selector_granularity="group", selector_group_column="source")
    trainer.start_selection()
    shares = trainer.selection.group_shares()
    rows = build(train=train, pilot_scored_rows=32)
    rows.start_selection()
    weights = rows.sample_weights()
    expected = float(weights[::2].sum() / weights.sum())
    assert expected > 0.6
    assert shares["good"] == pytest.approx(expected, abs=0.01)


def test_too_few_scored_rows_are_refused(config):
    with pytest.raises(ValueError, match="`pilot_scored_rows` must be at least 16, got 8"):
        config(pilot_scored_rows=8)
