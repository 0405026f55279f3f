"""Implicit weights and the decision of a round against closed forms and enumeration."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_bilevel.core.implicit import decide, implicit_weights, question_weights, response_scores
from trl_bilevel.data.questions import QuestionSampler, choose_questions


def test_weights_are_the_closed_form_importance_ratio():
    generator = torch.Generator().manual_seed(0)
    model, reference = -5 * torch.rand(2, 12, generator=generator, dtype=torch.float64)  # log pi(y | x)
    lengths = torch.randint(1, 9, (12,), generator=generator).double()
    tau = 0.3
    scores = response_scores(-reference / lengths, -model / lengths)
    ratio = ((model - reference) / (tau * lengths)).exp().view(3, 4)
    expected = 4 * ratio / ratio.sum(-1, keepdim=True)
    torch.testing.assert_close(implicit_weights(scores, 4, tau).view(3, 4).double(), expected, atol=1e-6, rtol=1e-6)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(-3, 3), min_size=4, max_size=4),
    st.floats(-5, 5),
    st.integers(1, 4),
)
def test_mean_one_unmoved_by_shifts_and_copies(scores, shift, copies):
    x = torch.tensor(scores)
    weights = implicit_weights(x, 4, 0.5)
    assert float(weights.mean()) == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(implicit_weights(x + shift, 4, 0.5), weights, atol=1e-4, rtol=1e-3)
    # More responses of the same kind leave each one's weight, and so the size of the gradient, as it is.
    repeated = implicit_weights(x.repeat(copies), 4 * copies, 0.5)
    torch.testing.assert_close(repeated, weights.repeat(copies), atol=1e-5, rtol=1e-4)


def test_equal_scores_give_weight_one():
    assert implicit_weights(torch.full((8,), 0.7), 4, 0.1).tolist() == [1.0] * 8


def test_responses_left_out_pass_their_share_on():
    nan = math.nan
    weights = implicit_weights(torch.tensor([0.0, nan, 0.0, nan, nan, nan, nan, nan]), 4, 0.1)
    assert weights[[0, 2]].tolist() == [1.0, 1.0]
    assert torch.isnan(weights[[1, 3, 4, 5, 6, 7]]).all()


@pytest.mark.parametrize(("count", "temperature", "message"), [(7, 0.1, "groups of 4"), (8, 0.0, "above 0")])
def test_unusable_arguments_are_refused(count, temperature, message):
    with pytest.raises(ValueError, match=message):
        implicit_weights(torch.zeros(count), 4, temperature)


def test_question_weights_compare_within_the_round():
    torch.testing.assert_close(question_weights(torch.tensor([0.001, 0.003])), torch.tensor([0.5, 1.5]))
    assert question_weights(torch.zeros(3)).tolist() == [1.0, 1.0, 1.0]


def expected_gradient(logits, score, advantage):
    """Exact expectation over all groups of two responses of the policy gradient with a group's advantages."""
    log_policy = torch.log_softmax(logits, -1)
    total = 0.0
    for pair in itertools.product(range(len(logits)), repeat=2):
        index = torch.tensor(pair)
        chance = log_policy[index].sum().exp().detach()
        total = total + chance * (advantage(score[index]) * log_policy[index]).mean()
    return torch.autograd.grad(total, logits)[0]


def test_centred_weights_have_the_gradient_of_weighted_fine_tuning():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(5, generator=generator, dtype=torch.float64, requires_grad=True)
    score = torch.randn(5, generator=generator, dtype=torch.float64)
    centred = expected_gradient(logits, score, lambda s: implicit_weights(s, 2, 0.5).double() - 1)
    plain = expected_gradient(logits, score, lambda s: implicit_weights(s, 2, 0.5).double())
    torch.testing.assert_close(centred, plain, atol=1e-8, rtol=1e-6)
    uniform = expected_gradient(logits, score, lambda s: torch.ones(2, dtype=torch.float64))
    assert float(uniform.abs().max()) < 1e-12


