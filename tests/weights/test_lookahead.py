"""The look-ahead that scores responses: on an adapter of its own, and the model is left as it was."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from trl_bilevel.data.rows import padded, plain_rows
from trl_bilevel.data.tokens import Tokeniser
from trl_bilevel.data.trusted import TrustedSets
from trl_bilevel.weights.adapters import SCALE
from trl_bilevel.weights.errors import NonFiniteScoreError
from trl_bilevel.weights.language_model import LanguageModel
from trl_bilevel.weights.lookahead import STEPS, Lookahead

RATE = 1e-2


@pytest.fixture
def read(tokenizer):
    """Makes tokenised rows of prompts and completions."""

    def make(rows):
        return plain_rows(Tokeniser(tokenizer).prepare(Dataset.from_list(rows)), padded(tokenizer.pad_token_id))

    return make


@pytest.fixture
def trusted(read, rows):
    return TrustedSets({"a": read(rows[40:60]), "b": read(rows[60:70])}, {"a": 0.75, "b": 0.25})


@pytest.fixture
def batch(read, rows):
    return read(rows[:6]).batch(range(6))


def make_model(tiny_model, adapter=False):
    model = tiny_model(attention_dropout=0.5).train()
    return get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.5)) if adapter else model


def test_without_steps_all_scores_are_zero(tiny_model, trusted, batch):
    lookahead = Lookahead(LanguageModel(make_model(tiny_model)), trusted, RATE, 0, steps=0)
    lookahead.refresh(0)
    assert lookahead.scores(batch).tolist() == [0.0] * 6


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("adapter", [False, True])
def test_the_model_is_left_as_it_was(tiny_model, trusted, batch, adapter, checkpointing):
    model = make_model(tiny_model, adapter)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    random = torch.get_rng_state()
    lookahead = Lookahead(LanguageModel(model), trusted, RATE, 0, checkpointing)
    lookahead.refresh(3)
    scores = lookahead.scores(batch)
    assert float(scores.abs().min()) > 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == wanted
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for _, module in lookahead.adapter.sites)
    assert torch.equal(torch.get_rng_state(), random)


def test_scores_are_those_of_steps_written_out(tiny_model, trusted, batch):
    """The adapter's product is merged into the weights, and AdamW follows its gradient through them."""
    model = make_model(tiny_model)
    lookahead = Lookahead(LanguageModel(model), trusted, RATE, 5)
    lookahead.refresh(2)
    fresh = Lookahead(LanguageModel(model), trusted, RATE, 5, steps=0)
    fresh.refresh(0)
    values = [value.detach().clone().requires_grad_() for value in fresh.adapter.values]
    names = {id(module): name for name, module in model.named_modules()}
    sites = [names[id(module)] for _, module in fresh.adapter.sites]
    bare = copy.deepcopy(model).eval().requires_grad_(False)

    def losses(rows):
        merged = {
            f"{site}.weight": bare.get_submodule(site).weight + SCALE * values[2 * n + 1] @ values[2 * n]
            for n, site in enumerate(sites)
        }
        kept = {name: rows[name] for name in ("input_ids", "attention_mask")}
        logits = torch.func.functional_call(bare, merged, kwargs=kept).logits[:, :-1]
        labels = rows["labels"][:, 1:]
        found = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        return found, labels != -100

    def means(found, scored):
        return (found * scored).sum(-1) / scored.sum(-1)

    with torch.no_grad():
        now = means(*losses(batch))
    optimizer = torch.optim.AdamW(values, lr=RATE, weight_decay=0.0)
    draws = trusted.samplers(8, 5)
    for step in range(2, 2 + STEPS):
        loss = torch.zeros(())
        for name, weight in trusted.weights.items():
            found, scored = losses(trusted.sets[name].batch(draws[name].rows(step)))
            loss = loss + weight * (found * scored).sum() / scored.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(values, 1.0)
        optimizer.step()
    for own, other in zip(lookahead.adapter.values, values, strict=True):
        torch.testing.assert_close(own, other, atol=2e-4, rtol=1e-3, check_dtype=False)
    with torch.no_grad():
        ahead = means(*losses(batch))
    scores = lookahead.scores(batch)
    assert float(scores.std()) > 1e-3
    torch.testing.assert_close(scores, now - ahead, atol=2e-5, rtol=1e-3)


def test_the_same_step_gives_the_same_scores_and_another_one_others(tiny_model, trusted, batch):
    model = LanguageModel(make_model(tiny_model))
    scores = []
    for step in (0, 8, 0):
        lookahead = Lookahead(model, trusted, RATE, 0)
        lookahead.refresh(step)
        scores.append(lookahead.scores(batch))
    assert torch.equal(scores[0], scores[2]) and not torch.equal(scores[0], scores[1])


def test_a_gradient_that_is_no_number_is_named(tiny_model, trusted):
    model = make_model(tiny_model)
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(NonFiniteScoreError, match="pilot_learning_rate"):
        Lookahead(LanguageModel(model), trusted, RATE, 0).refresh(0)
