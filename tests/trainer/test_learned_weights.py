"""`BilevelSFTTrainer` trains with the weights of `learn_weights`, bit for bit."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from tests.weights.conftest import LAZY
from trl_bilevel import BilevelSFTTrainer, learn_weights

SETTINGS = {"pilot_learning_rate": 1e-2, "seed": 3}
PILOT = {"weight_estimator": "value_function"}


def messages(row):
    return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]


def tokenised(row, tokenizer):
    prompt, answer = (tokenizer(row[key])["input_ids"] for key in ("prompt", "completion"))
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


FORMATS = {
    "pairs": lambda row, _: row,
    "chat_pairs": lambda row, _: {"prompt": messages(row)[:1], "completion": messages(row)[1:]},
    "messages": lambda row, _: {"messages": messages(row)},
    "text": lambda row, _: {"text": row["prompt"] + row["completion"]},
    "conversations": lambda row, _: {
        "conversations": [{"from": "human", "value": row["prompt"]}, {"from": "gpt", "value": row["completion"]}]
    },
    "tokens": tokenised,
}


@pytest.fixture
def data(rows, tokenizer):
    """48 rows, every second answer is boilerplate; trusted rows."""

    def make(name="pairs", more=()):
        mixed = [row | {"completion": LAZY} if n % 2 else row for n, row in enumerate(rows[:48])]
        sets = ([*mixed, *more], rows[60:80])
        return [Dataset.from_list([FORMATS[name](row, tokenizer) for row in each]) for each in sets]

    return make


@pytest.fixture
def both(config, tiny_model, tokenizer):
    def run(train, trusted, adapter=True, training=None, **settings):
        settings = SETTINGS | settings
        trainer = BilevelSFTTrainer(
            tiny_model(),
            config(**settings, **(training or {})),
            train_dataset=train,
            validation_dataset=trusted,
            processing_class=tokenizer,
            peft_config=LoraConfig(r=4, target_modules="all-linear") if adapter else None,
        )
        trainer.choose_weights()
        alone = learn_weights(
            tiny_model().to(trainer.model.device),
            train,
            trusted,
            processing_class=tokenizer,
            **({"max_length": 128, "disable_tqdm": True, "bf16": False} | settings),
        )
        return trainer, alone

    return run


def assert_same(trainer, alone):
    found = trainer.sample_weights()
    assert torch.equal(found.nan_to_num(9.0), alone.values.nan_to_num(9.0))
    assert torch.equal(trainer.weights.scores.nan_to_num(9.0), alone.scores.nan_to_num(9.0))
    assert float(found[~found.isnan()].std()) > 1e-3


@pytest.mark.parametrize(
    ("name", "adapter"), [*((name, True) for name in FORMATS), *((name, False) for name in ("pairs", "messages"))]
)
def test_every_format(name, adapter, both, data):
    assert_same(*both(*data(name), adapter=adapter))


@pytest.mark.parametrize(
    "settings",
    [
        PILOT,
        PILOT | {"pilot_steps": 3},
        {"selector_preset": "fast"},
        {"selector_preset": "reliable"},
        {"filter_rate": 0.3, "calibration_sharpness": 2.0},
        {"completion_only_loss": False},
        {"max_length": 40},
    ],
    ids=str,
)
def test_every_setting(settings, both, data):
    assert_same(*both(*data(), **settings))


@pytest.mark.parametrize(
    "training",
    [
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3},
        {"selector_weighting": "loss", "validation_loss_weight": 0.5},
        {"packing": True},
        {"padding_free": True},
        {"shuffle_dataset": True},
        {"learning_rate": 1.0, "adam_beta2": 0.95, "weight_decay": 0.3, "max_grad_norm": 0.01},
        {"pad_to_multiple_of": 8},
        {"remove_unused_columns": False},
    ],
    ids=str,
)
def test_how_the_model_is_trained_does_not_matter(training, both, data):
    train, trusted = data()
    settings = {"max_length": None} if "padding_free" in training else {}
    trainer, alone = both(train, trusted, training=training, **settings)
    if "pad_to_multiple_of" in training:
        # Padding is rounded otherwise.
        torch.testing.assert_close(trainer.sample_weights(), alone.values, atol=1e-2, rtol=1e-2)
        return
    assert_same(trainer, alone)


def test_several_sets_groups_and_dropped_rows(both, data):
    train, trusted = data(more=[{"prompt": "long " * 200, "completion": "x"}] * 2)
    train = train.add_column("source", ["abc"[n % 3] for n in range(len(train))])
    sets = {"first": trusted.select(range(9)), "second": trusted.select(range(9, 20))}
    settings = {"validation_weights": {"first": 0.7, "second": 0.3}, "selector_group_column": "source"}
    trainer, alone = both(train, sets, **settings)
    assert torch.equal(trainer.sample_weights().nan_to_num(9.0), alone.values.nan_to_num(9.0))
    assert alone.values.isnan().nonzero().flatten().tolist() == [48, 49]


def test_what_the_assistant_says_alone(both, data):
    assert_same(*both(*data("messages"), assistant_only_loss=True))


def test_training_begins_with_these_weights(both, data):
    """The choice of `train()` is that of `choose_weights()`; training does not move it."""
    trainer, alone = both(*data())
    trainer.train()
    assert_same(trainer, alone)
    assert trainer.weighted_dataset()["data_weight"][:] == alone.to_dataset()["data_weight"][:]


def test_the_weights_of_one_are_what_another_trains_with(both, data, config, tiny_model, tokenizer):
    """Ranked beforehand, and given by a column: the same run."""
    from tests.conftest import losses, parameters

    train, trusted = data()
    first, alone = both(train, trusted)
    first.train()
    second = BilevelSFTTrainer(
        tiny_model(),
        config(**SETTINGS, weight_estimator="none", selector_weighting="resample"),
        train_dataset=alone.to_dataset(),
        validation_dataset=trusted,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )
    second.train()
    torch.testing.assert_close(second.sample_weights(), alone.values, atol=1e-6, rtol=1e-6)
    assert losses(second) == losses(first)
    assert all(torch.equal(a, b) for a, b in zip(parameters(first), parameters(second), strict=True))
