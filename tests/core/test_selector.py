"""The published selector against autograd, against its definition, and at scale."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trl_bilevel.core import selector as core


def random_state(seed, rows):
    generator = torch.Generator().manual_seed(seed)
    state = core.init_selector(torch.ones(rows, dtype=torch.bool))
    state.logits.copy_(torch.randn(rows, generator=generator) * 2)
    core.refresh_total(state)
    return state, generator


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), rows=st.integers(2, 20), batch=st.integers(1, 12))
def test_minibatch_gradient_equals_autograd(seed, rows, batch):
    state, generator = random_state(seed, rows)
    index = torch.randint(0, rows, (batch,), generator=generator)
    losses = torch.randn(batch, generator=generator)
    logits = state.logits.double().requires_grad_()
    p = torch.softmax(logits, 0)
    (rows * (p[index] * losses.double()).mean()).backward()
    torch.testing.assert_close(
        core.minibatch_gradient(state, index, losses).double(), logits.grad, atol=1e-6, rtol=1e-6
    )


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000))
@example(seed=4793)  # a heavy row, repeated in a batch, comes down again
def test_the_running_sum_stays_exact(seed):
    state, generator = random_state(seed, 15)
    for _ in range(30):
        index = torch.randint(0, 15, (6,), generator=generator)
        scores = torch.randn(6, generator=generator)
        core.update_sparse_centred(state, index, scores, learning_rate=1.0, entropy_coef=0.05)
    p = torch.softmax(state.logits.double(), 0)
    weights = core.sample_weights(state, torch.arange(15))
    torch.testing.assert_close(weights.double(), 15 * p, rtol=1e-5, atol=1e-6)
    assert math.isclose(float(weights.mean()), 1.0, rel_tol=1e-5)


def test_equal_logits_give_weight_one_exactly():
    state = core.init_selector(torch.ones(1_000_003, dtype=torch.bool))
    assert torch.equal(core.sample_weights(state, torch.arange(50)), torch.ones(50))


def test_rows_that_are_not_trained_on_have_no_weight():
    state = core.init_selector(torch.tensor([True, False, True]))
    assert core.sample_weights(state, torch.arange(3)).tolist() == [1.0, 0.0, 1.0]


def test_no_active_row_is_refused():
    with pytest.raises(ValueError, match="at least one row"):
        core.init_selector(torch.zeros(3, dtype=torch.bool))


def test_repeated_rows_count_once():
    twice = core.init_selector(torch.ones(4, dtype=torch.bool))
    once = core.init_selector(torch.ones(4, dtype=torch.bool))
    settings_ = {"learning_rate": 0.5, "entropy_coef": 0.0}
    # The same running statistics in both, so that only the treatment of the repetition differs.
    for state in (twice, once):
        core.standardise(state, torch.tensor([-1.0, 1.0]))
        state.score_stats.copy_(torch.tensor([0.0, 1.0], dtype=torch.float64))
    core.update_sparse_centred(twice, torch.tensor([0, 1, 1, 0]), torch.tensor([1.0, -1.0, -1.0, 1.0]), **settings_)
    core.update_sparse_centred(once, torch.tensor([0, 1]), torch.tensor([1.0, -1.0]), **settings_)
    torch.testing.assert_close(twice.logits, once.logits)
    torch.testing.assert_close(twice.total, once.total)


def test_a_sparse_update_leaves_other_rows_alone_and_prefers_high_scores():
    state = core.init_selector(torch.ones(6, dtype=torch.bool))
    core.update_sparse_centred(
        state, torch.tensor([1, 4]), torch.tensor([2.0, -2.0]), learning_rate=0.5, entropy_coef=0.0
    )
    assert state.logits[[0, 2, 3, 5]].abs().max() == 0
    assert state.logits[1] > 0 > state.logits[4]


def test_adam_follows_torch_adam():
    state = core.init_selector(torch.ones(8, dtype=torch.bool), adam=True)
    logits = torch.zeros(8, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.1, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        index = torch.randperm(8, generator=generator)[:3]
        scores = torch.randn(3, generator=generator)
        optimizer.zero_grad()
        p = torch.softmax(logits, 0)
        (-(8 * p[index] * scores.double()).mean()).backward()
        optimizer.step()
        core.update_adam(state, index, scores, learning_rate=0.1, betas=(0.9, 0.95))
    torch.testing.assert_close(state.logits.double(), logits.detach(), atol=1e-4, rtol=1e-4)


def test_state_survives_a_round_trip_exactly():
    state, generator = random_state(3, 12)
    core.update_sparse_centred(
        state, torch.arange(5), torch.randn(5, generator=generator), learning_rate=0.5, entropy_coef=0.1
    )
    other = core.init_selector(torch.ones(12, dtype=torch.bool))
    other.load_tensors(state.tensors())
    for name, tensor in state.tensors().items():
        assert torch.equal(tensor.nan_to_num(7.0), other.tensors()[name].nan_to_num(7.0)), name


def test_state_of_another_length_is_refused():
    state, other = (core.init_selector(torch.ones(n, dtype=torch.bool)) for n in (4, 5))
    with pytest.raises(ValueError, match="does not fit"):
        other.load_tensors(state.tensors())


def test_bytes_per_row():
    state = core.init_selector(torch.ones(100_000, dtype=torch.bool))
    held = sum(t.numel() * t.element_size() for t in state.tensors().values())
    assert held <= 8 * 100_000 + 256
