"""The probe against closed forms, on rows whose truth is known."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import KFold

from trl_bilevel.core.calibration import calibrate
from trl_bilevel.core.probe import STRENGTHS, fit_probe
from trl_bilevel.core.statistics import effective_sample_size


def mixture(rows=400, trusted=32, width=30, distance=2.0, good=0.25, seed=0):
    """Features of training rows and of trusted ones, and which training rows are good: two Gaussians."""
    rng = np.random.default_rng(seed)
    direction = rng.normal(size=width)
    direction /= np.linalg.norm(direction)
    is_good = rng.random(rows) < good
    x = rng.normal(size=(rows, width)) + distance * np.outer(is_good, direction)
    y = rng.normal(size=(trusted, width)) + distance * direction
    return torch.from_numpy(x).float(), torch.from_numpy(y).float(), is_good


@pytest.fixture
def data():
    return mixture()


def equal(count):
    return torch.full((count,), 1 / count)


def test_good_rows_rank_above_bad_ones_without_labels(data):
    x, y, is_good = data
    fit = fit_probe(x, y, equal(len(y)))
    assert roc_auc_score(is_good, fit.scores) > 0.85
    assert fit.auc > 0.75 and fit.strength in STRENGTHS
    further, _, truth = mixture(seed=0, rows=800)
    assert roc_auc_score(truth[400:], fit.probe(further[400:])) > 0.85


@pytest.mark.parametrize("width", [30, 900], ids=["narrow", "wide"])
def test_a_row_is_scored_by_a_fit_that_has_not_seen_it(width):
    """One fold left out by hand; also where there are more features than rows, which takes another path."""
    x, y, _ = mixture(width=width)
    fit = fit_probe(x, y, equal(len(y)))
    z = (torch.cat([x, y]).double() - x.double().mean(0)) / x.double().std(0, unbiased=False)
    truth = np.arange(len(z)) >= len(x)
    weights = np.where(truth, 0.5 / len(y), 0.5 / len(x)) * len(z)
    scores = torch.cat([fit.scores, fit.trusted_scores])
    first_x = next(KFold(5, shuffle=True, random_state=0).split(x))[1]
    first_y = next(KFold(5, shuffle=True, random_state=0).split(y))[1] + len(x)
    held = np.zeros(len(z), bool)
    held[np.concatenate([first_x, first_y])] = True
    model = LogisticRegression(C=fit.strength, tol=1e-3, max_iter=200)
    model.fit(z[~held], truth[~held], sample_weight=weights[~held])
    np.testing.assert_allclose(scores[held], model.decision_function(z[held]), atol=5e-3)


def test_without_a_difference_weights_are_nearly_equal():
    """Null test: trusted rows that are drawn as training rows are, sixteen times. Some noise is left in few rows."""
    sizes, aucs = [], []
    for seed in range(16):
        x, y, _ = mixture(distance=0.0, seed=seed, trusted=64)
        fit = fit_probe(x, y, equal(len(y)))
        weights = calibrate(fit.scores, fit.trusted_scores).logits.exp()
        sizes.append(effective_sample_size(weights))
        aucs.append(fit.auc)
    assert np.median(sizes) > 0.9 and min(sizes) > 0.6
    assert 0.4 < np.mean(aucs) < 0.6


@pytest.mark.parametrize("width", [30, 900], ids=["narrow", "wide"])
def test_scale_and_shift_of_features_change_nothing(width):
    """Also where there are more features than rows, which takes another path."""
    x, y, is_good = mixture(width=width, distance=6.0)
    scale, shift = torch.linspace(0.1, 10, width), torch.linspace(-5, 5, width)
    one, two = fit_probe(x, y, equal(len(y))), fit_probe(x * scale + shift, y * scale + shift, equal(len(y)))
    assert one.strength == two.strength
    torch.testing.assert_close(one.scores, two.scores, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(two.probe(x * scale + shift), one.probe(x), atol=1e-2, rtol=1e-2)
    assert roc_auc_score(is_good, one.scores) > 0.9


def test_a_feature_that_does_not_vary_is_left_out(data):
    x, y, _ = data
    constant = torch.full((len(x), 1), 3.0)
    one = fit_probe(x, y, equal(len(y)))
    two = fit_probe(torch.cat([x, constant], 1), torch.cat([y, torch.full((len(y), 1), 5.0)], 1), equal(len(y)))
    torch.testing.assert_close(one.scores, two.scores, atol=1e-4, rtol=1e-4)


def test_rows_that_count_more_draw_the_probe_their_way():
    """Two trusted kinds that lie apart: the one with nine tenths of the share decides."""
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(size=(400, 10))).float()
    y = torch.from_numpy(rng.normal(size=(40, 10))).float()
    y[:20, 0] += 4
    y[20:, 1] += 4
    for heavy, light in ((0, 1), (1, 0)):
        shares = torch.full((40,), 0.1 / 20)
        shares[20 * heavy : 20 * heavy + 20] = 0.9 / 20
        coefficients = fit_probe(x, y, shares).probe.coefficients
        assert coefficients[heavy] > 1.5 * coefficients[light] > 0


def test_eight_trusted_rows_are_enough_for_an_obvious_difference():
    x, y, is_good = mixture(trusted=8, distance=5.0)
    assert roc_auc_score(is_good, fit_probe(x, y, equal(8)).scores) > 0.95
