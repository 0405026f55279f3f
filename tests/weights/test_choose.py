"""From scores to weights: rows that are not scored, what rows alike say, and how weights are finished."""

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from tests.weights.conftest import prepare, trusted_sets
from trl_bilevel.core.statistics import effective_sample_size
from trl_bilevel.weights import choose as module
from trl_bilevel.weights import reading
from trl_bilevel.weights.choose import check_sizes, choose, finished
from trl_bilevel.weights.errors import NonFiniteScoreError
from trl_bilevel.weights.language_model import LanguageModel
from trl_bilevel.weights.pilot import Pilot
from trl_bilevel.weights.reading import Reading, mean_states
from trl_bilevel.weights.settings import PROBE_DEPTH, WeightSettings, default_pilot_steps


@pytest.fixture
def chosen(tiny_model, prepared, trusted):
    def run(rows=prepared, trusted=trusted, model=None, groups=None, seed=3, **settings):
        given = WeightSettings(**settings)
        given.resolve()
        return choose(LanguageModel(model or tiny_model()), rows, trusted, given, seed=seed, groups=groups)

    return run


GOOD = [n % 2 == 0 for n in range(80)]
PILOT = {"weight_estimator": "value_function", "pilot_steps": 8, "pilot_learning_rate": 1e-2}
BOTH = PILOT | {"weight_estimator": "both"}


@pytest.mark.parametrize("settings", [{}, PILOT, BOTH], ids=["probe", "pilot", "both"])
def test_bad_rows_are_found(settings, chosen):
    found = chosen(**settings)
    assert found.facts["rows_scored"] == 80 and bool(found.scores.isfinite().all())
    assert roc_auc_score(GOOD, found.weights) > 0.9
    assert bool(found.weights.isfinite().all()) and float(found.weights.mean()) == pytest.approx(1, abs=1e-5)
    # A probe's scores come from fits that have not seen the row, a pilot's of trusted rows that it held back.
    assert len(found.trusted_scores) == len(found.held_back) == (20 if settings == {} else 5)
    assert (found.scorer is None) == (settings != {})


def test_both_opinions_are_added_by_what_trusted_rows_show(chosen, monkeypatch):
    """A pilot that knows nothing changes nothing of the order; one that knows it all decides."""
    plain, scores = chosen(), module._row_scores

    def said(of_rows, of_trusted):
        """Have the pilot say this."""

        def row_scores(name, *args):
            if name == "probe":
                return scores(name, *args)
            return torch.stack([of_rows, torch.zeros(80)], dim=-1)

        monkeypatch.setattr(module, "_row_scores", row_scores)
        monkeypatch.setattr(
            module, "trusted_values", lambda sets, values: torch.tensor([[of_trusted, 0.0]] * len(sets))
        )

    said(torch.rand(80, generator=torch.Generator().manual_seed(0)), 0.0)
    blind = chosen(**BOTH)
    assert blind.facts["pilot_weight"] == 0
    assert torch.equal(blind.scores[:, 0], plain.scores[:, 0])
    said(torch.tensor(GOOD).float(), 1.0)
    knowing = chosen(**BOTH)
    assert knowing.facts["pilot_weight"] > 1
    assert roc_auc_score(GOOD, knowing.weights) == 1.0


def test_a_scorer_weighs_further_rows(chosen, rows, tokenizer, tiny_model):
    """Rows that were not there get weights of the same scale."""
    from tests.weights.conftest import LAZY

    found = chosen()
    new = prepare([*rows[100:120], *(row | {"completion": LAZY} for row in rows[100:120])], tokenizer)
    weights = found.scorer(mean_states(LanguageModel(tiny_model().eval()), new.batch(range(40)), PROBE_DEPTH))
    assert roc_auc_score([True] * 20 + [False] * 20, weights) > 0.9


def test_equal_scores_give_equal_weights(chosen, monkeypatch, caplog):
    monkeypatch.setattr(module, "_row_scores", lambda name, score, passes, reading, *args: torch.zeros(80, 2))
    monkeypatch.setattr(module, "trusted_values", lambda trusted, values: torch.zeros(len(trusted), 2))
    found = chosen(**PILOT)
    assert found.weights.tolist() == [1.0] * 80 and "nothing to select by" in caplog.text


def test_held_back_rows_do_not_pull(chosen, monkeypatch):
    """Calibration rests on trusted rows that neither end has learned from."""
    seen = []
    train = Pilot.train

    def watch(pilot, rows, trusted, done):
        seen.append({tuple(row["input_ids"]) for part in trusted.sets.values() for row in part.dataset})
        train(pilot, rows, trusted, done)

    monkeypatch.setattr(Pilot, "train", watch)
    found = chosen(**PILOT)
    held = {tuple(row["input_ids"]) for part in found.held_back.sets.values() for row in part.dataset}
    assert len(held) == 5 and len(seen[0]) == 15 and not held & seen[0]
    assert found.trusted_scores.shape == (5, 2) and float(found.held_back.shares().sum()) == pytest.approx(1)


def test_groups_share_the_mean(chosen):
    groups = torch.arange(80) % 4
    alone, grouped = chosen(), chosen(groups=groups)
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
    assert chosen(weight_estimator="value_function").facts["steps"] == 10


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
    found = chosen(data, trusted, seed=seed)
    assert effective_sample_size(found.weights) > 0.8


def test_the_probe_trains_nothing(chosen, monkeypatch):
    monkeypatch.setattr(Pilot, "train", None)
    assert chosen().facts["estimator"] == "probe"


def test_the_probe_scores_rows_that_it_was_not_made_from(chosen, monkeypatch):
    monkeypatch.setattr(module, "FITTED_ROWS", 40)
    found = chosen()
    assert not bool(found.scores.isnan().any())
    assert roc_auc_score(GOOD, found.weights) > 0.9


def test_without_the_match_rows_are_read_once(chosen, monkeypatch):
    monkeypatch.setattr(Reading, "mismatched", None)
    found = chosen(selector_preset="fast")
    assert found.facts["match_weight"] == 0 and roc_auc_score(GOOD, found.weights) > 0.9


def test_the_probe_weighs_further_rows_as_it_weighs_these(chosen, prepared, tiny_model):
    """A stream's rows: the scorer against the weights of the rows that it was made from."""
    model = tiny_model()
    found = chosen(model=model)
    again = found.scorer(mean_states(LanguageModel(model), prepared.batch(list(range(80))), PROBE_DEPTH))
    assert np.corrcoef(again, found.weights)[0, 1] > 0.9


def test_the_probe_gives_equal_weights_where_trusted_rows_are_no_better(chosen, tokenizer, mixed):
    """Null test: the trusted rows are training rows, drawn at random."""
    found = chosen(trusted=trusted_sets(tokenizer, validation=mixed[::3]))
    assert effective_sample_size(found.weights) > 0.7


def test_a_state_that_is_not_a_number_stops_the_probe(chosen, monkeypatch):
    whole = reading.mean_states

    def broken(model, batch, depth):
        found = whole(model, batch, depth)
        return torch.where(torch.arange(len(found))[:, None] == 0, torch.nan, found)

    monkeypatch.setattr(reading, "mean_states", broken)
    with pytest.raises(NonFiniteScoreError, match=r"sample_id.*NaN or infinite"):
        chosen()
