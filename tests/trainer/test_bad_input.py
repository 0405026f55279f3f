"""Every bad input is refused at construction, with a message that names the argument, the value and the remedy."""

import json

import pytest
import torch
from datasets import Dataset
from peft import PromptTuningConfig, get_peft_model
from trl import pack_dataset

from trl_bilevel import BilevelSFTConfig, BilevelSFTTrainer, NonFiniteScoreError


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight_estimator": "magic"}, r"`weight_estimator` must be one of 'value_function'.*got 'magic'"),
        ({"validation_loss_weight": 1.0}, r"`validation_loss_weight` must lie in \[0, 1\), got 1.0"),
        ({"validation_loss_weight": -0.1}, "`validation_loss_weight` must lie in"),
        ({"validation_loss_weight": float("nan")}, "`validation_loss_weight` must lie in"),
        ({"validation_loss_weight": 0, "weight_estimator": "loss"}, "without any influence"),
        ({"validation_batch_size": 0}, "`validation_batch_size` must be at least 1, got 0"),
        ({"estimator_refresh_steps": 0}, "`estimator_refresh_steps` must be at least 1"),
        ({"validation_every": 0}, "`validation_every` must be at least 1"),
        ({"pilot_feature_depth": 0.0}, r"`pilot_feature_depth` must lie in \(0, 1\], got 0.0"),
        ({"validation_loss_weight_decay": 0.1}, "`validation_loss_weight_decay=0.1` has nothing to take away"),
        ({"lookahead_steps": -1}, "`lookahead_steps` must be at least 1"),
        ({"pilot_steps": 0}, "`pilot_steps` must be at least 1"),
        ({"pilot_learning_rate": float("inf")}, "`pilot_learning_rate` must be a finite number"),
        ({"selector_learning_rate": -1.0}, "`selector_learning_rate` must be a finite number of at least 0"),
        ({"filter_rate": 1.0}, r"`filter_rate` must lie in \[0, 1\)"),
        ({"selector_entropy_coef": 2.0}, "`selector_entropy_coef` must lie in"),
        ({"selector_granularity": "group"}, "needs `selector_group_column`"),
        ({"selector_granularity": "token"}, "`selector_granularity` must be one of 'sample', 'group'"),
        ({"selector_activation": "relu"}, "`selector_activation` must be one of"),
        ({"alignment_direction": "down"}, "`alignment_direction` must be one of 'preconditioned', 'gradient'"),
        ({"alignment_averaging": 1.0}, r"`alignment_averaging` must lie in \[0, 1\), got 1.0"),
        ({"selector_update": "sgd"}, "`selector_update` must be one of"),
        ({"selector_preset": "mine"}, "`selector_preset` must be one of 'reliable', 'balanced'"),
        ({"selector_weighting": "both"}, "`selector_weighting` must be one of"),
        ({"selector_weighting": "resample", "selector_update": "adam"}, "needs `selector_update='calibrated'`"),
        ({"selector_weighting": "resample", "packing": True}, "rows are packed before weights.*padding_free=True"),
    ],
)
def test_config(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        BilevelSFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **arguments)


@pytest.fixture
def build(tiny_model, config, train_rows, validation_rows, tokenizer):
    def make(train=train_rows, validation=validation_rows, model=None, **overrides):
        return BilevelSFTTrainer(
            model or tiny_model(),
            config(pilot_steps=2, **overrides),
            train_dataset=train,
            validation_dataset=validation,
            processing_class=tokenizer,
        )

    return make


def test_no_training_set(build):
    with pytest.raises(ValueError, match="`train_dataset` is required"):
        build(train=None)


def test_list_of_rows(build, train_rows):
    with pytest.raises(TypeError, match="got `list`.*Dataset.from_list"):
        build(train=list(train_rows))


def test_empty_training_set(build, train_rows):
    with pytest.raises(ValueError, match="`train_dataset` is empty"):
        build(train=train_rows.select([]))


def test_no_validation_set(build):
    with pytest.raises(ValueError, match="`validation_dataset` is required.*weight_estimator='none'"):
        build(validation=None)


