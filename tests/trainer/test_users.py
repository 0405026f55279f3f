"""What users do beside the main road: each of these went wrong once."""

import pytest
import torch
from datasets import Dataset, DatasetDict
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from tests.errors_table import CHECKPOINTS, DATA, bad_input
from trl_bilevel import BilevelSFTTrainer
from trl_bilevel.weights import state


@pytest.fixture
def build(tiny_model, config, train_rows, validation_rows, tokenizer):
    def make(train=train_rows, validation=validation_rows, evaluation=None, peft_config=None, **overrides):
        return BilevelSFTTrainer(
            tiny_model(),
            config(**overrides),
            train_dataset=train,
            validation_dataset=validation,
            eval_dataset=evaluation,
            processing_class=tokenizer,
            peft_config=peft_config,
        )

    return make


def test_sharper_calibration_concentrates_the_weights(build):
    sizes = []
    for sharpness in (1.0, 5.0, 20.0, 100.0):
        trainer = build(calibration_sharpness=sharpness)
        trainer.choose_weights()
        weights = trainer.sample_weights()
        sizes.append(float(weights.sum() ** 2 / (weights**2).sum()) / len(weights))
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] < 0.9


def test_collapsed_weights_are_told_with_a_remedy_that_has_effect(build, caplog, monkeypatch):
    monkeypatch.setattr(state, "NEARLY_COLLAPSED", 1.1)
    build().choose_weights()
    assert caplog.text.count("nearly collapsed") == 1
    assert "calibration_sharpness" in caplog.text and "selector_entropy_coef" not in caplog.text


def as_messages(rows):
    return [
        {
            "messages": [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["completion"]},
            ]
        }
        for row in rows
    ]


@pytest.mark.bad_input(DATA, "conversations as validation rows, prompts and completions as training rows")
def test_trusted_rows_whose_prompts_would_count(refused, build, rows):
    trusted = Dataset.from_list(as_messages(rows[40:60]))
    with refused(r"`validation_dataset` 'validation' has the columns \['messages'\].*Split"):
        build(validation=trusted)
    build(validation=trusted, completion_only_loss=False)
    build(train=Dataset.from_list(as_messages(rows[:40])), validation=trusted)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        bad_input(
            DATA,
            "training rows with the columns `question`, `answer`",
            "train",
            r"`train_dataset` has the columns \['question', 'answer'\].*Rename them",
        ),
        bad_input(
            DATA,
            "validation rows with the columns `question`, `answer`",
            "validation",
            r"`validation_dataset` 'validation' has the columns \['question'",
        ),
    ],
)
def test_unknown_columns(refused, build, rows, argument, message):
    odd = Dataset.from_list([{"question": row["prompt"], "answer": row["completion"]} for row in rows[:40]])
    with refused(message):
        build(**{argument: odd})


@pytest.mark.bad_input(DATA, "a `DatasetDict` as `train_dataset`")
def test_a_dict_of_splits(refused, build, train_rows):
    with refused(r"`DatasetDict` of \['train'\]: pick one", TypeError):
        build(train=DatasetDict({"train": train_rows}))


def test_eval_rows_with_columns_of_our_names(build, rows):
    numbered = Dataset.from_list([row | {"sample_id": f"x{i}"} for i, row in enumerate(rows[60:70])])
    for evaluation in (numbered, {"train": numbered}):
        trainer = build(evaluation=evaluation, max_steps=1)
        trainer.train()
        assert trainer.evaluate()
    assert trainer.evaluate(numbered)["eval_loss"] > 0


@pytest.mark.parametrize("packing", [True, False])
def test_the_training_rows_and_exported_rows_can_be_evaluated(packing, build):
    trainer = build(packing=packing, per_device_train_batch_size=2, max_steps=1)
    trainer.train()
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] > 0
    assert len(trainer.row_losses(trainer.weighted_dataset(5))) == 5


@pytest.mark.parametrize(
    "change",
    [
        bad_input(CHECKPOINTS, f"`resume_from_checkpoint` of a run with other `{next(iter(change))}`", change)
        for change in (
            {"filter_rate": 0.5},
            {"calibration_sharpness": 3.0},
            {"selector_weighting": "loss"},
            {"validation": "other"},
        )
    ],
)
def test_changed_settings_are_refused_on_resume(refused, change, build, rows, tmp_path):
    build(save_strategy="steps", save_steps=2, max_steps=2).train()
    change = {k: Dataset.from_list(rows[60:80]) if k == "validation" else v for k, v in change.items()}
    with refused("belong to other training data or settings"):
        build(max_steps=4, **change).train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))


@pytest.mark.bad_input(DATA, "one validation row in the only set that counts")
def test_the_only_set_that_counts_has_one_row(refused, build, validation_rows):
    sets = {"a": validation_rows.select([0]), "b": validation_rows.select(range(1, 20))}
    with refused("Every set .* that counts"):
        build(validation=sets, validation_weights={"a": 1.0, "b": 0.0})


@pytest.mark.bad_input(DATA, "`data_weight` as text")
def test_weights_as_text(refused, build, train_rows):
    with refused("`data_weight` of `train_dataset` must be numbers, got '1'", TypeError):
        build(train=train_rows.add_column("data_weight", ["1"] * 40), weight_estimator="none")


