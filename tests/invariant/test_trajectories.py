"""Configurations that must give the same trajectory."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from tests.conftest import ROUNDING, losses, parameters
from trl_bilevel import BilevelSFTTrainer

# Every estimator, every preset, both ways of weighting.
METHODS = {
    "default": {},
    "loss_weighted": {"selector_weighting": "loss"},
    "pilot": {"weight_estimator": "value_function", "pilot_steps": 8, "pilot_learning_rate": 1e-2},
    "both": {"weight_estimator": "both", "pilot_steps": 8, "pilot_learning_rate": 1e-2},
    "fast": {"selector_preset": "fast"},
    "filtered": {"filter_rate": 0.3, "selector_weighting": "loss"},
    "validation_term": {"validation_loss_weight": 0.5},
    "paper": {"selector_preset": "paper"},
    "seal": {"selector_preset": "seal"},
    "sparse_centred": {"selector_preset": "sparse_centred"},
}
# Presets whose weights move with every step.
MOVING = ("paper", "seal", "sparse_centred")
# Run with other versions of TRL and transformers, too.
COMPAT = ("pilot", "seal", "sparse_centred")
# The fast tier has these and the default.
FAST = ("default", *COMPAT)

pytestmark = pytest.mark.filterwarnings("ignore:.selector_preset=:UserWarning")


def train(config, model, data, validation, tokenizer, resume=None, adapter=True, **overrides):
    trainer = BilevelSFTTrainer(
        model,
        config(**overrides),
        train_dataset=data,
        validation_dataset=validation,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear") if adapter else None,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in METHODS])
def test_batch_and_accumulation(name, config, tiny_model, train_rows, validation_rows, tokenizer):
    runs = [
        train(
            config,
            tiny_model().double(),
            train_rows,
            validation_rows,
            tokenizer,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=8 // batch,
            # Scores are differences of losses: they must stand out from fp32 rounding for a comparison to 1e-5.
            learning_rate=5e-2,
            **METHODS[name],
        )
        for batch in (8, 4, 1)
    ]
    # The fused LM head gives fp32 log-probabilities. Updates in training divide score differences by their running
    # spread (1e-3 and less on a random model), which magnifies that rounding.
    tolerance = max(ROUNDING, 3e-4) if name == "sparse_centred" else ROUNDING
    for other in runs[1:]:
        torch.testing.assert_close(losses(other), losses(runs[0]), atol=ROUNDING, rtol=ROUNDING)
        torch.testing.assert_close(other.sample_weights(), runs[0].sample_weights(), atol=tolerance, rtol=tolerance)
        expected, found = (run.weights.scores for run in (runs[0], other))
        torch.testing.assert_close(found, expected, atol=10 * tolerance, rtol=10 * tolerance, equal_nan=True)
        if name not in MOVING:
            assert torch.equal(other.sample_weights(), runs[0].sample_weights())


@pytest.mark.parametrize("adapter", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.compat if n in COMPAT else () if n in FAST else pytest.mark.slow)
        for n in METHODS
    ],
)
def test_resume_is_exact(name, adapter, config, tiny_model, train_rows, validation_rows, tokenizer, tmp_path):
    common = (train_rows, validation_rows, tokenizer)
    settings = {"save_strategy": "steps", "save_steps": 3, "adapter": adapter, **METHODS[name]}
    whole = train(config, tiny_model(), *common, output_dir=str(tmp_path / "a"), **settings)
    resumed = train(
        config,
        tiny_model(),
        *common,
        resume=str(tmp_path / "a" / "checkpoint-3"),
        output_dir=str(tmp_path / "b"),
        **settings,
    )
    assert losses(resumed) == losses(whole)
    assert torch.equal(resumed.sample_weights(), whole.sample_weights())
    assert float(whole.sample_weights().std()) > 0
    state = resumed.weights.tensors()
    for name_, tensor in whole.weights.tensors().items():
        assert torch.equal(state[name_].nan_to_num(7), tensor.nan_to_num(7)), name_
    assert all(torch.equal(a, b) for a, b in zip(parameters(resumed), parameters(whole), strict=True))


def test_permuting_rows_permutes_weights_and_nothing_else(config, tiny_model, train_rows, validation_rows, tokenizer):
    order = torch.randperm(len(train_rows), generator=torch.Generator().manual_seed(5))
    first = train(config, tiny_model(), train_rows, validation_rows, tokenizer)
    second = train(config, tiny_model(), train_rows.select(order.tolist()), validation_rows, tokenizer)
    assert torch.equal(second.sample_weights(), first.sample_weights()[order])
    assert losses(second) == losses(first)
    assert all(torch.equal(a, b) for a, b in zip(parameters(second), parameters(first), strict=True))


def test_dropped_rows_shift_no_weight(config, tiny_model, mixed_rows, validation_rows, tokenizer, caplog):
    kept = mixed_rows
    too_long = {"prompt": "word " * 300, "completion": "never seen"}
    positions = (0, 7, 8, 42)
    padded = list(kept)
    for position in positions:
        padded.insert(position, too_long)
    first = train(config, tiny_model(), Dataset.from_list(kept), validation_rows, tokenizer)
    second = train(config, tiny_model(), Dataset.from_list(padded), validation_rows, tokenizer)
    weights = second.sample_weights()
    assert torch.isnan(weights[list(positions)]).all()
    assert torch.equal(weights[~torch.isnan(weights)], first.sample_weights())
    assert losses(second) == losses(first)
    assert "4 of 44 training rows were dropped" in caplog.text


def test_gradient_checkpointing_changes_nothing(config, tiny_model, train_rows, validation_rows, tokenizer):
    first, second = (
        train(
            config,
            tiny_model(),
            train_rows,
            validation_rows,
            tokenizer,
            gradient_checkpointing=on,
            selector_preset="sparse_centred",
        )
        for on in (False, True)
    )
    torch.testing.assert_close(losses(second), losses(first), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(second.sample_weights(), first.sample_weights(), atol=1e-5, rtol=1e-5)


def test_evaluating_in_between_changes_nothing(config, tiny_model, train_rows, validation_rows, rows, tokenizer):
    held_out = Dataset.from_list(rows[60:70])
    plain = train(config, tiny_model(), train_rows, validation_rows, tokenizer)
    trainer = BilevelSFTTrainer(
        tiny_model(),
        config(eval_strategy="steps", eval_steps=2),
        train_dataset=train_rows,
        validation_dataset=validation_rows,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )
    trainer.train()
    assert losses(trainer) == losses(plain)
    assert torch.equal(trainer.sample_weights(), plain.sample_weights())
