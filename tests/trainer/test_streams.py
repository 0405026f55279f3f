"""Training rows that are a stream: nobody can count them, and they come by once."""

import hashlib
import math
from functools import partial

import pytest
import torch
from datasets import Dataset, IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from sklearn.metrics import roc_auc_score
from trl import SFTConfig, SFTTrainer

from tests.conftest import base_arguments, losses, parameters
from tests.errors_table import bad_settings
from trl_bilevel import BilevelSFTTrainer
from trl_bilevel.core import selector as core
from trl_bilevel.data.streams import hashed_unit, row_key

STREAMS = "Streams"
LAZY = "I do not know, sorry."


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
        given = {
            "pilot_steps": 12,
            "pilot_learning_rate": 1e-2,
            "stream_sample_rows": 64,
            "validation_loss_weight": 0.0,
        }
        return BilevelSFTTrainer(
            tiny_model(),
            config(**(given | overrides)),
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


def test_bad_rows_are_found_without_being_scored_or_in_the_sample(build):
    trainer = build(pilot_scored_rows=32, max_steps=13)
    trainer.train()
    weights = [row["data_weight"] for row in trainer.weighted_dataset()]
    assert len(weights) == 100 and not any(map(math.isnan, weights))
    assert roc_auc_score([i % 2 == 0 for i in range(64, 100)], weights[64:]) > 0.9
    assert sum(weights) / 100 == pytest.approx(1, abs=1e-4)


def test_a_weight_is_what_the_row_says_whatever_the_model_has_become(build):
    """Rows of the second pass weigh what they did in the first one, after the adapter has moved."""
    trainer = build(pilot_scored_rows=32, max_steps=26, learning_rate=5e-2)
    seen = {}
    record = trainer.selection.record

    def watch(units, weights):
        for unit, weight in zip(units.tolist(), weights.tolist(), strict=True):
            seen.setdefault(unit, []).append(weight)
        record(units, weights)

    trainer.selection.record = watch
    trainer.train()
    assert max(len(weights) for weights in seen.values()) >= 2
    assert all(max(weights) - min(weights) < 1e-5 for weights in seen.values())


def test_predicted_weights_multiply_the_losses(build):
    """The first step's loss is TRL's mean over tokens, each row's log-probabilities times its predicted weight."""
    trainer = build(max_steps=1)
    found = {}
    record = trainer.selection.record
    trainer.selection.record = lambda units, weights: (found.update(weights=weights), record(units, weights))
    trainer.train()
    first = [trainer.rows[i] for i in range(8)]
    fresh = build(weight_estimator="none")
    per_row = fresh.row_losses(Dataset.from_list([{k: row[k] for k in ("input_ids", "labels")} for row in first]))
    tokens = torch.tensor([sum(label != -100 for label in row["labels"][1:]) for row in first])
    expected = (found["weights"].cpu() * per_row * tokens).sum() / tokens.sum()
    assert losses(trainer)[0] == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("adapter", [True, False], ids=["lora", "full"])
def test_a_bad_source_loses_its_weight(build, adapter):
    trainer = build(
        adapter=adapter,
        selector_granularity="group",
        selector_group_column="source",
        pilot_learning_rate=1e-2 if adapter else 3e-3,
    )
    trainer.train()
    shares = trainer.selection.group_shares()
    assert shares["book"] > 0.8 and shares["other"] == pytest.approx(0, abs=1e-6)
    weights = {row["source"]: row["data_weight"] for row in trainer.weighted_dataset()}
    assert weights["book"] > 3 * weights["forum"]
    # A source that comes up later counts like the mean.
    assert float(trainer.selection.weights(torch.tensor([hashed_unit("news", 1 << 20)]))) == 1


@pytest.mark.parametrize("estimator", ["value_function", "lookahead", "alignment"])
def test_online_updates_move_the_weights_of_the_rows_seen(build, estimator):
    trainer = build(
        weight_estimator=estimator,
        selector_update="sparse_centred",
        selector_warmup_steps=0,
        selector_key_column="key",
        max_steps=5,
        validation_loss_weight=0.5,
        stream_sample_rows=40,
    )
    trainer.train()
    weights = [row["data_weight"] for row in trainer.weighted_dataset()]
    assert all(math.isnan(weight) == (i >= 40) for i, weight in enumerate(weights))
    assert len(set(weights[:40])) > 30
    assert sum(weights[:40]) / 40 == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    "overrides",
    [
        {"pilot_scored_rows": 32},
        {"selector_granularity": "group", "selector_group_column": "source"},
        {"selector_update": "sparse_centred", "selector_warmup_steps": 0, "validation_loss_weight": 0.5},
    ],
    ids=["predicted", "groups", "online"],
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
    trainer = build(pilot_scored_rows=32, max_steps=5)
    trainer.train()
    # Nobody asks for the scored rows' own weights: they are not smoothed.
    assert trainer.selection.smoothing is None
    trainer.weighted_dataset().to_parquet(str(tmp_path / "weighted.parquet"))
    rows = Dataset.from_parquet(str(tmp_path / "weighted.parquet"))
    assert rows["data_weight"][:40] == [row["data_weight"] for row in trainer.weighted_dataset()][:40]
    fixed = build(rows, weight_estimator="none")
    assert torch.isfinite(fixed.sample_weights()).all()


def test_a_full_table_is_reported(build, caplog):
    trainer = build(pilot_scored_rows=32, selector_table_size=64)
    trainer.train()
    assert "selector_table_size" in caplog.text


REFUSED = bad_settings(
    STREAMS,
    [
        ({"max_steps": -1}, "max_steps"),
        ({"packing": True}, "packing"),
        ({"padding_free": True, "max_length": None}, "padding_free"),
        ({"filter_rate": 0.2}, "filter_rate"),
        ({"selector_key_column": "id"}, "selector_key_column='id'` is not a column"),
        (
            {"selector_granularity": "group", "selector_group_column": "site"},
            "selector_group_column='site'` is not a column",
        ),
        ({"adapter": False}, "peft_config"),
        ({"stream_sample_rows": 20}, "stream_sample_rows"),
        ({"selector_table_size": 0}, "selector_table_size"),
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


def test_a_row_without_its_key_is_named(build, mixed):
    holes = [row | {"key": None if i == 50 else row["key"]} for i, row in enumerate(mixed)]
    trainer = build(stream_of(holes), selector_key_column="key", stream_sample_rows=40, max_steps=13)
    with pytest.raises(ValueError, match="no value in the column 'key'"):
        trainer.train()


def test_lists_of_weights_are_refused(build):
    trainer = build()
    with pytest.raises(ValueError, match="weighted_dataset"):
        trainer.sample_weights()
    with pytest.raises(ValueError, match="top_k"):
        trainer.weighted_dataset(top_k=3)


def test_units_do_not_depend_on_machine_or_column_order():
    expected = int.from_bytes(hashlib.blake2b(b"a row", digest_size=8).digest(), "big") % 1000
    assert hashed_unit("a row", 1000) == expected
    assert row_key({"a": 1, "b": "x"}, None) == row_key({"b": "x", "a": 1}, None)
    # Read in batches, a row has the columns of the others, too.
    assert row_key({"a": 1}, None) == row_key({"a": 1, "b": None}, None)


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(st.lists(st.tuples(st.integers(0, 9), st.floats(-3, 3)), min_size=1, max_size=6), max_size=8),
    activation=st.sampled_from(["softmax", "sigmoid"]),
    groups=st.booleans(),
)
def test_units_join_with_the_mean_weight(steps, activation, groups):
    """Sums are those of the rows seen, and a unit that joins changes no mean."""
    count = torch.zeros(10, dtype=torch.int64)
    state = core.init_selector(
        torch.zeros(10, dtype=torch.bool), rows=count.clone() if groups else None, activation=activation, joinable=True
    )
    for step in steps:
        units = torch.tensor([unit for unit, _ in step])
        new = torch.isneginf(state.logits[units])
        before = core.sample_weights(state, units)
        core.admit(state, units)
        after = core.open_weights(state, units)
        if not groups or bool(new.all()):
            assert torch.allclose(after[new], torch.ones(int(new.sum())), atol=1e-4)
        if not groups:
            assert torch.allclose(after[~new], before[~new], rtol=1e-4)
        count.index_add_(0, units, torch.ones_like(units)) if groups else count.index_fill_(0, units, 1)
        scores = torch.tensor([score for _, score in step])
        core.update_sparse_centred(state, units, scores, learning_rate=0.5, entropy_coef=0.02)
        kept = state.totals.clone()
        core.refresh_totals(state)
        torch.testing.assert_close(kept, state.totals, rtol=1e-6, atol=1e-6)
        assert float(state.totals[3]) == int(count.sum())
        weights = torch.nan_to_num(core.sample_weights(state, slice(None)))
        assert float((weights * count).sum() / count.sum()) == pytest.approx(1, abs=1e-5)


def test_assigned_weights_come_back_in_proportion():
    state = core.init_selector(torch.zeros(8, dtype=torch.bool), joinable=True)
    assign = partial(core.assign_weights, state)
    assign(torch.tensor([1, 2, 2]), torch.tensor([1.0, 2.0, 4.0]))
    assign(torch.tensor([5, 1]), torch.tensor([3.0, 0.5]))
    weights = core.open_weights(state, torch.tensor([1, 2, 5, 0]))
    torch.testing.assert_close(weights[:3] / weights[2], torch.tensor([1 / 6, 1.0, 1.0]))
    assert float(weights[3]) == 1 and float(weights[:3].mean()) == pytest.approx(1)
