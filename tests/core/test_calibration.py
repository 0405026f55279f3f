"""Calibration and resampling: what they promise on scores of known distribution."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_bilevel.core.calibration import _lowest_kind, _quantile, calibrate, ending_logits
from trl_bilevel.core.resampling import systematic_resample


def calibrated_logits(*args):
    return calibrate(*args).logits


def lowest_kind(trusted, x):
    return _lowest_kind(trusted.double(), torch.ones(len(trusted), dtype=torch.float64), x.double())


def mixture(seed, good, bad, distance):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(good + bad, generator=generator)
    x[:good] += distance
    trusted = torch.randn(24, generator=generator) + distance
    return x, trusted


def good_mass(logits, good):
    weights = logits.exp()
    return float(weights[:good].sum() / weights.sum())


@pytest.mark.parametrize("seed", range(3))
def test_separated_rows_get_the_weight(seed):
    x, trusted = mixture(seed, 100, 300, 4.0)
    assert good_mass(calibrated_logits(x, trusted), 100) > 0.9


@pytest.mark.parametrize("seed", range(3))
def test_weights_are_near_uniform_where_there_is_nothing_to_select(seed):
    x, trusted = mixture(seed, 400, 0, 0.0)
    weights = calibrated_logits(x, trusted).exp()
    ess = float(weights.sum() ** 2 / (weights**2).sum()) / 400
    assert ess > 0.8


@pytest.mark.parametrize("seed", range(3))
def test_weights_approach_the_posterior(seed):
    x, trusted = mixture(seed, 2000, 2000, 2.0)
    weights = calibrated_logits(x, trusted).exp()
    posterior = torch.sigmoid(2 * x - 2)
    assert torch.corrcoef(torch.stack([weights, posterior]))[0, 1] > 0.95


@pytest.mark.parametrize("seed", range(5))
def test_separated_good_rows_weigh_the_same(seed):
    x, trusted = mixture(seed, 100, 100, 6.0)
    # Few and by chance all of the better half: no reason to visit some good rows more often than others.
    good = calibrated_logits(x, trusted.sort().values[12:20])[:100].exp()
    assert float(good.sum() ** 2 / (good**2).sum()) / 100 > 0.86


@pytest.mark.parametrize("seed", range(3))
def test_good_rows_of_a_rarer_kind_weigh_no_more(seed):
    """Half of the trusted rows are of a kind that gains more from validation than most good training rows."""
    generator = torch.Generator().manual_seed(seed)
    common, rare, bad = (
        centre + 0.3 * torch.randn(count, generator=generator)
        for centre, count in ((0.0, 200), (2.0, 60), (-6.0, 150))
    )
    trusted = torch.cat(
        [0.2 + 0.3 * torch.randn(8, generator=generator), 2 + 0.3 * torch.randn(8, generator=generator)]
    )
    weights = calibrated_logits(torch.cat([common, rare, bad]), trusted).exp()
    means = [float(part.mean()) for part in weights.split([200, 60, 150])]
    assert means[1] / means[0] < 1.3
    assert means[2] < 0.02


def two_kinds(seed):
    """Scores of 40 rows of a kind that gains much from validation, 100 of one that gains little, and 80 bad ones."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count, mean, spread):
        return mean + spread * torch.randn(count, generator=generator)

    high, low, bad = (40, 1.4, 0.15), (100, 0.2, 0.15), (80, -1.0, 0.5)
    return torch.cat([draw(*part) for part in (high, low, bad)]), draw


@pytest.mark.parametrize("seed", range(10))
def test_a_kind_in_the_minority_among_trusted_rows_keeps_its_weight(seed):
    """A quarter of the trusted rows held back can by chance hold three rows of a kind that is a half of all."""
    x, draw = two_kinds(seed)
    trusted = torch.cat([draw(9, 1.4, 0.15), draw(3, 0.2, 0.15)])
    assert len(lowest_kind(trusted, x)) == 3
    found = calibrate(x, trusted)
    high, low, bad = (float(part.mean()) for part in found.logits.exp().split([40, 100, 80]))
    assert high == 1 and low > 0.6 and bad < 0.25
    # What the trusted rows' mix says is not taken for the training rows'.
    assert found.good_share == pytest.approx((40 * high + 100 * low + 80 * bad) / 220, rel=1e-4)


@pytest.mark.parametrize("seed", range(10))
def test_bad_trusted_rows_are_no_kind_of_their_own(seed):
    """Nothing scores below them, so they do not set the level from which rows weigh in full."""
    x, draw = two_kinds(seed)
    trusted = torch.cat([draw(19, 0.2, 0.15), draw(5, -1.0, 0.05)])
    assert len(lowest_kind(trusted, x)) == 24
    assert float(calibrated_logits(x, trusted)[140:].exp().mean()) < 0.8


def test_a_tenth_of_the_trusted_rows_is_too_few_for_a_kind():
    """They may be bad, and worse rows below them prove nothing."""
    x, draw = two_kinds(0)
    x = torch.cat([x, draw(60, -6.0, 0.5)])
    trusted = torch.cat([draw(54, 0.2, 0.15), draw(6, -1.0, 0.05)])
    assert len(lowest_kind(trusted, x)) == 60


@pytest.mark.parametrize("count", [24, 64])
def test_trusted_rows_of_one_kind_are_one(count):
    generator = torch.Generator().manual_seed(count)
    x = torch.cat([torch.randn(100, generator=generator), torch.randn(100, generator=generator) - 6])
    for _ in range(50):
        trusted = torch.randn(count, generator=generator)
        assert len(lowest_kind(trusted, x)) == count


