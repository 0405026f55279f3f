"""Prediction of weights against closed forms."""

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from trl_bilevel.core.calibration import FLOOR, Calibration, calibrate
from trl_bilevel.core.prediction import (
    cross_predictions,
    fit_weight_predictor,
    pair_features,
    recalibrated,
    smoothed_logits,
)


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(300, 20, generator=generator)
    direction = torch.randn(20, generator=generator)
    weights = torch.sigmoid(features @ direction / 3)
    return features, weights


def test_weights_of_unseen_rows_are_predicted(data):
    features, weights = data
    predictor = fit_weight_predictor(features[:200], weights[:200])
    found = predictor(features[200:])
    assert found.dtype == torch.float32 and found.shape == (100,)
    assert float(np.corrcoef(found, weights[200:])[0, 1]) > 0.9
    assert 0.8 < predictor.explained < 1


def test_the_error_is_that_of_rows_left_out(data):
    """Against leaving each row out and fitting anew, with the penalty that was chosen."""
    features, weights = data[0][:40], data[1][:40]
    predictor = fit_weight_predictor(features, weights)
    scaler, ridge = predictor.model[0], predictor.model[1]
    x, y = scaler.transform(features.double().numpy()), weights.double().numpy()
    errors = []
    for row in range(len(y)):
        keep = np.arange(len(y)) != row
        mean_x, mean_y = x[keep].mean(0), y[keep].mean()
        centred = x[keep] - mean_x
        gram = centred.T @ centred + ridge.alpha_ * np.eye(x.shape[1])
        slope = np.linalg.solve(gram, centred.T @ (y[keep] - mean_y))
        errors.append((x[row] - mean_x) @ slope + mean_y - y[row])
    assert predictor.error == pytest.approx(float(np.sqrt(np.mean(np.square(errors)))), rel=1e-6)


def test_features_that_say_nothing_give_the_mean():
    generator = torch.Generator().manual_seed(1)
    weights = torch.rand(100, generator=generator)
    predictor = fit_weight_predictor(torch.randn(100, 50, generator=generator), weights)
    assert predictor.explained < 0.1
    found = predictor(torch.randn(20, 50, generator=generator))
    torch.testing.assert_close(found, torch.full_like(found, float(weights.mean())), atol=0.05, rtol=0)


def test_equal_weights_stay_equal():
    predictor = fit_weight_predictor(torch.randn(20, 4), torch.full((20,), 0.5))
    torch.testing.assert_close(predictor(torch.randn(5, 4)), torch.full((5,), 0.5))


def test_unusable_input_is_refused():
    with pytest.raises(ValueError, match="at least 2"):
        fit_weight_predictor(torch.zeros(1, 3), torch.zeros(1))
    with pytest.raises(ValueError, match="same rows"):
        fit_weight_predictor(torch.zeros(4, 3), torch.zeros(3))
    with pytest.raises(ValueError, match="finite"):
        fit_weight_predictor(torch.full((4, 3), torch.nan), torch.zeros(4))


def test_an_answer_that_fits_its_question_is_seen():
    """Bad answers are good answers to other questions: nothing but the pair tells them apart."""
    generator = torch.Generator().manual_seed(2)
    questions = torch.randn(800, 12, generator=generator)
    answers = questions + 0.5 * torch.randn(800, 12, generator=generator)
    answers[::2] = answers[::2].roll(1, 0)
    weights = (torch.arange(800) % 2).float()
    features = {"pair": pair_features(questions, answers), "answer": answers}
    explained = {name: fit_weight_predictor(x[:400], weights[:400]).explained for name, x in features.items()}
    assert explained["pair"] > 0.5 and explained["answer"] < 0.1


def test_recalibrated_weights_are_as_sharp_as_trusted_rows_say():
    """Predictions drawn to the mean: two overlapping classes, a quarter of the rows good."""
    generator = torch.Generator().manual_seed(3)
    good = torch.arange(4000) % 4 == 0
    predicted = torch.where(good, 0.42, 0.2) + 0.05 * torch.randn(4000, generator=generator)
    trusted = 0.42 + 0.05 * torch.randn(32, generator=generator)
    weights = recalibrated(predicted, trusted, mean_weight=0.27)
    shares = [float(w[good].sum() / w.sum()) for w in (predicted, weights)]
    assert shares[0] < 0.45 and shares[1] > 0.9
    assert float(weights.min()) >= FLOOR and float(weights.max()) <= 1
    assert float(weights.mean()) == pytest.approx(0.27, abs=0.03)
    assert bool((weights[predicted.argsort()].diff() >= -1e-6).all())


def test_predictions_that_say_nothing_leave_the_mean_weight():
    generator = torch.Generator().manual_seed(4)
    predicted = 0.3 + 1e-3 * torch.randn(2000, generator=generator)
    weights = recalibrated(predicted, 0.3 + 1e-3 * torch.randn(40, generator=generator), mean_weight=0.3)
    assert float(weights.mean()) == pytest.approx(0.3, abs=0.01)
    assert float(weights.std() / weights.mean()) < 0.35
    equal = recalibrated(torch.full((10,), 0.4), torch.full((8,), 0.4), mean_weight=0.25)
    torch.testing.assert_close(equal, torch.full((10,), 0.25))