def test_validation_term_without_validation_set(build):
    with pytest.raises(ValueError, match="`validation_dataset` is required"):
        build(validation=None, weight_estimator="none", validation_loss_weight=0.5)


@pytest.mark.parametrize("name", [None, "a"])
def test_empty_validation_set(build, validation_rows, name):
    empty = validation_rows.select([])
    with pytest.raises(ValueError, match="is empty"):
        build(validation=empty if name is None else {name: empty})


def test_empty_validation_dict(build):
    with pytest.raises(ValueError, match="empty dict"):
        build(validation={})


def test_overlap_is_counted(build, train_rows, validation_rows):
    from datasets import concatenate_datasets

    mixed = concatenate_datasets([validation_rows, train_rows.select([3, 4])])
    with pytest.warns(UserWarning, match="2 of 22 rows of `validation_dataset` 'validation' are also training rows"):
        build(validation=mixed)


def test_validation_rows_all_dropped(build):
    validation = Dataset.from_list([{"prompt": "word " * 300, "completion": "x"}] * 10)
    with pytest.raises(
        ValueError, match="All 10 rows of `validation_dataset` 'validation' were dropped.*max_length=128"
    ):
        build(validation=validation)


def test_too_few_validation_rows(build, validation_rows):
    with pytest.raises(ValueError, match="has 3 usable rows.*needs at least 8"):
        build(validation=validation_rows.select(range(3)))


def test_missing_group_column(build):
    with pytest.raises(ValueError, match="`selector_group_column='source'` is not a column.*'prompt'"):
        build(selector_granularity="group", selector_group_column="source")


@pytest.mark.parametrize("column", ["sample_id", "data_weight", "data_rank"])
def test_reserved_column(build, train_rows, column):
    with pytest.raises(ValueError, match=f"`train_dataset` has the column.*{column}.*Rename"):
        build(train=train_rows.add_column(column, [0] * len(train_rows)))


def test_fewer_rows_than_a_batch(build, train_rows):
    with pytest.raises(ValueError, match="has 5 usable rows, fewer than one batch of 8"):
        build(train=train_rows.select(range(5)))


def test_unusable_validation_weights(build, validation_rows):
    with pytest.raises(ValueError, match=r"`validation_weights=.*each of the validation sets \['a', 'b'\]"):
        build(validation={"a": validation_rows, "b": validation_rows}, validation_weights={"a": 1.0})


ONLINE_ALIGNMENT = {"weight_estimator": "alignment", "selector_update": "sparse_centred"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"packing": True, **ONLINE_ALIGNMENT, "alignment_normalise": True},
            "`alignment_normalise=True` is not supported with `packing`.*Unset it",
        ),
        (
            {"packing": True, "packing_strategy": "wrapped", **ONLINE_ALIGNMENT},
            "rows attend to each other.*packing_strategy='bfd'",
        ),
        ({"packing": True, "max_length": None}, "`packing=True` needs `max_length`"),
        ({"train_sampling_strategy": "group_by_length"}, "contradicts `selector_weighting='resample'`"),
        ({"loss_type": "dft"}, "`loss_type='dft'` is not supported"),
    ],
)
def test_unsupported(build, overrides, message):
    with pytest.raises(ValueError, match=message):
        build(**overrides)


def test_rows_packed_before(build, tokenizer, train_rows):
    rows = train_rows.map(lambda row: {"input_ids": tokenizer(row["completion"])["input_ids"]})
    packed = pack_dataset(rows.select_columns("input_ids"), 64)
    packed = packed.map(lambda row: {"labels": row["input_ids"]})
    with pytest.raises(ValueError, match="column 'seq_lengths', so its rows are packed already"):
        build(train=packed, per_device_train_batch_size=2)


def test_prompt_learning_with_packing(build, tiny_model):
    model = get_peft_model(tiny_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="not supported with prompt learning.*Use LoRA"):
        build(model=model, packing=True)


def test_online_value_function_needs_a_validation_term(build):
    with pytest.raises(ValueError, match="leaves the validation set without influence.*lookahead"):
        build(weight_estimator="value_function", validation_loss_weight=0, selector_update="sparse_centred")


def test_nothing_to_train(build, tiny_model):
    with pytest.raises(ValueError, match="no trainable parameter"):
        build(model=tiny_model().requires_grad_(False))