@pytest.mark.parametrize("level", [0.0, 0.1, 0.25, 0.5, 0.9, 1.0])
def test_quantiles_of_weighted_values(level):
    values = torch.tensor([3.0, 1.0, 2.0, 7.0, 4.0], dtype=torch.float64)
    expected = float(np.quantile(values.numpy(), level, method="hazen"))
    assert float(_quantile(values, torch.ones(5), level)) == pytest.approx(expected)
    assert float(_quantile(values, torch.full((5,), 0.3), level)) == pytest.approx(expected, abs=1e-6)
    # Values of no weight do not count, and heavy ones count as if repeated.
    assert float(_quantile(values, torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0]), level)) == 2.0
    weights = torch.tensor([1.0, 8.0, 1.0, 1.0, 1.0])
    assert float(_quantile(values, weights, 0.3)) < 1.1 < float(_quantile(values, torch.ones(5), 0.3))


def test_trusted_weights_count_like_repeated_rows():
    x, trusted = mixture(0, 100, 300, 2.0)
    trusted = trusted[:8]
    weights = torch.tensor([3.0, 1.0, 1.0, 2.0, 1.0, 1.0, 1.0, 2.0])
    weighted = calibrated_logits(x, trusted, weights)
    repeated = calibrated_logits(x, trusted.repeat_interleave(weights.long()))
    assert float((weighted - repeated).abs().max()) < 0.5
    assert float((weighted - calibrated_logits(x, trusted)).abs().max()) > 1e-3
    torch.testing.assert_close(calibrated_logits(x, trusted, torch.full((8,), 0.3)), calibrated_logits(x, trusted))


def test_surprising_endings_lose_weight_where_trusted_rows_end_as_expected():
    surprise = torch.cat([torch.full((50,), 0.05), torch.full((50,), 0.9)])
    logits = ending_logits(surprise, torch.full((8,), 0.05), torch.ones(100))
    # Rates (8 * .05 + 1) / 10 = .14 and (100 * .475 + 1) / 102 = .4755 by the rule of succession.
    ratio = (0.14 / 0.86) / (0.4755 / 0.5245)
    torch.testing.assert_close(logits.exp(), 1 - (1 - ratio) * surprise, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("trusted", "weights"),
    [
        (torch.full((8,), 0.5), torch.ones(100)),  # trusted rows surprise as often
        (torch.full((8,), 0.05), torch.cat([torch.ones(50), torch.zeros(50)])),  # the others have no weight anyway
    ],
)
def test_endings_change_nothing_without_evidence(trusted, weights):
    surprise = torch.cat([torch.full((50,), 0.05), torch.full((50,), 0.9)])
    assert ending_logits(surprise, trusted, weights).abs().max() < 1e-6


@settings(max_examples=50, deadline=None)
@given(
    scores=st.lists(st.floats(-5, 5, width=32), min_size=2, max_size=60),
    trusted=st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=20),
)
def test_a_better_score_never_weighs_less(scores, trusted):
    x = torch.tensor(scores)
    logits = calibrated_logits(x, torch.tensor(trusted))
    assert torch.isfinite(logits).all()
    order = torch.argsort(x)
    assert (logits[order].diff() >= -1e-5).all()


def test_an_outlier_does_not_set_the_scale():
    x, trusted = mixture(0, 100, 300, 4.0)
    x[200] = -300.0
    assert good_mass(calibrated_logits(x, trusted), 100) > 0.9


def test_scale_and_shift_do_not_matter():
    x, trusted = mixture(0, 50, 150, 1.5)
    torch.testing.assert_close(
        calibrated_logits(x, trusted), calibrated_logits(100 * x + 7, 100 * trusted + 7), atol=1e-3, rtol=1e-3
    )


def test_equal_scores_give_equal_weights():
    assert calibrated_logits(torch.ones(5), torch.ones(3)).abs().max() == 0


@pytest.mark.parametrize(
    ("scores", "trusted", "message"),
    [([1.0, 2.0], [], "at least one"), ([float("nan"), 1.0], [1.0], "finite"), ([1.0, 2.0], [float("inf")], "finite")],
)
def test_unusable_scores_are_refused(scores, trusted, message):
    with pytest.raises(ValueError, match=message):
        calibrated_logits(torch.tensor(scores), torch.tensor(trusted))


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.floats(0, 10), min_size=1, max_size=40).filter(lambda w: sum(w) > 1e-3),
    count=st.integers(1, 100),
    seed=st.integers(0, 1000),
)
def test_visits_are_floor_or_ceiling_of_the_expected_number(weights, count, seed):
    w = torch.tensor(weights, dtype=torch.float64)
    drawn = systematic_resample(w, count, torch.Generator().manual_seed(seed))
    visits = torch.bincount(drawn, minlength=len(weights)).double()
    expected = count * w / w.sum()
    assert len(drawn) == count
    assert ((visits - expected).abs() < 1 + 1e-6).all()


def test_equal_weights_visit_every_row_once():
    drawn = systematic_resample(torch.ones(37), 37, torch.Generator().manual_seed(1))
    assert sorted(drawn.tolist()) == list(range(37))


def test_resampling_is_unbiased():
    w = torch.tensor([0.1, 0.7, 1.3, 1.9])
    visits = torch.zeros(4)
    for seed in range(4000):
        visits += torch.bincount(systematic_resample(w, 4, torch.Generator().manual_seed(seed)), minlength=4)
    torch.testing.assert_close(visits / 4000, w, atol=0.03, rtol=0)


@pytest.mark.parametrize("weights", [[-1.0, 2.0], [0.0, 0.0], [float("nan"), 1.0]])
def test_unusable_weights_are_refused(weights):
    with pytest.raises(ValueError, match="finite weights"):
        systematic_resample(torch.tensor(weights), 3, torch.Generator())