def test_a_row_is_predicted_without_its_own_weight(data):
    """Another weight of one row changes what is expected of others, not of itself."""
    features, weights = data
    changed = weights.clone()
    changed[7] = 5.0
    before, explained = cross_predictions(features, weights)
    after, _ = cross_predictions(features, changed)
    assert 0.8 < explained < 1
    torch.testing.assert_close(after[:30], before[:30])
    assert float((after[30:] - before[30:]).abs().max()) > 1e-3


def noisy_scores(seed, informative):
    """Noisy scores, features that tell the good rows apart or not, trusted rows of both."""
    generator = torch.Generator().manual_seed(seed)
    good = torch.arange(400) % 4 == 0
    features = torch.randn(440, 12, generator=generator)
    kinds = torch.cat([good, torch.ones(40, dtype=torch.bool)])
    if informative:
        features[kinds, 0] += 2.0
    scores = torch.where(kinds, 1.5, 0.0) + torch.randn(440, generator=generator)
    return good, scores[:400], scores[400:], features[:400], features[400:]


def smoothed(scores, trusted_scores, features, trusted_features):
    own = calibrate(scores, trusted_scores)
    second, explained = cross_predictions(features, own.logits.exp())
    trusted = fit_weight_predictor(features, own.logits.exp())(trusted_features)
    return own.logits, smoothed_logits(own, second, trusted, explained)


@pytest.mark.parametrize("seed", range(3))
def test_rows_like_it_correct_a_noisy_score(seed):
    good, *data = noisy_scores(seed, informative=True)
    alone, together = smoothed(*data)
    quality = [roc_auc_score(good, logits) for logits in (alone, together)]
    assert quality[0] < 0.9 and quality[1] > quality[0] + 0.04
    shares = [float(logits[good].exp().sum() / logits.exp().sum()) for logits in (alone, together)]
    assert shares[1] > shares[0] + 0.02


@pytest.mark.parametrize("seed", range(3))
def test_features_that_say_nothing_leave_scored_weights(seed):
    _, *data = noisy_scores(seed, informative=False)
    alone, together = smoothed(*data)
    torch.testing.assert_close((together - together.max()).exp(), (alone - alone.max()).exp(), atol=0.05, rtol=0)


def misplaced(seed, good):
    """Scores that tell good rows (45%) from bad ones without doubt; a twentieth of the rows look like the others."""
    generator = torch.Generator().manual_seed(seed)
    kind = torch.cat([torch.zeros(230), torch.ones(26), torch.full((256,), 2.0)])
    kind = kind[torch.randperm(512, generator=generator)]
    shown = torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0, 0, 0] * 4 if good else [0.0] * 40)
    data = []
    for kinds in (kind, shown):
        fine = (kinds == 0) | ((kinds == 1) & good)
        looks_fine = (kinds == 0) | ((kinds == 1) & (not good))
        scores = 4.0 * fine + 0.5 * torch.randn(len(kinds), generator=generator)
        features = torch.randn(len(kinds), 20, generator=generator)
        features[:, 0] += 3.0 * looks_fine
        data += [scores, features]
    weights = smoothed(data[0], data[2][:8], data[1], data[3])[1].exp()
    return float(weights[kind == 1].mean() / weights[kind == 0].mean())


@pytest.mark.parametrize("seed", range(3))
def test_a_score_without_doubt_stands_against_looks(seed):
    """Good rows of a rare kind that looks bad (a tenth of the trusted rows are of it), bad rows that look good."""
    assert misplaced(seed, good=True) > 0.8
    assert misplaced(seed, good=False) < 0.05


def test_odds_are_multiplied():
    """Against Bayes' rule written out, where densities are known: two independent looks at each row."""
    generator = torch.Generator().manual_seed(0)
    good = torch.arange(20_000) % 4 == 0
    looks = [3.0 * good + torch.randn(20_000, generator=generator) for _ in range(2)]
    trusted = [3.0 + torch.randn(400, generator=generator) for _ in range(2)]
    own = calibrate(looks[0], trusted[0])
    weights = smoothed_logits(own, looks[1], trusted[1], explained=1.0).exp()
    ratio = [torch.exp(3 * look - 4.5) for look in looks]
    posterior = ratio[0] * ratio[1] * 0.25 / (ratio[0] * ratio[1] * 0.25 + 0.75)
    assert float(torch.corrcoef(torch.stack([weights, posterior]))[0, 1]) > 0.97
    alone = float(torch.corrcoef(torch.stack([own.logits.exp(), posterior]))[0, 1])
    assert alone < 0.93


def test_without_anything_explained_nothing_changes():
    own = Calibration(torch.tensor([0.0, -3.0, -9.0]), 0.5)
    assert torch.equal(smoothed_logits(own, torch.rand(3), torch.rand(4), explained=-0.1), own.logits)


def test_smoothed_weights_have_a_floor():
    logits = torch.tensor([0.0, np.log(FLOOR), np.log(FLOOR), -0.1] * 50, dtype=torch.float32)
    second = torch.tensor([0.9, 0.1, 0.1, 0.9] * 50) + 0.01 * torch.arange(200) / 200
    found = smoothed_logits(Calibration(logits, 0.5), second, torch.full((8,), 0.9), explained=1.0)
    assert float(found.max()) == 0 and float(found.min()) >= np.log(FLOOR) - 1e-6
    assert torch.isfinite(found).all()


def test_too_few_rows_for_a_second_opinion_are_refused():
    with pytest.raises(ValueError, match="at least 4"):
        cross_predictions(torch.zeros(3, 2), torch.zeros(3))
