"""With no estimator and no validation term, the trainer is SFTTrainer, to the last bit, in every data format."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from tests.conftest import base_arguments, losses, parameters
from trl_bilevel import BilevelSFTConfig, BilevelSFTTrainer


def chat(row):
    return {
        "messages": [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"]},
        ]
    }


def chat_prompt(row):
    return {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "completion": [{"role": "assistant", "content": row["completion"]}],
    }


FORMATS = {
    "language_modelling": (lambda row: {"text": row["prompt"] + row["completion"]}, {}),
    "prompt_completion": (lambda row: row, {}),
    "conversational": (chat, {}),
    "conversational_prompt": (chat_prompt, {}),
    "assistant_only": (chat, {"assistant_only_loss": True}),
    "whole_sequence": (lambda row: row, {"completion_only_loss": False}),
    "keep_start": (lambda row: row, {"max_length": 28}),
    "keep_end": (lambda row: row, {"max_length": 20, "truncation_mode": "keep_end"}),
    "pretokenised": (None, {}),
    "packed": (lambda row: row, {"packing": True, "max_length": 64, "per_device_train_batch_size": 2}),
    "padding_free": (lambda row: row, {"padding_free": True, "max_length": None}),
    "checkpointing": (lambda row: row, {"gradient_checkpointing": True}),
}


def as_format(name, rows, tokenizer):
    make, overrides = FORMATS[name]
    if name == "pretokenised":
        out = []
        for row in rows:
            prompt, answer = (tokenizer(row[key])["input_ids"] for key in ("prompt", "completion"))
            out.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
        return Dataset.from_list(out), overrides
    return Dataset.from_list([make(row) for row in rows]), overrides


@pytest.mark.parametrize(
    "adapter", [pytest.param(True, id="lora", marks=pytest.mark.compat), pytest.param(False, id="full")]
)
@pytest.mark.parametrize("name", FORMATS)
def test_equals_sft_trainer_bit_for_bit(name, adapter, rows, tokenizer, tiny_model, tmp_path):
    data, overrides = as_format(name, rows[:40], tokenizer)
    arguments = base_arguments(tmp_path) | {"max_steps": 4} | overrides
    common = {"train_dataset": data, "processing_class": tokenizer}

    def peft():
        return LoraConfig(r=4, target_modules="all-linear") if adapter else None

    plain = SFTTrainer(tiny_model(), SFTConfig(**arguments), peft_config=peft(), **common)
    plain.train()
    ours = BilevelSFTTrainer(
        tiny_model(),
        BilevelSFTConfig(weight_estimator="none", validation_loss_weight=0, **arguments),
        peft_config=peft(),
        **common,
    )
    ours.train()
    assert losses(ours) == losses(plain)
    assert all(torch.equal(a, b) for a, b in zip(parameters(ours), parameters(plain), strict=True))


def test_equal_weights_are_sft(train_rows, tokenizer, tiny_model, config, tmp_path):
    """Weights of one multiply losses by exactly one."""
    plain = SFTTrainer(
        tiny_model(), SFTConfig(**base_arguments(tmp_path)), train_dataset=train_rows, processing_class=tokenizer
    )
    plain.train()
    ours = BilevelSFTTrainer(
        tiny_model(),
        config(weight_estimator="none"),
        train_dataset=train_rows.add_column("data_weight", [1.0] * len(train_rows)),
        processing_class=tokenizer,
    )
    ours.train()
    assert losses(ours) == losses(plain)
    assert all(torch.equal(a, b) for a, b in zip(parameters(ours), parameters(plain), strict=True))


def test_evaluation_rows_report_as_in_sft(train_rows, validation_rows, tokenizer, tiny_model, config, tmp_path):
    common = {"train_dataset": train_rows, "eval_dataset": validation_rows, "processing_class": tokenizer}
    plain = SFTTrainer(tiny_model(), SFTConfig(**base_arguments(tmp_path)), **common).evaluate()
    ours = BilevelSFTTrainer(
        tiny_model(), config(), validation_dataset=validation_rows.select(range(8)), **common
    ).evaluate()
    assert ours["eval_loss"] == plain["eval_loss"]
