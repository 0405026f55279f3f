"""Fixed weights from a column: `weight_estimator="none"` with `data_weight`."""

import pytest
import torch
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from tests.conftest import base_arguments, losses, parameters
from tests.errors_table import DATA, bad_input
from trl_bilevel import BilevelSFTTrainer

PLAIN = {"weight_estimator": "none", "validation_loss_weight": 0.0}


@pytest.fixture
def train(config, tiny_model, tokenizer):
    def run(data, validation=None, **overrides):
        trainer = BilevelSFTTrainer(
            tiny_model(),
            config(**overrides),
            train_dataset=data,
            validation_dataset=validation,
            processing_class=tokenizer,
            peft_config=LoraConfig(r=4, target_modules="all-linear"),
        )
        trainer.train()
        return trainer

    return run


def test_weight_one_is_plain_fine_tuning(train, train_rows, tiny_model, tokenizer, tmp_path):
    ours = train(train_rows.add_column("data_weight", [3.0] * len(train_rows)), **PLAIN)
    plain = SFTTrainer(
        tiny_model(),
        SFTConfig(**base_arguments(tmp_path)),
        train_dataset=train_rows,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )
    plain.train()
    assert losses(ours) == pytest.approx(losses(plain), rel=1e-6)
    for a, b in zip(parameters(ours), parameters(plain), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_loss_is_the_hand_computed_one(train, train_rows):
    rows = train_rows.select(range(8))
    weights = torch.tensor([0.0, 0.5, 1.0, 2.0, 3.0, 0.1, 0.4, 1.0])
    ours = train(rows.add_column("data_weight", weights.tolist()), **PLAIN, max_steps=1, learning_rate=0.0)
    tokens = torch.tensor([sum(label != -100 for label in row["labels"][1:]) for row in ours.train_dataset]).float()
    sums = ours.row_losses(rows) * tokens
    expected = (weights * sums).sum() / (weights * tokens).sum()
    assert losses(ours)[0] == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.compat
def test_exported_weights_give_the_same_run(train, train_rows, validation_rows):
    first = train(train_rows, validation_rows)
    second = train(first.weighted_dataset(), validation_rows, weight_estimator="none", selector_weighting="resample")
    torch.testing.assert_close(second.sample_weights(), first.sample_weights(), atol=1e-5, rtol=1e-5)
    assert losses(second) == pytest.approx(losses(first), rel=1e-6)
    assert "data_weight" in second.weighted_dataset().column_names


def test_resume_with_fixed_weights(train, train_rows, tmp_path):
    data = train_rows.add_column("data_weight", torch.linspace(0, 2, len(train_rows)).tolist())
    settings = PLAIN | {"save_strategy": "steps", "save_steps": 3}
    whole = train(data, **settings, output_dir=str(tmp_path / "a"))
    resumed = BilevelSFTTrainer(whole.model, whole.args, train_dataset=data, processing_class=whole.processing_class)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert losses(resumed) == losses(whole)


@pytest.mark.parametrize(
    ("values", "overrides", "message"),
    [
        bad_input(DATA, "`data_weight` below 0", [-1.0], {}, "finite numbers of at least 0"),
        bad_input(DATA, "`data_weight` of 0 in all rows", [0.0], {}, "not 0 for all rows"),
        bad_input(DATA, "infinite `data_weight`", [float("inf")], {}, "finite numbers"),
        bad_input(
            DATA,
            "`data_weight`, with `selector_group_column`",
            [1.0],
            {"selector_group_column": "prompt"},
            "no meaning with the given",
        ),
    ],
)
def test_unusable_weights(refused, train, train_rows, values, overrides, message):
    with refused(message):
        train(train_rows.add_column("data_weight", values * len(train_rows)), **PLAIN, **overrides)


@pytest.mark.bad_input(DATA, "`data_weight`, and weights to be learned")
def test_learned_and_fixed_weights_exclude_each_other(refused, train, train_rows, validation_rows):
    with refused("weight_estimator='none'"):
        train(train_rows.add_column("data_weight", [1.0] * len(train_rows)), validation_rows)


def test_missing_weights_are_zero(train, train_rows):
    data = train_rows.add_column("data_weight", [None] + [1.0] * (len(train_rows) - 1))
    assert float(train(data, **PLAIN).sample_weights()[0]) < 1e-6
