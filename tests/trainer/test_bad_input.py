"""Every bad input is refused at construction, with a message that names the argument, the value and the remedy."""

import json

import pytest
import torch
from datasets import Dataset
from peft import PromptTuningConfig, get_peft_model
from trl import pack_dataset

from tests.errors_table import CHECKPOINTS, DATA, SUPPORT, bad_input, bad_settings
from trl_bilevel import BilevelSFTConfig, BilevelSFTTrainer, NonFiniteScoreError
from trl_bilevel.trainer import checks
from trl_bilevel.trainer.bilevel_sft_config import RENAMED

SETTINGS = "Settings of `BilevelSFTConfig`"
SCORES = "Losses and scores that are not finite"

CONFIGS = bad_settings(
    SETTINGS,
    [
        (
            {"weight_estimator": "magic"},
            r"`weight_estimator` must be one of 'probe', 'value_function', 'both', 'none', got 'magic'",
        ),
        ({"weight_estimator": "alignment"}, "`weight_estimator='alignment'` is gone.*Use 'probe'"),
        (
            {"weight_estimator": "lookahead"},
            "`weight_estimator='lookahead'` is gone.*Use 'probe'.*or 'value_function'",
        ),
        ({"weight_estimator": "loss"}, "set `selector_preset='seal'`"),
        ({"weight_estimator": "probe", "selector_preset": "seal"}, "scores rows by 'loss'.*Leave one of them out"),
        ({"validation_loss_weight": 1.0}, r"`validation_loss_weight` must lie in \[0, 1\), got 1.0"),
        ({"validation_loss_weight": -0.1}, "`validation_loss_weight` must lie in"),
        ({"validation_loss_weight": float("nan")}, "`validation_loss_weight` must lie in"),
        ({"validation_loss_weight": 0, "selector_preset": "seal"}, "without influence.*Set it above 0"),
        ({"pilot_steps": 4}, "`pilot_steps=4` has no meaning with `weight_estimator='probe'`.*Leave it out"),
        ({"pilot_steps": 4, "selector_preset": "fast"}, "`pilot_steps=4` has no meaning with"),
        ({"weight_estimator": "both", "pilot_steps": 0}, "`pilot_steps` must be at least 1"),
        ({"pilot_learning_rate": float("inf")}, "`pilot_learning_rate` must be a finite number"),
        ({"calibration_sharpness": -1.0}, "`calibration_sharpness` must be a finite number"),
        ({"filter_rate": 1.0}, r"`filter_rate` must lie in \[0, 1\)"),
        ({"selector_preset": "mine"}, "`selector_preset` must be one of 'balanced', 'reliable'"),
        ({"selector_weighting": "both"}, "`selector_weighting` must be one of"),
        ({"selector_weighting": "resample", "selector_preset": "seal"}, "Use `selector_weighting='loss'`"),
        ({"selector_weighting": "resample", "packing": True}, "rows are packed before weights.*padding_free=True"),
        ({"filter_rate": 0.2, "selector_preset": "paper"}, "do not go with `selector_preset='paper'`"),
        ({"stream_sample_rows": 20}, "`stream_sample_rows` must be at least 32, got 20"),
    ],
)


@pytest.mark.parametrize(("arguments", "message"), CONFIGS)
def test_config(arguments, message, refused, tmp_path):
    with refused(message):
        BilevelSFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **arguments)


@pytest.mark.parametrize("name", RENAMED)
def test_old_settings_name_their_successor(name, tmp_path):
    with pytest.raises(TypeError, match=f"`{name}` is gone. (Use|Leave it out:) "):
        BilevelSFTConfig(output_dir=str(tmp_path), **{name: 1})


@pytest.fixture
def build(tiny_model, config, train_rows, validation_rows, tokenizer):
    def make(train=train_rows, validation=validation_rows, model=None, **overrides):
        return BilevelSFTTrainer(
            model or tiny_model(),
            config(**overrides),
            train_dataset=train,
            validation_dataset=validation,
            processing_class=tokenizer,
        )

    return make


@pytest.mark.bad_input(SUPPORT, "FSDP or DeepSpeed where weights are learned")
def test_sharded_parameters(refused, build, train_rows, monkeypatch):
    """Given weights need no choice, and are let through."""
    check = checks.check_model

    def sharded(*args):
        check(*args[:4], sharded=True)

    monkeypatch.setattr(checks, "check_model", sharded)
    fixed = train_rows.add_column("data_weight", [1.0] * len(train_rows))
    build(train=fixed, weight_estimator="none", validation_loss_weight=0.0)
    with refused("where weights are learned.*`data_weight`"):
        build()


@pytest.mark.bad_input(DATA, "no `train_dataset`")
def test_no_training_set(refused, build):
    with refused("`train_dataset` is required"):
        build(train=None)


@pytest.mark.bad_input(DATA, "a list of rows as `train_dataset`")
def test_list_of_rows(refused, build, train_rows):
    with refused("got `list`.*Dataset.from_list", TypeError):
        build(train=list(train_rows))


