"""From scores to weights: rows that are not scored, what rows alike say, and how weights are finished."""

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from tests.weights.conftest import prepare, trusted_sets
from trl_bilevel.core.statistics import effective_sample_size
from trl_bilevel.weights import choose as module
from trl_bilevel.weights.choose import check_sizes, choose, finished
from trl_bilevel.weights.errors import NonFiniteScoreError
from trl_bilevel.weights.language_model import LanguageModel
from trl_bilevel.weights.pilot import Pilot
from trl_bilevel.weights.prediction import features
from trl_bilevel.weights.settings import PROBE_DEPTH, WeightSettings, default_pilot_steps


@pytest.fixture
def chosen(tiny_model, prepared, trusted):
    def run(rows=prepared, trusted=trusted, model=None, groups=None, further=False, seed=3, **settings):
        given = WeightSettings(**({"pilot_steps": 8, "pilot_learning_rate": 1e-2} | settings))
        given.resolve()
        reader = LanguageModel(model or tiny_model())
        return choose(reader, rows, trusted, given, seed=seed, groups=groups, further=further)

    return run


GOOD = [n % 2 == 0 for n in range(80)]


def test_bad_rows_are_found_without_being_scored(chosen):
    found = chosen(pilot_scored_rows=32)
    unscored = found.scores[:, 0].isnan()
    assert int(unscored.sum()) == 48
    good = [good for good, out in zip(GOOD, unscored.tolist(), strict=True) if out]
    assert roc_auc_score(good, found.weights[unscored]) > 0.9
    assert bool(found.weights.isfinite().all()) and float(found.weights.mean()) == pytest.approx(1, abs=1e-5)


def noisy(monkeypatch, noise):
    """Have scores drowned in noise."""
    scores = module._row_scores

    def drowned(*args):
        found = scores(*args)
        generator = torch.Generator().manual_seed(0)
        return found + noise * found[:, :1].std() * torch.randn(found.shape, generator=generator)

    monkeypatch.setattr(module, "_row_scores", drowned)


@pytest.mark.parametrize("fitted", [2048, 60], ids=["all", "sample"])
def test_rows_alike_correct_noisy_scores(fitted, chosen, monkeypatch):
    """Also where only a part of the scored rows is fitted on."""
    monkeypatch.setattr("trl_bilevel.weights.prediction.FITTED_ROWS", fitted)
    noisy(monkeypatch, 1.5)
    found = chosen()
    assert bool(found.weights.isfinite().all()) and float(found.weights.mean()) == pytest.approx(1, abs=1e-5)
    alone, together = roc_auc_score(GOOD, found.scores[:, 0]), roc_auc_score(GOOD, found.weights)
    assert alone < 0.9 and together > alone + 0.05
    assert 0 < found.facts["smoothing"] < 1


def test_few_rows_are_not_smoothed(chosen, mixed, tokenizer):
    """Fewer than 16 rows say nothing of each other."""
    assert chosen(prepare(mixed[:12], tokenizer)).facts["smoothing"] is None


def test_more_scored_rows_than_there_are(chosen):
    assert torch.equal(chosen(pilot_scored_rows=0).weights, chosen(pilot_scored_rows=1000).weights)


