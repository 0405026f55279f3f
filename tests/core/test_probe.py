"""The probe against closed forms, on rows whose truth is known."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import KFold

from trl_bilevel.core.calibration import calibrate
from trl_bilevel.core.probe import STRENGTH, Mismatched, Scorer, _match, fit_probe, opinion_weight, tabulate
from trl_bilevel.core.statistics import effective_sample_size


def mixture(rows=400, trusted=32, width=30, distance=2.0, good=0.25, seed=0):
    """States (answer and prompt) of training rows and of trusted ones, and which rows are good: answers differ."""
    rng = np.random.default_rng(seed)
    direction = rng.normal(size=width)
    direction /= np.linalg.norm(direction)
    is_good = rng.random(rows) < good
    x = rng.normal(size=(rows, 2 * width))
    x[:, :width] += distance * np.outer(is_good, direction)
    y = rng.normal(size=(trusted, 2 * width))
    y[:, :width] += distance * direction
    return torch.from_numpy(x).float(), torch.from_numpy(y).float(), is_good


def pairs(rows=600, trusted=32, width=20, good=0.5, seed=0, shift=0.0):
    """Answers that repeat what their question is about, in good rows; in bad ones, what another question is about.

    And mismatched pairs of the same rows. `shift` moves the trusted rows' topic.
    """
    rng = np.random.default_rng(seed)

    def made(topics, told):
        return np.concatenate([told + 0.7 * rng.normal(size=told.shape), topics], axis=1)

    topics = rng.normal(size=(rows, width))
    is_good = rng.random(rows) < good
    x = made(topics, np.where(is_good[:, None], topics, rng.permutation(topics)))
    own = rng.normal(size=(trusted, width)) + shift
    answers = np.roll(np.arange(rows), 1)
    swapped = np.concatenate([x[answers, :width], x[:, width:]], axis=1)
    parts = (torch.from_numpy(part).float() for part in (x, made(own, own), swapped))
    x, y, swapped = parts
    return x, y, is_good, Mismatched(swapped, torch.arange(rows), torch.from_numpy(answers))


@pytest.fixture
def data():
    return mixture()


def equal(count):
    return torch.full((count,), 1 / count)


def test_good_rows_rank_above_bad_ones_without_labels(data):
    x, y, is_good = data
    fit = fit_probe(x, y, equal(len(y)))
    assert roc_auc_score(is_good, fit.scores) > 0.8
    assert fit.likeness_auc > 0.7 and fit.likeness_weight > 0.5 and fit.match_weight == 0
    further, _, truth = mixture(seed=0, rows=800)
    assert roc_auc_score(truth[400:], fit.probe(further[400:])) > 0.8


@pytest.mark.parametrize("width", [10, 300], ids=["narrow", "wide"])
def test_a_row_is_scored_by_a_fit_that_has_not_seen_it(width):
    """One fold left out by hand; also where there are more features than rows."""
    x, y, _ = mixture(width=width)
    fit = fit_probe(x, y, equal(len(y)))
    both = torch.cat([x, y]).double().numpy()
    z = (both - both[:400].mean(0)) / both[:400].std(0)
    product = z[:, :width] * z[:, width:]
    z = np.concatenate([z[:, :width], (product - product[:400].mean(0)) / product[:400].std(0)], axis=1)
    truth = np.arange(len(z)) >= 400
    weights = np.where(truth, 0.5 / 32, 0.5 / 400) * len(z)
    known = np.empty(len(z))
    folds = [KFold(5, shuffle=True, random_state=0).split(part) for part in (x, y)]
    for (_, first), (_, second) in zip(*folds, strict=True):
        held = np.zeros(len(z), bool)
        held[np.concatenate([first, second + 400])] = True
        model = LogisticRegression(C=STRENGTH / 400, tol=1e-3, max_iter=200)
        model.fit(z[~held], truth[~held], sample_weight=weights[~held])
        known[held] = model.decision_function(z[held])
    level, reach = known[:400].mean(), known[:400].std()
    standard = (known - level) / reach
    weight = opinion_weight(standard[400:], np.ones(32))
    assert fit.likeness_weight == pytest.approx(weight, rel=1e-3)
    scores = torch.cat([fit.scores, fit.trusted_scores]).numpy()
    np.testing.assert_allclose(scores, weight * standard, atol=5e-3 * weight)
    assert fit.likeness_auc == pytest.approx(roc_auc_score(truth, known), abs=2e-3)


def test_answers_to_other_questions_are_seen_by_the_match():
    x, y, is_good, mismatched = pairs()
    alone, both = fit_probe(x, y, equal(32)), fit_probe(x, y, equal(32), mismatched)
    assert both.match_weight > 0.5
    first, second = roc_auc_score(is_good, alone.scores), roc_auc_score(is_good, both.scores)
    assert second > 0.95 and second > first + 0.02


def test_the_match_does_not_depend_on_the_topic_of_the_trusted_rows():
    """Trusted rows all of another topic: likeness ranks by topic, and the match still sees what fits."""
    x, y, is_good, mismatched = pairs(shift=1.0)
    alone, both = fit_probe(x, y, equal(32)), fit_probe(x, y, equal(32), mismatched)
    first, second = roc_auc_score(is_good, alone.scores), roc_auc_score(is_good, both.scores)
    assert alone.likeness_auc > 0.9 and second > first + 0.02


def test_no_row_is_scored_by_a_match_that_has_seen_its_question_or_answer():
    """Null test: where no answer has to do with its question, training rows match as new rows do, no better."""
    rng = np.random.default_rng(0)

    def expanded(answer, prompt):
        return np.concatenate([answer, prompt, answer * prompt], axis=1)

    own, prompt, *new = rng.normal(size=(4, 400, 30))
    answers = np.roll(np.arange(400), 1)
    x, new, swapped = expanded(own, prompt), expanded(*new), expanded(own[answers], prompt)
    made_of = Mismatched(torch.from_numpy(swapped), torch.arange(400), torch.from_numpy(answers))
    fold = np.arange(400) // 80
    found = _match(x, new, swapped, made_of, fold)
    assert abs(found.rows.mean() - found.trusted.mean()) < 0.1 * found.rows.std()
    # A fit that has seen them says otherwise.
    seen = x @ found.coefficients + found.intercept
    assert seen.mean() - found.trusted.mean() > 0.15 * found.rows.std()


def test_too_few_pairs_leave_likeness_alone(data):
    x, y, _ = data
    few = Mismatched(x[:9], torch.arange(9), torch.arange(9) + 1)
    assert torch.equal(fit_probe(x, y, equal(32), few).scores, fit_probe(x, y, equal(32)).scores)


def test_an_opinion_counts_what_trusted_rows_show():
    """Fisher's discriminant of two normal distributions; nothing where the mean may well be chance."""
    rng = np.random.default_rng(0)
    many = rng.normal(2.0, 0.5, size=100_000)
    assert opinion_weight(many, np.ones(len(many))) == pytest.approx(2.0 / 0.25, rel=0.02)
    assert opinion_weight(-many, np.ones(len(many))) == 0
    chance = [opinion_weight(rng.normal(size=16), np.ones(16)) for _ in range(200)]
    assert np.median(chance) < 0.05 and np.mean(chance) < 0.25
    # Shares are what counts, not their scale, and rows of no share do not.
    some = rng.normal(1.0, 1.0, size=20)
    share = np.r_[np.ones(10), np.zeros(10)]
    assert opinion_weight(some, share) == pytest.approx(opinion_weight(some[:10], 5 * np.ones(10)))


