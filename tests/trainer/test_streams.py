"""Training rows that are a stream: nobody can count them, and they come by once."""

import math

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from sklearn.metrics import roc_auc_score
from trl import SFTConfig, SFTTrainer

from tests.conftest import base_arguments, losses, parameters
from tests.errors_table import bad_settings
from trl_bilevel import BilevelSFTTrainer

STREAMS = "Streams"
LAZY = "I do not know, sorry."
PROBE = {}
PILOT = {"weight_estimator": "value_function", "pilot_steps": 12, "pilot_learning_rate": 1e-2}


@pytest.fixture
def mixed(rows):
    """100 rows; every second answer is boilerplate."""
    clean = [*rows[:40], *rows[60:120]]
    return [
        row
        | {"completion": LAZY if i % 2 else row["completion"], "source": "forum" if i % 2 else "book", "key": f"k{i}"}
        for i, row in enumerate(clean)
    ]


def stream_of(rows):
    """A stream that does not know its columns."""
    return IterableDataset.from_generator(lambda: iter(rows))


@pytest.fixture
def build(config, tiny_model, mixed, validation_rows, tokenizer):
    def make(train=None, adapter=True, **overrides):
        return BilevelSFTTrainer(
            tiny_model(),
            config(**({"stream_sample_rows": 64} | overrides)),
            train_dataset=stream_of(mixed) if train is None else train,
            validation_dataset=validation_rows,
            processing_class=tokenizer,
            peft_config=LoraConfig(r=4, target_modules="all-linear") if adapter else None,
        )

    return make


def test_plain_sft_on_a_stream_is_sft(build, tiny_model, mixed, tokenizer, tmp_path):
    ours = build(adapter=False, weight_estimator="none")
    ours.train()
    theirs = SFTTrainer(
        tiny_model(), SFTConfig(**base_arguments(tmp_path)), train_dataset=stream_of(mixed), processing_class=tokenizer
    )
    theirs.train()
    assert losses(ours) == losses(theirs)
    assert all(torch.equal(a, b) for a, b in zip(parameters(ours), parameters(theirs), strict=True))


def test_bad_rows_are_found_that_come_after_the_sample(build):
    trainer = build(max_steps=13)
    trainer.train()
    weights = [row["data_weight"] for row in trainer.weighted_dataset()]
    assert len(weights) == 100 and not any(map(math.isnan, weights))
    assert roc_auc_score([i % 2 == 0 for i in range(64, 100)], weights[64:]) > 0.9
    # Mean one over the sample: those that come later are like it.
    assert sum(weights[64:]) / 36 == pytest.approx(1, abs=0.1)


def watched(trainer):
    """Notes the weights of the batches that a trainer computes losses of."""
    seen, of_batch = [], trainer.weights.of_batch

    def watch(batch, ids):
        weights = of_batch(batch, ids)
        rows = zip(batch["input_ids"].tolist(), batch["attention_mask"].tolist(), weights.tolist(), strict=True)
        for tokens, mask, weight in rows:
            seen.append((tuple(t for t, m in zip(tokens, mask, strict=True) if m), weight))
        return weights

    trainer.weights.of_batch = watch
    return seen


def test_a_weight_is_what_the_row_says_whatever_the_model_has_become(build):
    """Rows of the second pass weigh what they did in the first one, after the adapter has moved."""
    trainer = build(max_steps=26, learning_rate=5e-2)
    seen = watched(trainer)
    trainer.train()
    weights = {}
    for row, weight in seen:
        weights.setdefault(row, []).append(weight)
    assert max(len(found) for found in weights.values()) >= 2
    assert all(max(found) - min(found) < 1e-5 for found in weights.values())


