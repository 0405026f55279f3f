"""Prepared rows and tiny models, without a trainer."""

import pytest
import torch
from datasets import Dataset
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
)

from tests.conftest import make_tiny_model
from trl_bilevel.data.rows import padded, plain_rows
from trl_bilevel.data.tokens import Tokeniser
from trl_bilevel.data.trusted import TrustedSets, set_weights
from trl_bilevel.weights.language_model import LanguageModel, left_as_it_was
from trl_bilevel.weights.pilot import Pilot, PilotRecipe

LAZY = "I do not know, sorry."
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
KINDS = ("llama", "gpt2", "gemma2", "cohere", "granite")


def make_model(kind, tokenizer, **overrides):
    """A tiny random model of an architecture, whose head's logits are scaled or capped with `gemma2`, `cohere`,
    `granite`."""
    if kind == "llama":
        return make_tiny_model(tokenizer, **overrides)
    torch.manual_seed(0)
    common = SMALL | {"vocab_size": len(tokenizer), "num_key_value_heads": 1} | overrides
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": 1}
    if kind == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=len(tokenizer), attn_pdrop=0.1, **special)
        )
    if kind == "gemma2":
        # A low cap, so that it shows.
        extra = {"head_dim": 16, "final_logit_softcapping": 0.5, "sliding_window": 64}
        return Gemma2ForCausalLM(Gemma2Config(**common, **extra, **special))
    if kind == "cohere":
        return CohereForCausalLM(CohereConfig(**common, logit_scale=0.25, **special))
    return GraniteForCausalLM(GraniteConfig(**common, logits_scaling=8.0, **special))


def prepare(rows, tokenizer, **settings):
    """Rows as choosing reads them."""
    read = Tokeniser(tokenizer, **({"max_length": 128} | settings))
    return plain_rows(read.prepare(Dataset.from_list(rows)), padded(tokenizer.pad_token_id), len(rows))


def trusted_sets(tokenizer, weights=None, **sets):
    """Trusted rows as choosing reads them."""
    prepared = {name: prepare(rows, tokenizer) for name, rows in sets.items()}
    return TrustedSets(prepared, set_weights(weights, prepared))


def trained_pilot(model, rows, trusted, **recipe):
    """A pilot after its training; the model is as it was."""
    settings = {"steps": 4, "learning_rate": 1e-2, "seed": 3}
    reader = LanguageModel(model)
    pilot = Pilot(reader, PilotRecipe(**(settings | recipe)))
    with left_as_it_was(model):
        pilot.train(rows, trusted)
    return pilot


@pytest.fixture
def mixed(rows):
    """80 rows; every second answer is boilerplate."""
    clean = [*rows[:40], *rows[60:100]]
    return [row | {"completion": LAZY} if i % 2 else row for i, row in enumerate(clean)]


@pytest.fixture
def prepared(mixed, tokenizer):
    return prepare(mixed, tokenizer)


@pytest.fixture
def trusted(rows, tokenizer):
    return trusted_sets(tokenizer, validation=rows[40:60])