@pytest.mark.bad_input(DATA, "`train_dataset` without rows")
def test_empty_training_set(refused, build, train_rows):
    with refused("`train_dataset` is empty"):
        build(train=train_rows.select([]))


@pytest.mark.bad_input(DATA, "no `validation_dataset`")
def test_no_validation_set(refused, build):
    with refused("`validation_dataset` is required.*weight_estimator='none'"):
        build(validation=None)


@pytest.mark.bad_input(DATA, "no `validation_dataset`, with `validation_loss_weight=0.5`")
def test_validation_term_without_validation_set(refused, build):
    with refused("`validation_dataset` is required"):
        build(validation=None, weight_estimator="none", validation_loss_weight=0.5)


@pytest.mark.parametrize(
    "name",
    [
        bad_input(DATA, "`validation_dataset` without rows", None),
        bad_input(DATA, "one set of `validation_dataset` without rows", "a"),
    ],
)
def test_empty_validation_set(refused, build, validation_rows, name):
    empty = validation_rows.select([])
    with refused("is empty"):
        build(validation=empty if name is None else {name: empty})


@pytest.mark.bad_input(DATA, "`validation_dataset={}`")
def test_empty_validation_dict(refused, build):
    with refused("empty dict"):
        build(validation={})


@pytest.mark.bad_input(DATA, "validation rows that are training rows too")
def test_overlap_is_counted(refused, build, train_rows, validation_rows):
    from datasets import concatenate_datasets

    mixed = concatenate_datasets([validation_rows, train_rows.select([3, 4])])
    with refused("2 of 22 rows of `validation_dataset` 'validation' are also training rows", UserWarning):
        build(validation=mixed)


@pytest.mark.bad_input(DATA, "validation rows whose prompts fill `max_length`")
def test_validation_rows_all_dropped(refused, build):
    validation = Dataset.from_list([{"prompt": "word " * 300, "completion": "x"}] * 10)
    with refused("All 10 rows of `validation_dataset` 'validation' were dropped.*max_length=128"):
        build(validation=validation)


@pytest.mark.bad_input(DATA, "3 validation rows")
def test_too_few_validation_rows(refused, build, validation_rows):
    with refused("has 3 usable rows; at least 8 are needed"):
        build(validation=validation_rows.select(range(3)))


@pytest.mark.bad_input(DATA, "`selector_group_column` that is not there")
def test_missing_group_column(refused, build):
    with refused("`selector_group_column='source'` is not a column.*'prompt'"):
        build(selector_group_column="source")


@pytest.mark.parametrize(
    "column",
    [
        bad_input(DATA, f"training rows with a column `{name}`", name)
        for name in ("sample_id", "data_weight", "data_rank")
    ],
)
def test_reserved_column(refused, build, train_rows, column):
    with refused(f"`train_dataset` has the column.*{column}.*Rename"):
        build(train=train_rows.add_column(column, [0] * len(train_rows)))


@pytest.mark.bad_input(DATA, "5 training rows, batches of 8")
def test_fewer_rows_than_a_batch(refused, build, train_rows):
    with refused("has 5 usable rows, fewer than one batch of 8"):
        build(train=train_rows.select(range(5)))


@pytest.mark.bad_input(DATA, "`validation_weights` for one of two sets")
def test_unusable_validation_weights(refused, build, validation_rows):
    with refused(r"`validation_weights=.*each of the validation sets \['a', 'b'\]"):
        build(validation={"a": validation_rows, "b": validation_rows}, validation_weights={"a": 1.0})


UNSUPPORTED = bad_settings(
    SUPPORT,
    [
        ({"packing": True, "max_length": None}, "`packing=True` needs `max_length`"),
        ({"train_sampling_strategy": "group_by_length"}, "contradicts `selector_weighting='resample'`"),
        ({"selector_weighting": "loss", "loss_type": "dft"}, "`loss_type='dft'` is not supported"),
        (
            {"selector_weighting": "loss", "label_smoothing_factor": 0.1},
            "`label_smoothing_factor` and `compute_loss_func` are not supported",
        ),
    ],
)


@pytest.mark.parametrize(("overrides", "message"), UNSUPPORTED)
def test_unsupported(refused, build, overrides, message):
    with refused(message):
        build(**overrides)


@pytest.mark.bad_input(SUPPORT, "training rows that are packed already")
def test_rows_packed_before(refused, build, tokenizer, train_rows):
    rows = train_rows.map(lambda row: {"input_ids": tokenizer(row["completion"])["input_ids"]})
    packed = pack_dataset(rows.select_columns("input_ids"), 64)
    packed = packed.map(lambda row: {"labels": row["input_ids"]})
    with refused("column 'seq_lengths', so its rows are packed already"):
        build(train=packed, per_device_train_batch_size=2)