def test_weights_multiply_the_losses(build):
    """The first step's loss is TRL's mean over tokens, each row's log-probabilities times its weight."""
    trainer = build(max_steps=1)
    seen = watched(trainer)
    trainer.train()
    first = trainer.rows.dataset.select(range(8))
    per_row = build(weight_estimator="none").row_losses(first.select_columns(["input_ids", "labels"]))
    tokens = torch.tensor([sum(label != -100 for label in row["labels"][1:]) for row in first])
    weights = torch.tensor([weight for _, weight in seen[:8]])
    expected = (weights * per_row * tokens).sum() / tokens.sum()
    assert losses(trainer)[0] == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize(
    ("adapter", "estimator"), [(True, PROBE), (False, PROBE), (True, PILOT)], ids=["lora", "full", "pilot"]
)
def test_a_bad_source_loses_its_weight(build, adapter, estimator, mixed):
    rows = stream_of([*mixed, mixed[0] | {"source": "news"}])
    trainer = build(rows, adapter=adapter, selector_group_column="source", **estimator)
    trainer.train()
    shares = trainer.weights.groups.shares(trainer.weights.values)
    assert shares["book"] > 0.8
    weights = {row["source"]: row["data_weight"] for row in trainer.weighted_dataset()}
    assert weights["book"] > 3 * weights["forum"]
    # A source that comes up later counts like the mean.
    assert weights["news"] == 1


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"selector_group_column": "source"},
        {"validation_loss_weight": 0.5},
    ],
    ids=["rows", "groups", "validation_term"],
)
def test_a_resumed_run_gives_the_same_bits(build, overrides):
    whole = build(save_strategy="steps", save_steps=3, max_steps=6, **overrides)
    whole.train()
    resumed = build(max_steps=6, save_strategy="steps", save_steps=3, **overrides)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-3")
    assert losses(resumed)[-3:] == losses(whole)[-3:]
    assert all(torch.equal(a, b) for a, b in zip(parameters(whole), parameters(resumed), strict=True))
    weights = [[row["data_weight"] for row in trainer.weighted_dataset()] for trainer in (whole, resumed)]
    assert weights[0] == pytest.approx(weights[1], rel=0, abs=0, nan_ok=True)


def test_resume_refuses_another_stream(build, mixed):
    trainer = build(save_strategy="steps", save_steps=3)
    trainer.train()
    other = build(stream_of(mixed[1:]), save_strategy="steps", save_steps=3)
    with pytest.raises(ValueError, match="train_fingerprint"):
        other.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-3")


def test_weights_survive_in_a_file(build, tmp_path, config):
    trainer = build(max_steps=5)
    trainer.train()
    trainer.weighted_dataset().to_parquet(str(tmp_path / "weighted.parquet"))
    rows = Dataset.from_parquet(str(tmp_path / "weighted.parquet"))
    assert rows["data_weight"][:40] == [row["data_weight"] for row in trainer.weighted_dataset()][:40]
    fixed = build(rows, weight_estimator="none")
    assert torch.isfinite(fixed.sample_weights()).all()


REFUSED = bad_settings(
    STREAMS,
    [
        ({"max_steps": -1}, "max_steps"),
        ({"packing": True}, "packing"),
        ({"padding_free": True, "max_length": None}, "padding_free"),
        ({"filter_rate": 0.2}, "filter_rate"),
        ({"selector_preset": "sparse_centred"}, "its weights move row by row.*Use 'balanced'"),
        ({"weight_estimator": "value_function"}, "a pilot does not score rows as they come. Use 'probe'"),
        ({"selector_preset": "reliable"}, "`weight_estimator='both'` is not supported.*give `selector_group_column`"),
        ({"selector_group_column": "site"}, "selector_group_column='site'` is not a column"),
        ({"adapter": False}, "peft_config"),
        ({"stream_sample_rows": 20}, "stream_sample_rows"),
    ],
)


@pytest.mark.parametrize(("overrides", "message"), REFUSED)
def test_what_a_stream_cannot_do_is_refused(refused, build, overrides, message):
    with refused(message):
        build(**overrides)


@pytest.mark.bad_input(STREAMS, "a stream of 10 rows")
def test_too_short_a_stream_is_refused(refused, build, mixed):
    with refused("10 usable rows"):
        build(stream_of(mixed[:10]))


@pytest.mark.bad_input(STREAMS, "a stream without rows")
def test_an_empty_stream_is_refused(refused, build):
    with refused("empty"):
        build(stream_of([]))


@pytest.mark.bad_input(STREAMS, "fixed weights (`data_weight`)")
def test_fixed_weights_of_a_stream_are_refused(refused, build, mixed):
    with refused("data_weight"):
        build(stream_of([row | {"data_weight": 1.0} for row in mixed]), weight_estimator="none")


def test_lists_of_weights_are_refused(build):
    trainer = build()
    with pytest.raises(ValueError, match="weighted_dataset"):
        trainer.sample_weights()
    with pytest.raises(ValueError, match="top_k"):
        trainer.weighted_dataset(top_k=3)