def test_many_groups_do_not_flood_the_log(build, train_rows):
    groups = train_rows.add_column("source", torch.arange(40).tolist()).with_format("torch")
    trainer = build(train=groups, selector_group_column="source")
    assert trainer.data.groups.names[:2] == ["0", "1"]
    trainer.choose_weights()
    assert len([name for name in trainer.weights.metrics() if name.startswith("selector/share/")]) == 32


@pytest.mark.bad_input(DATA, "a column `sample_lengths`")
def test_a_column_of_lengths_is_not_taken_for_ours(refused, build, train_rows):
    """It would say where packed rows end."""
    with refused(r"has the column\(s\) \['sample_lengths'\]"):
        build(train=train_rows.add_column("sample_lengths", [[3]] * 40), padding_free=True, max_length=None)


def test_plain_runs_take_columns_of_any_name(build, train_rows):
    named = train_rows.add_column("sample_id", list(range(40)))
    build(train=named, weight_estimator="none", max_steps=1).train()


@pytest.mark.parametrize("format", ["torch", "numpy"])
@pytest.mark.parametrize("packing", [False, True])
def test_the_format_of_the_rows_does_not_matter(format, packing, build, train_rows):
    def weights(rows, trusted):
        with pytest.warns(UserWarning, match="20 of 20 rows .* are also training rows"):
            trainer = build(rows, trusted, packing=packing, max_length=64, max_steps=2)
        trainer.train()
        return trainer.sample_weights()

    overlapping = train_rows.select(range(20))
    plain = weights(train_rows, overlapping)
    torch.testing.assert_close(weights(train_rows.with_format(format), overlapping.with_format(format)), plain)


def test_the_best_rows_are_rows_with_a_weight(build, rows):
    short = Dataset.from_list([*rows[:30], *({"prompt": "long " * 200, "completion": "x"} for _ in range(10))])
    trainer = build(short, max_length=64)
    assert int(trainer.sample_weights().isnan().sum()) == 10
    best = trainer.weighted_dataset(36)
    assert len(best) == 30 and None not in best["data_weight"][:]


@pytest.mark.bad_input(DATA, "fixed weights of 0 for all rows that preparation keeps")
def test_no_kept_row_with_weight(refused, build, rows):
    data = [*(row | {"data_weight": 0.0} for row in rows[:10])]
    data.append({"prompt": "long " * 200, "completion": "x", "data_weight": 1.0})
    with refused("is 0 for all 10 rows that preparation has kept"):
        build(Dataset.from_list(data), weight_estimator="none", validation_loss_weight=0.0, max_length=64)


@pytest.mark.bad_input(DATA, "rows none of which has a token to learn from")
def test_no_row_is_kept(refused, build, rows):
    long = Dataset.from_list([{"prompt": "long " * 200, "completion": "x"}] * 10)
    with refused("None of the 10 rows.*max_length=64"):
        build(long, max_length=64)


@pytest.mark.parametrize(
    ("which", "column", "value"),
    [
        bad_input(DATA, "a training row without an answer", "train", "completion", None),
        bad_input(DATA, "a trusted row without a question", "validation", "prompt", None),
        bad_input(DATA, "a conversation without a turn", "train", "messages", []),
    ],
)
def test_missing_texts(refused, build, rows, which, column, value):
    def chat(row):
        turns = (("user", row["prompt"]), ("assistant", row["completion"]))
        return {"messages": [{"role": role, "content": text} for role, text in turns]}

    sets = [rows[:40], rows[40:60]]
    if column == "messages":
        sets = [[chat(row) for row in each] for each in sets]
    sets[which == "validation"][3] = sets[which == "validation"][3] | {column: value}
    with refused(rf"`{column}` of `{which}.* 1 of .* rows: \[3\].*filter"):
        build(*(Dataset.from_list(each) for each in sets))


@pytest.mark.parametrize("setting", [{}, {"selector_preset": "sparse_centred"}])
def test_a_collator_may_need_other_columns(setting, config, tiny_model, tokenizer, train_rows, validation_rows):
    class Measured(DataCollatorForLanguageModeling):
        def __call__(self, examples):
            assert all(row["length"] > 0 for row in examples)
            return super().__call__(examples)

    def measured(rows):
        return rows.map(lambda row: {"length": len(row["prompt"])})

    trainer = BilevelSFTTrainer(
        tiny_model(),
        config(remove_unused_columns=False, max_steps=2, **setting),
        data_collator=Measured(pad_token_id=0),
        train_dataset=measured(train_rows),
        validation_dataset=measured(validation_rows),
        processing_class=tokenizer,
    )
    trainer.train()
    assert trainer.row_losses(measured(validation_rows)).isfinite().all()


def test_training_again_keeps_what_choosing_found(build, tmp_path):
    trainer = build(max_steps=1)
    trainer.train()
    weights, record = trainer.sample_weights(), tmp_path / "out" / "_record"
    found = (record / "pilot.json").read_bytes()
    trainer.train()
    torch.testing.assert_close(trainer.sample_weights(), weights)
    assert (record / "pilot.json").read_bytes() == found
    build(max_steps=1, weight_estimator="none").train()
    assert not (record / "pilot.json").exists()
