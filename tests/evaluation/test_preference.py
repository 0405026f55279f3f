"""Win rates: what a biased judge, a perfect one and one that cannot decide come to."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_bilevel.evaluation import win_rate_with_swap
from trl_bilevel.evaluation.judges import ask_both_orders

FAST = {"resamples": 99}
VERDICTS = st.lists(st.tuples(st.sampled_from([0, 1, -1]), st.sampled_from([0, 1, -1])), min_size=1, max_size=30)


@pytest.mark.parametrize("place", [0, 1])
def test_a_judge_that_always_picks_one_position_gives_exactly_one_half(place):
    found = win_rate_with_swap([place] * 25, [place] * 25, **FAST)
    assert found.win_rate.value == 0.5
    assert (found.ties.value, found.consistent.value, found.first_position.value) == (1.0, 0.0, 1.0 - place)
    # Not a point: rows that would have told the two apart may be missing by chance.
    assert 0.4 < found.win_rate.low < 0.5 < found.win_rate.high < 0.6


def test_a_judge_that_cannot_decide_gives_one_half():
    found = win_rate_with_swap([-1] * 4, [-1] * 4, **FAST)
    assert (found.win_rate.value, found.ties.value, found.consistent.value) == (0.5, 1.0, 1.0)
    assert found.first_position is None


def test_rows_score_by_both_orders():
    forward, backward = [0, 0, 1, 1, 0, -1, -1], [1, 0, 1, 0, -1, 1, 0]
    found = win_rate_with_swap(forward, backward, **FAST)
    assert found.scores == [1.0, 0.5, 0.5, 0.0, 0.75, 0.75, 0.25]
    assert (found.wins.value, found.ties.value, found.losses.value) == (3 / 7, 2 / 7, 2 / 7)
    assert found.consistent.value == 2 / 7
    # Of 11 decided verdicts, 6 are for the first position.
    assert found.first_position.value == 6 / 11


@given(VERDICTS)
@settings(max_examples=40, deadline=None)
def test_exchanging_the_models_mirrors_the_result(pairs):
    forward, backward = [a for a, _ in pairs], [b for _, b in pairs]
    found, mirrored = win_rate_with_swap(forward, backward, **FAST), win_rate_with_swap(backward, forward, **FAST)
    assert mirrored.win_rate.value == pytest.approx(1 - found.win_rate.value)
    assert (mirrored.wins.value, mirrored.losses.value) == (found.losses.value, found.wins.value)
    assert found.win_rate.low <= found.win_rate.value + 1e-9 and found.win_rate.value - 1e-9 <= found.win_rate.high


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30))
@settings(max_examples=40, deadline=None)
def test_bias_for_a_position_cancels_where_the_judge_knows_nothing_else(rows):
    """Some rows the judge knows, on others it takes the first: only the known ones move the rate away from a half."""
    forward = [0 if not known or better else 1 for known, better in rows]
    backward = [0 if not known or not better else 1 for known, better in rows]
    expected = sum((1.0 if better else 0.0) if known else 0.5 for known, better in rows) / len(rows)
    assert win_rate_with_swap(forward, backward, **FAST).win_rate.value == pytest.approx(expected)


class Longer:
    """Prefers the longer response."""

    def judge(self, prompts, completions):
        return [-1 if len(a) == len(b) else int(len(b) > len(a)) for a, b in completions]


class First:
    def judge(self, prompts, completions):
        return [0 for _ in completions]


def test_judges_see_every_pair_in_both_orders():
    asked = ask_both_orders(Longer(), ["p", "q", "r"], ["long answer", "a", "same"], ["short", "bb", "size"])
    assert asked == ([0, 1, -1], [1, 0, -1])
    assert ask_both_orders(First(), ["p"], ["a"], ["b"]) == ([0], [0])


def test_a_judge_must_give_one_verdict_per_pair():
    class Lazy:
        def judge(self, prompts, completions):
            return [0]

    with pytest.raises(ValueError, match="Lazy.judge gave 1 verdicts for 2 pairs"):
        ask_both_orders(Lazy(), ["p", "q"], ["a", "b"], ["c", "d"])


@pytest.mark.parametrize(
    ("forward", "backward", "message"),
    [
        ([], [], "got 0 and 0"),
        ([0], [0, 1], "got 1 and 2"),
        ([2], [0], r"0 \(first\), 1 \(second\) or -1 \(undecided\), got \[2\]"),
    ],
)
def test_bad_input(forward, backward, message):
    with pytest.raises(ValueError, match=message):
        win_rate_with_swap(forward, backward)