def test_features_do_not_depend_on_the_batch(tiny_model, prepared):
    reader = LanguageModel(tiny_model().eval())
    (together,) = features(reader, prepared.batch([0, 1, 2]), [0.5])
    assert together.shape == (3, 64) and together.dtype == torch.float32
    alone = torch.cat([features(reader, prepared.batch([row]), [0.5])[0] for row in (0, 1, 2)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def test_a_predictor_of_further_rows(chosen, rows, tokenizer, tiny_model):
    """At most half of the rows are scored then; rows that were not there get weights of the same scale."""
    from tests.weights.conftest import LAZY

    found = chosen(further=True)
    assert int(found.scores[:, 0].isfinite().sum()) == 40
    new = prepare([*rows[100:120], *(row | {"completion": LAZY} for row in rows[100:120])], tokenizer)
    weights = found.predictor(*features(LanguageModel(tiny_model().eval()), new.batch(range(40)), [0.3]))
    assert roc_auc_score([True] * 20 + [False] * 20, weights) > 0.9
    assert chosen().predictor is None


def test_equal_scores_give_equal_weights(chosen, monkeypatch, caplog):
    monkeypatch.setattr(module, "_row_scores", lambda score, passes, rows, *args: torch.zeros(rows.count, 2))
    monkeypatch.setattr(module, "trusted_values", lambda trusted, values: torch.zeros(len(trusted), 2))
    found = chosen()
    assert found.weights.tolist() == [1.0] * 80 and "nothing to select by" in caplog.text


def test_held_back_rows_do_not_pull(chosen, monkeypatch):
    """Calibration rests on trusted rows that neither end has learned from."""
    seen = []
    train = Pilot.train

    def watch(pilot, rows, trusted, done):
        seen.append({tuple(row["input_ids"]) for part in trusted.sets.values() for row in part.dataset})
        train(pilot, rows, trusted, done)

    monkeypatch.setattr(Pilot, "train", watch)
    found = chosen()
    held = {tuple(row["input_ids"]) for part in found.held_back.sets.values() for row in part.dataset}
    assert len(held) == 5 and len(seen[0]) == 15 and not held & seen[0]
    assert found.trusted_scores.shape == (5, 2) and float(found.held_back.shares().sum()) == pytest.approx(1)


def test_groups_share_the_mean(chosen):
    groups = torch.arange(80) % 4
    alone, grouped = chosen(pilot_scored_rows=32), chosen(pilot_scored_rows=32, groups=groups)
    expected = alone.weights.view(20, 4).mean(0).repeat(20)
    torch.testing.assert_close(grouped.weights, expected, atol=1e-6, rtol=1e-5)


def test_too_few_rows(chosen, prepared, trusted, rows, tokenizer):
    nothing = prepare([{"prompt": "long " * 200, "completion": "x"}] * 3, tokenizer)
    with pytest.raises(ValueError, match="None of the 3 training rows.*`max_length`"):
        check_sizes(nothing, trusted)
    with pytest.raises(ValueError, match="has 7 usable rows; at least 8"):
        chosen(trusted=trusted_sets(tokenizer, a=rows[40:47]))
    check_sizes(prepared, trusted_sets(tokenizer, a=rows[40:48]))


def test_steps_by_default(chosen):
    assert [default_pilot_steps(n) for n in (1, 64, 80, 192, 10_000)] == [8, 8, 10, 24, 24]
    assert chosen(pilot_steps=None).facts["steps"] == 10


def test_finished_weights():
    weights, kept = torch.tensor([1.0, 2.0, 3.0, 4.0, 9.0]), torch.tensor([True, True, True, True, False])
    plain = finished(weights, kept)
    torch.testing.assert_close(plain[:4], torch.tensor([0.4, 0.8, 1.2, 1.6]))
    assert bool(plain[4].isnan()) and plain.dtype == torch.float32
    grouped = finished(weights, kept, torch.tensor([0, 0, 1, 1, 1]))
    torch.testing.assert_close(grouped[:4], torch.tensor([0.6, 0.6, 1.4, 1.4]))
    filtered = finished(weights, kept, filter_rate=0.5)
    torch.testing.assert_close(filtered[:4], torch.tensor([0.0, 0.0, 12 / 7, 16 / 7]))
    # A group all of whose rows were dropped does no harm.
    assert finished(weights, kept, torch.tensor([0, 0, 0, 0, 1]))[:4].tolist() == [1.0] * 4


@pytest.mark.parametrize("seed", range(3))
def test_sampling_noise_alone_gives_nearly_equal_weights(seed, chosen, rows, tokenizer):
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    drawn = [rows[n] for n in order]
    data, trusted = prepare(drawn[:80], tokenizer), trusted_sets(tokenizer, validation=drawn[80:])
    found = chosen(data, trusted, seed=seed, pilot_learning_rate=1e-3)
    assert effective_sample_size(found.weights) > 0.8


def test_the_probe_finds_bad_rows_and_trains_nothing(chosen, monkeypatch):
    monkeypatch.setattr(Pilot, "train", None)
    found = chosen(weight_estimator="probe", pilot_steps=None)
    assert found.facts["estimator"] == "probe" and found.facts["rows_scored"] == 80
    assert roc_auc_score(GOOD, found.weights) > 0.9
    assert float(found.weights.mean()) == pytest.approx(1, abs=1e-5)
    # All trusted rows have a score, by a fit that has not seen them.
    assert len(found.trusted_scores) == len(found.held_back)


def test_the_probe_scores_rows_that_it_was_not_fitted_on(chosen, monkeypatch):
    monkeypatch.setattr(module, "FITTED_ROWS", 40)
    found = chosen(weight_estimator="probe", pilot_steps=None, further=True)
    assert not bool(found.scores.isnan().any())
    assert roc_auc_score(GOOD, found.weights) > 0.9
    assert found.predictor is not None


def test_the_probe_weighs_further_rows_as_it_weighs_these(chosen, prepared, tiny_model):
    """A stream's rows: the tabulated predictor against the weights of the rows that it was made from."""
    model = tiny_model()
    found = chosen(model=model, weight_estimator="probe", pilot_steps=None, further=True)
    (states,) = features(LanguageModel(model), prepared.batch(list(range(80))), [PROBE_DEPTH])
    again = found.predictor(states)
    assert np.corrcoef(again, found.weights)[0, 1] > 0.9


def test_the_probe_gives_equal_weights_where_trusted_rows_are_no_better(chosen, tokenizer, mixed):
    """Null test: the trusted rows are training rows, drawn at random."""
    trusted = trusted_sets(tokenizer, validation=mixed[::3])
    found = chosen(trusted=trusted, weight_estimator="probe", pilot_steps=None)
    assert effective_sample_size(found.weights) > 0.7


def test_a_state_that_is_not_a_number_stops_the_probe(chosen, monkeypatch):
    whole = module.features

    def broken(model, batch, depths):
        (found,) = whole(model, batch, depths)
        return [torch.where(torch.arange(len(found))[:, None] == 0, torch.nan, found)]

    monkeypatch.setattr("trl_bilevel.weights.prediction.features", broken)
    with pytest.raises(NonFiniteScoreError, match=r"sample_id.*NaN or infinite"):
        chosen(weight_estimator="probe", pilot_steps=None)


@pytest.mark.parametrize("name", ["pilot_steps", "pilot_scored_rows"])
def test_settings_of_a_pilot_have_no_meaning_for_the_probe(name):
    with pytest.raises(ValueError, match=f"`{name}=32`.*trains no pilot"):
        WeightSettings(weight_estimator="probe", **{name: 32}).resolve()
