"""Weights that multiply losses and weights that draw rows have one objective: `sum w l / sum w t`."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from tests.conftest import base_arguments, losses, parameters
from tests.exact_head import ExactHead
from trl_bilevel import BilevelSFTTrainer
from trl_bilevel.core.resampling import systematic_resample

DESCENT = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}


@pytest.fixture
def exact(monkeypatch):
    """TRL's LM head in float64."""
    monkeypatch.setattr("trl.trainer.utils._ChunkedLogProbFunction", ExactHead)


@pytest.fixture
def weighted(config, tiny_model, tokenizer):
    def make(rows, weights, adapter=True, **overrides):
        settings = DESCENT | {"weight_estimator": "none", "max_steps": 1} | overrides
        return BilevelSFTTrainer(
            tiny_model().double(),
            config(**settings),
            train_dataset=rows.add_column("data_weight", [float(w) for w in weights]),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=4, target_modules="all-linear") if adapter else None,
        )

    return make


@pytest.fixture
def plain(tiny_model, tokenizer, tmp_path):
    def make(rows, adapter=True, **overrides):
        return SFTTrainer(
            tiny_model().double(),
            SFTConfig(**base_arguments(tmp_path) | DESCENT | {"max_steps": 1} | overrides),
            train_dataset=rows,
            processing_class=tokenizer,
            peft_config=LoraConfig(r=4, target_modules="all-linear") if adapter else None,
        )

    return make


def moved(trainer):
    """How far the parameters have moved in training: the gradient, times the learning rate."""
    before = parameters(trainer)
    trainer.train()
    return torch.cat([(b - a).flatten() for a, b in zip(before, parameters(trainer), strict=True)])


@pytest.mark.parametrize("adapter", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize(
    "weights", [[2, 1, 1, 2, 1, 1], [0, 3, 1, 0, 2, 1], [5, 0, 0, 0, 0, 1]], ids=["twice", "removed", "few"]
)
def test_integer_weights_are_repeated_rows(weights, adapter, exact, weighted, plain, train_rows):
    """The whole set as one step: weight 2 is a row twice, weight 0 a row that is not there."""
    rows = train_rows.select(range(6))
    repeated = rows.select([n for n, weight in enumerate(weights) for _ in range(weight)])
    ours = weighted(rows, weights, adapter, per_device_train_batch_size=6)
    theirs = plain(repeated, adapter, per_device_train_batch_size=len(repeated))
    torch.testing.assert_close(moved(ours), moved(theirs), atol=1e-9, rtol=1e-6)
    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-6)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_accumulated_micro_batches_are_one_step(size, exact, weighted, train_rows):
    rows, weights = train_rows.select(range(6)), [0.2, 3, 1, 0, 2, 0.5]
    whole = weighted(rows, weights, per_device_train_batch_size=6)
    parts = weighted(rows, weights, per_device_train_batch_size=size, gradient_accumulation_steps=6 // size)
    torch.testing.assert_close(moved(parts), moved(whole), atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize(
    "overrides", [{}, {"gradient_accumulation_steps": 2}, {"packing": True, "max_length": 64}], ids=str
)
def test_equal_weights_are_sft_bit_for_bit(overrides, weighted, plain, train_rows):
    ours = weighted(train_rows, [3.0] * 40, max_steps=4, **overrides)
    theirs = plain(train_rows, max_steps=4, **overrides)
    ours.train(), theirs.train()
    assert losses(ours) == losses(theirs)
    assert all(torch.equal(a, b) for a, b in zip(parameters(ours), parameters(theirs), strict=True))


def by_length(trainer):
    """Weights in proportion to how many tokens a row has."""
    tokens = torch.tensor([sum(label != -100 for label in row["labels"][1:]) for row in trainer.train_dataset])
    return tokens / tokens.float().mean()


def test_weights_that_follow_length_give_the_same_loss_either_way(weighted, plain, rows):
    """Divided by the tokens of a step alone, weighted losses were 1.8 times those of drawn rows."""
    data = Dataset.from_list(rows)
    weights = by_length(plain(data)).tolist()
    means = {}
    for weighting in ("loss", "resample"):
        trainer = weighted(
            data, weights, selector_weighting=weighting, max_steps=-1, num_train_epochs=4, learning_rate=0.0
        )
        trainer.train()
        means[weighting] = sum(losses(trainer)) / len(losses(trainer))
    expected = float((torch.tensor(weights) * trainer.row_losses(data) * by_length(trainer)).sum())
    expected /= float((torch.tensor(weights) * by_length(trainer)).sum())
    assert means["loss"] == pytest.approx(expected, rel=0.02)
    assert means["resample"] == pytest.approx(expected, rel=0.02)


def test_expected_gradients_are_equal(exact, weighted, plain, train_rows):
    """Drawn rows over many epochs, each as one step: their mean gradient, up to the divisor of each draw."""
    rows, weights = train_rows.select(range(6)), torch.tensor([0.2, 2.4, 1.0, 0.4, 1.5, 0.5])
    wanted = moved(weighted(rows, weights, per_device_train_batch_size=6))
    total = torch.zeros_like(wanted)
    tokens, probe = 0.0, plain(rows, max_steps=1)
    counts = torch.tensor([sum(label != -100 for label in row["labels"][1:]) for row in probe.train_dataset])
    alone = [moved(plain(rows.select([n]), per_device_train_batch_size=1)) * counts[n] for n in range(6)]
    generator = torch.Generator().manual_seed(0)
    for _ in range(2000):
        drawn = systematic_resample(weights, 6, generator)
        times = torch.bincount(drawn, minlength=6)
        total += sum(n * move for n, move in zip(times.tolist(), alone, strict=True))
        tokens += float((times * counts).sum())
    torch.testing.assert_close(total / tokens, wanted, atol=1e-5, rtol=0.02)


def test_dropped_rows_do_not_count(exact, weighted, rows):
    """Weights are scaled over the rows that are trained on; a row without a token to score is none of them."""
    long = {"prompt": "long " * 200, "completion": "x"}
    first = weighted(Dataset.from_list(rows[:6]), [2, 1, 1, 2, 1, 1], per_device_train_batch_size=6)
    second = weighted(Dataset.from_list([long, *rows[:6]]), [9, 2, 1, 1, 2, 1, 1], per_device_train_batch_size=6)
    assert torch.equal(moved(first), moved(second))