@pytest.mark.bad_input(SUPPORT, "prompt tuning, with `packing=True`")
def test_prompt_learning_with_packing(refused, build, tiny_model):
    model = get_peft_model(tiny_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with refused("not supported with prompt learning.*Use LoRA"):
        build(model=model, packing=True)


@pytest.mark.bad_input(SUPPORT, "a frozen model")
def test_nothing_to_train(refused, build, tiny_model):
    with refused("no trainable parameter"):
        build(model=tiny_model().requires_grad_(False))


@pytest.mark.bad_input(SUPPORT, "`selector_preset='seal'`")
def test_loss_estimator_warns(refused, build):
    with refused("prefers easy bad rows", UserWarning):
        build(selector_preset="seal")


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


@pytest.mark.parametrize(
    "preset",
    [
        bad_input(SCORES, f"a row with a NaN loss in training, `selector_preset='{name}'`", name)
        for name in ("balanced", "sparse_centred")
    ],
)
def test_nan_scores_stop_the_run_and_name_the_rows(
    refused, preset, tiny_model, config, rows, validation_rows, tokenizer, tmp_path
):
    data = [dict(row) for row in rows[:40]]
    data[17]["completion"] += "\u00ff"
    token = tokenizer("\u00ff")["input_ids"][-1]
    model = tiny_model()
    trainer = BilevelSFTTrainer(
        model,
        config(selector_preset=preset, max_steps=20, selector_weighting="loss"),
        train_dataset=Dataset.from_list(data),
        validation_dataset=validation_rows,
        processing_class=tokenizer,
    )
    trainer.choose_weights()
    PoisonRow(model, token, after=2)
    with refused(r"\[17\] have a NaN or infinite.*checkpoint-", NonFiniteScoreError) as error:
        trainer.train()
    step = trainer.state.global_step
    folder = tmp_path / "out" / f"checkpoint-{step}"
    assert str(folder) in str(error.value)
    assert (folder / "weights.safetensors").is_file()
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == step
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize(
    "estimator",
    [
        bad_input(SCORES, "a row whose hidden states are NaN", {}),
        bad_input(
            SCORES,
            "a row with a NaN loss in the pilot run",
            {"weight_estimator": "value_function", "pilot_steps": 1},
        ),
    ],
)
def test_nan_scores(refused, estimator, tiny_model, config, rows, validation_rows, tokenizer):
    data = [dict(row) for row in rows[:40]]
    data[17]["completion"] += "\u00ff"
    model = tiny_model()
    before = [p.detach().clone() for p in model.parameters()]
    trainer = BilevelSFTTrainer(
        model,
        config(**estimator),
        train_dataset=Dataset.from_list(data),
        validation_dataset=validation_rows,
        processing_class=tokenizer,
    )
    # While rows are read or scored, not in a pilot's training.
    token, embeddings = tokenizer("\u00ff")["input_ids"][-1], model.get_input_embeddings()
    embeddings.register_forward_hook(
        lambda module, inputs, output: (
            output if torch.is_grad_enabled() else torch.where((inputs[0] == token).unsqueeze(-1), torch.nan, output)
        )
    )
    with refused(r"scores of training rows \(sample_id\) \[17\]", NonFiniteScoreError):
        trainer.train()
    assert all(torch.equal(a, b.cpu()) for a, b in zip(before, model.parameters(), strict=True))


@pytest.fixture
def checkpoint(build, tmp_path):
    build(save_strategy="steps", save_steps=3, max_steps=3).train()
    return tmp_path / "out" / "checkpoint-3"


@pytest.mark.bad_input(CHECKPOINTS, "`resume_from_checkpoint` of a run on more rows")
def test_state_of_other_rows(refused, build, train_rows, checkpoint):
    with refused("other training data or settings.*rows: 40 then, 39 now"):
        build(train=train_rows.select(range(39))).train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.bad_input(CHECKPOINTS, "`resume_from_checkpoint` of a run on rows with another text")
def test_state_of_changed_rows(refused, build, train_rows, checkpoint):
    changed = train_rows.map(lambda row, i: {"completion": row["completion"] + "!" * (i == 11)}, with_indices=True)
    with refused("train_fingerprint.*ignore_selector_fingerprint"):
        build(train=changed).train(resume_from_checkpoint=str(checkpoint))
    build(train=changed, ignore_selector_fingerprint=True).train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.bad_input(CHECKPOINTS, "a checkpoint without `weights.safetensors`")
def test_checkpoint_without_selector_is_refused(refused, build, checkpoint):
    (checkpoint / "weights.safetensors").unlink()
    with refused("has no weights.*silently forget", FileNotFoundError):
        build().train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.bad_input(CHECKPOINTS, "`weights.safetensors` that was cut off")
def test_damaged_selector_state_is_refused(refused, build, checkpoint):
    content = (checkpoint / "weights.safetensors").read_bytes()
    (checkpoint / "weights.safetensors").write_bytes(content[: len(content) // 2])
    with refused("are damaged"):
        build().train(resume_from_checkpoint=str(checkpoint))