def test_loss_estimator_warns(build):
    with pytest.warns(UserWarning, match="prefers easy bad rows"):
        build(weight_estimator="loss")


class PoisonRow(torch.nn.Module):
    """Makes the embedding of one token NaN from the n-th training forward on."""

    def __init__(self, model, token, after):
        super().__init__()
        self.calls, self.after, self.token = 0, after, token
        model.get_input_embeddings().register_forward_hook(self.poison)

    def poison(self, module, inputs, output):
        self.calls += 1
        if self.calls > self.after:
            return torch.where((inputs[0] == self.token).unsqueeze(-1), torch.nan, output)
        return output


@pytest.mark.parametrize("update", ["calibrated", "sparse_centred"])
def test_nan_scores_stop_the_run_and_name_the_rows(
    update, tiny_model, config, rows, validation_rows, tokenizer, tmp_path
):
    data = [dict(row) for row in rows[:40]]
    data[17]["completion"] += "\u00ff"
    token = tokenizer("\u00ff")["input_ids"][-1]
    model = tiny_model()
    trainer = BilevelSFTTrainer(
        model,
        config(selector_update=update, pilot_steps=2, max_steps=20, selector_weighting="loss"),
        train_dataset=Dataset.from_list(data),
        validation_dataset=validation_rows,
        processing_class=tokenizer,
    )
    trainer.start_selection()
    PoisonRow(model, token, after=2)
    with pytest.raises(NonFiniteScoreError, match=r"\[17\] have a NaN or infinite.*checkpoint-") as error:
        trainer.train()
    step = trainer.state.global_step
    folder = tmp_path / "out" / f"checkpoint-{step}"
    assert str(folder) in str(error.value)
    assert (folder / "selector.safetensors").is_file()
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == step
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_nan_scores_of_the_pilot(tiny_model, config, rows, validation_rows, tokenizer):
    data = [dict(row) for row in rows[:40]]
    data[17]["completion"] += "\u00ff"
    model = tiny_model()
    before = [p.detach().clone() for p in model.parameters()]
    trainer = BilevelSFTTrainer(
        model,
        config(pilot_steps=1, pilot_batch_size=1),
        train_dataset=Dataset.from_list(data),
        validation_dataset=validation_rows,
        processing_class=tokenizer,
    )
    PoisonRow(model, tokenizer("\u00ff")["input_ids"][-1], after=6)
    with pytest.raises(NonFiniteScoreError, match=r"pilot run scored training rows \(sample_id\) \[17\]"):
        trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_state_of_other_data_is_refused(build, train_rows, tmp_path):
    trainer = build(save_strategy="steps", save_steps=3, max_steps=3)
    trainer.train()
    checkpoint = str(tmp_path / "out" / "checkpoint-3")
    with pytest.raises(ValueError, match="other training data or settings.*rows: 40 then, 39 now"):
        build(train=train_rows.select(range(39))).train(resume_from_checkpoint=checkpoint)
    changed = train_rows.map(lambda row, i: {"completion": row["completion"] + "!" * (i == 11)}, with_indices=True)
    with pytest.raises(ValueError, match="train_fingerprint.*ignore_selector_fingerprint"):
        build(train=changed).train(resume_from_checkpoint=checkpoint)
    build(train=changed, ignore_selector_fingerprint=True).train(resume_from_checkpoint=checkpoint)


def test_checkpoint_without_selector_is_refused(build, tmp_path):
    build(save_strategy="steps", save_steps=3, max_steps=3).train()
    checkpoint = tmp_path / "out" / "checkpoint-3"
    (checkpoint / "selector.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no selector state.*silently forget"):
        build().train(resume_from_checkpoint=str(checkpoint))


def test_damaged_selector_state_is_refused(build, tmp_path):
    build(save_strategy="steps", save_steps=3, max_steps=3).train()
    checkpoint = tmp_path / "out" / "checkpoint-3"
    content = (checkpoint / "selector.safetensors").read_bytes()
    (checkpoint / "selector.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="is damaged"):
        build().train(resume_from_checkpoint=str(checkpoint))