def test_without_a_difference_weights_are_nearly_equal():
    """Null test: trusted rows that are drawn as training rows are, sixteen times. Some noise is left in few rows."""
    sizes, aucs = [], []
    for seed in range(16):
        x, y, _ = mixture(distance=0.0, seed=seed, trusted=64)
        fit = fit_probe(x, y, equal(len(y)))
        weights = calibrate(fit.scores, fit.trusted_scores).logits.exp()
        sizes.append(effective_sample_size(weights))
        aucs.append(fit.likeness_auc)
    assert np.median(sizes) > 0.9 and min(sizes) > 0.6
    assert 0.4 < np.mean(aucs) < 0.6


def test_scale_and_shift_of_states_change_nothing():
    x, y, _, mismatched = pairs()
    scale, shift = torch.linspace(0.1, 10, 40), torch.linspace(-5, 5, 40)
    moved = mismatched._replace(states=mismatched.states * scale + shift)
    one = fit_probe(x, y, equal(len(y)), mismatched)
    two = fit_probe(x * scale + shift, y * scale + shift, equal(len(y)), moved)
    torch.testing.assert_close(one.scores, two.scores, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(two.probe(x * scale + shift), one.probe(x), atol=2e-2, rtol=2e-2)


def test_a_feature_that_does_not_vary_is_left_out(data):
    x, y, _ = data

    def wider(states, value):
        column = torch.full((len(states), 1), value)
        return torch.cat([states[:, :30], column, states[:, 30:], column], 1)

    one, two = fit_probe(x, y, equal(len(y))), fit_probe(wider(x, 3.0), wider(y, 5.0), equal(len(y)))
    torch.testing.assert_close(one.scores, two.scores, atol=1e-4, rtol=1e-4)


def test_the_probe_is_the_mean_of_the_fits():
    """Of rows that no fit has seen, it says what the fits say of rows that they have not seen."""
    x, y, is_good, mismatched = pairs(rows=1200)
    fit = fit_probe(x[:600], y, equal(32), Mismatched(mismatched.states[1:600], *(p[1:600] for p in mismatched[1:])))
    again, unseen = fit.probe(x[:600]), fit.probe(x[600:])
    assert float(torch.corrcoef(torch.stack([again, fit.scores]))[0, 1]) > 0.95
    assert abs(float(unseen.mean() - fit.scores.mean())) < 0.25 * float(fit.scores.std())
    assert roc_auc_score(is_good[600:], unseen) > 0.9


def test_rows_that_count_more_draw_the_probe_their_way():
    """Two trusted kinds that lie apart: the one with nine tenths of the share decides."""
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(size=(400, 20))).float()
    y = torch.from_numpy(rng.normal(size=(40, 20))).float()
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


