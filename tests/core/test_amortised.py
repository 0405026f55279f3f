"""Prediction of weights against closed forms."""

import numpy as np
import pytest
import torch

from trl_bilevel.core.amortised import fit_weight_predictor, pair_features, recalibrated
from trl_bilevel.core.calibration import FLOOR


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
