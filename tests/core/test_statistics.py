"""Small statistics and schedules."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from trl_bilevel.core.scores import RowLosses, difference_score, difference_scores, row_losses
from trl_bilevel.core.statistics import (
    data_ranks,
    effective_sample_size,
    evenly_spaced,
    gap_recovered,
    paired_standard_error,
    rows_carrying,
)
from trl_bilevel.data.batches import TrustedSampler, concatenate_batches


def test_gap_recovered():
    assert gap_recovered(uniform=3.0, selected=2.4, oracle=2.0) == pytest.approx(0.6)
    assert math.isnan(gap_recovered(uniform=2.0, selected=2.0, oracle=2.0))


def test_evenly_spaced_covers_both_ends():
    assert evenly_spaced(5, 100).tolist() == [0, 1, 2, 3, 4]
    index = evenly_spaced(10_000_000, 1000)
    assert len(index) == 1000 and index[0] == 0 and index[-1] == 9_999_999


def test_scores():
    losses = torch.tensor([1.0, 2.0])
    assert difference_score(torch.tensor([2.0, 2.0]), losses).tolist() == [0.5, 0.0]
    # Known by heart at both ends: no division by zero, no spurious signal from plain differences.
    assert torch.isfinite(difference_score(torch.zeros(2), torch.zeros(2))).all()


def test_row_losses_ignore_masked_positions():
    log_probs = torch.tensor([[-1.0, -2.0, 0.0], [0.0, 0.0, 0.0]])
    found = row_losses(log_probs, torch.tensor([[1, 1, 0], [0, 0, 0]]).bool())
    assert found.sums.tolist() == [3.0, 0.0] and found.counts.tolist() == [2.0, 1.0]
    assert found.means().tolist() == [1.5, 0.0] and found.endings.tolist() == [2.0, 0.0]


def test_endings_are_the_last_tokens_of_every_scored_stretch():
    log_probs = -torch.arange(1.0, 7.0).unsqueeze(0)
    mask = torch.tensor([[1, 1, 0, 1, 0, 1]]).bool()
    assert row_losses(log_probs, mask).endings.item() == pytest.approx((2 + 4 + 6) / 3)


def test_the_ending_surprise_is_the_chance_of_going_on():
    rows = RowLosses(torch.tensor([1.0, 2.0]), torch.ones(2), -torch.log(torch.tensor([1.0, 0.25])))
    torch.testing.assert_close(difference_scores(rows, rows), torch.tensor([[0.0, 0.0], [0.0, 0.75]]))


def test_ranks_put_ties_in_row_order_and_missing_last():
    ranks = data_ranks(torch.tensor([1.0, torch.nan, 2.0, 1.0, 0.0]))
    assert ranks.dtype == "int64" and ranks.tolist() == [1, 4, 0, 2, 3]
    assert data_ranks([]).tolist() == []


def test_numbers_of_weights():
    assert effective_sample_size(np.ones(7)) == pytest.approx(1)
    assert effective_sample_size([4.0, 0, 0, 0]) == pytest.approx(0.25)
    assert effective_sample_size(torch.tensor([1.0, torch.nan, 1.0])) == pytest.approx(1)
    assert effective_sample_size([math.nan, 0.0]) == effective_sample_size([]) == 0
    assert rows_carrying(np.ones(10)) == 8
    assert rows_carrying([6.0, math.nan, 2.0, 1.0, 1.0]) == 2
    assert rows_carrying(np.zeros(3)) == rows_carrying([]) == 0


def test_the_standard_error_is_of_the_differences():
    assert paired_standard_error([1.0, 2.0, 3.0], [1.1, 2.3, 3.2]) == pytest.approx(0.1 / 3**0.5)
    assert paired_standard_error([1.0, 2.0], [1.0]) is paired_standard_error([1.0], [1.0]) is None


def test_statistics_load_no_torch():
    code = "import sys, trl_bilevel.core.statistics, trl_bilevel.data.formats, trl_bilevel.data.files; "
    code += "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'trl', 'datasets')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(("size", "batch"), [(7, 3), (5, 5), (4, 10), (1, 1)])
def test_validation_sampler_passes_over_all_rows(size, batch):
    sampler = TrustedSampler(size, batch, seed=1)
    drawn = [row for step in range(3 * size) for row in sampler.rows(step)]
    for start in range(0, len(drawn) - size + 1, size):
        assert sorted(drawn[start : start + size]) == list(range(size))
    # A function of the step alone.
    assert TrustedSampler(size, batch, seed=1).rows(2) == sampler.rows(2)


def test_concatenation_pads_on_the_right():
    first = {"input_ids": torch.ones(1, 2, dtype=torch.long), "labels": torch.ones(1, 2, dtype=torch.long)}
    second = {"input_ids": torch.full((2, 3), 5), "labels": torch.full((2, 3), 5)}
    joined = concatenate_batches(first, second, pad_token_id=9)
    assert joined["input_ids"].tolist() == [[1, 1, 9], [5, 5, 5], [5, 5, 5]]
    assert joined["labels"].tolist()[0] == [1, 1, -100]
    with pytest.raises(ValueError, match="differ in their inputs"):
        concatenate_batches(first, second | {"pixels": torch.ones(2)}, 0)