def test_a_tabular_policy_comes_to_what_validation_wants():
    """Responses only: a policy that is never trained on validation rows follows their pull through the weights."""
    generator = torch.Generator().manual_seed(2)
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0], requires_grad=True)
    wanted = torch.tensor([0.0, 0.0, 0.0, 1.0])

    def validation_loss(values):
        return -(wanted * torch.log_softmax(values, -1)).sum()

    history = []
    for _ in range(300):
        with torch.no_grad():
            pulled = logits - 0.5 * torch.func.grad(validation_loss)(logits.detach())
            log_policy = torch.log_softmax(logits, -1)
            drawn = torch.multinomial(log_policy.exp(), 32, replacement=True, generator=generator)
            scores = response_scores(-log_policy[drawn], -torch.log_softmax(pulled, -1)[drawn])
            advantage = implicit_weights(scores, 4, 0.2) - 1
            before = logits.clone()
        objective = -(advantage * torch.log_softmax(logits, -1)[drawn]).mean()
        with torch.no_grad():
            logits -= 0.5 * torch.autograd.grad(objective, logits)[0]
            decision = decide(validation_loss(before).reshape(1), validation_loss(logits).reshape(1))
            if not decision.kept:
                logits.copy_(before)
        history.append(float(validation_loss(logits.detach())))
    assert all(b <= a for a, b in itertools.pairwise(history))
    assert float(torch.softmax(logits, -1)[3].detach()) > 0.95


def test_decisions():
    kept = decide(torch.tensor([2.0, 3.0]), torch.tensor([1.5, 2.7]))
    assert kept.kept and kept.difference == pytest.approx(-0.4) and kept.standard_error == pytest.approx(0.1)
    assert not decide(torch.tensor([2.0, 3.0]), torch.tensor([2.5, 2.7])).kept
    broken = decide(torch.tensor([2.0]), torch.tensor([math.nan]))
    assert not broken.kept and "NaN" in broken.reason


def test_decisions_weigh_the_rows():
    incoming, trained = torch.tensor([2.0, 2.0, 2.0]), torch.tensor([1.0, 1.0, 3.0])
    assert decide(incoming, trained).kept
    weighted = decide(incoming, trained, torch.tensor([0.1, 0.1, 0.8]))
    assert not weighted.kept and weighted.difference == pytest.approx(0.6)


def test_questions_of_lowest_weight():
    weights = torch.tensor([0.5, math.nan, 0.1, 2.0, 0.1])
    assert choose_questions(weights, "lowest_weight", 0.5, 0).tolist() == [2, 4]
    assert choose_questions(weights, "all", 0.5, 0).tolist() == [0, 2, 3, 4]
    random = choose_questions(weights, "random", 0.5, 0)
    assert len(random) == 2 and 1 not in random
    with pytest.raises(ValueError, match="No question is left"):
        choose_questions(torch.full((3,), math.nan), "all", 1.0, 0)


def test_equal_weights_are_not_asked_in_the_order_of_the_file():
    chosen = choose_questions(torch.ones(100), "lowest_weight", 0.1, 0)
    assert len(chosen) == 10 and int(chosen.max()) > 50


def test_sampler_asks_every_question_before_any_twice():
    sampler = QuestionSampler(lambda: torch.arange(10, 15), questions=2, generations=3, repeats=2, rounds=5, seed=0)
    drawn = list(sampler)
    assert len(drawn) == len(sampler) == 60
    blocks = [drawn[start : start + 6] for start in range(0, 60, 6)]
    assert all(blocks[i] == blocks[i + 1] for i in range(0, 10, 2))
    assert all(block[0] == block[2] and block[3] == block[5] for block in blocks)
    asked = [block[position] for block in blocks[::2] for position in (0, 3)]
    assert sorted(asked[:5]) == sorted(asked[5:]) == list(range(10, 15))