@pytest.mark.parametrize(("rows", "trusted"), [(1, 8), (8, 1)])
def test_a_single_row_is_refused(rows, trusted):
    with pytest.raises(ValueError, match=f"at least 2 rows of either kind, got {rows} and {trusted}"):
        fit_probe(torch.zeros(rows, 4), torch.zeros(trusted, 4), equal(trusted))


def test_rows_that_are_all_the_same_score_the_same():
    fit = fit_probe(torch.ones(20, 8), torch.ones(8, 8), equal(8))
    assert fit.scores.tolist() == [0.0] * 20 and fit.likeness_weight == 0


def test_a_scorer_gives_the_weights_that_it_was_made_from(data):
    x, y, _ = data
    fit = fit_probe(x, y, equal(len(y)))
    weights = calibrate(fit.probe(x), fit.probe(y)).logits.exp()
    scorer = tabulate(fit.probe, fit.probe(x), weights)
    torch.testing.assert_close(scorer(x), weights / weights.mean(), atol=0.05, rtol=0.05)
    again = Scorer.from_tensors(scorer.tensors("a."), "a.")
    assert torch.equal(again(y), scorer(y))
    # Beyond the knots, weights stay as they are at the ends.
    high, low = fit.probe(x).argmax(), fit.probe(x).argmin()
    away = 1000 * (fit.probe.coefficients[:60] / fit.probe.coefficients[:60].norm()).float()
    assert float(scorer((x[high] + away)[None])) <= float(scorer.weights.max()) + 1e-6
    assert float(scorer((x[low] - away)[None])) >= float(scorer.weights.min()) - 1e-6
