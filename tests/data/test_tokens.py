"""Rows as tokens: to the last one what TRL's `SFTTrainer` prepares, in every format."""

import json

import pytest
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from tests.conftest import base_arguments
from trl_bilevel.data.tokens import Tokeniser

TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}


def messages(row):
    return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]


def long_chat(row):
    return {"messages": [*messages(row), {"role": "user", "content": "And?"}, messages(row)[1]]}


def tokenised(row, tokenizer):
    prompt, answer = (tokenizer(row[key])["input_ids"] for key in ("prompt", "completion"))
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


FORMATS = {
    "pairs": lambda row, _: {"prompt": row["prompt"], "completion": row["completion"]},
    "chat_pairs": lambda row, _: {"prompt": messages(row)[:1], "completion": messages(row)[1:]},
    "chat_pairs_of_several_turns": lambda row, _: {
        "prompt": long_chat(row)["messages"][:1],
        "completion": long_chat(row)["messages"][1:],
    },
    "messages": lambda row, _: {"messages": messages(row)},
    "long_messages": lambda row, _: long_chat(row),
    "conversations": lambda row, _: {
        "conversations": [{"from": "human", "value": row["prompt"]}, {"from": "gpt", "value": row["completion"]}]
    },
    "text": lambda row, _: {"text": row["prompt"] + row["completion"]},
    "text_that_ends": lambda row, t: {"text": row["prompt"] + row["completion"] + t.eos_token},
    "tokens": tokenised,
}
TEMPLATE = (
    "{% if tools %}{{ '<|im_start|>tools ' + (tools | tojson) + '\n' }}{% endif %}"
    "{% if style %}{{ '<|im_start|>style ' + style + '\n' }}{% endif %}"
)


def compare(rows, tokenizer, tiny_model, folder, settings=None, formatting_func=None, **ours):
    settings = settings or {}
    trainer = SFTTrainer(
        tiny_model(),
        SFTConfig(**base_arguments(folder) | settings),
        train_dataset=rows,
        processing_class=tokenizer,
        formatting_func=formatting_func,
    )
    theirs = trainer.train_dataset
    read = Tokeniser(tokenizer, **({"max_length": settings.get("max_length", 128)} | ours))
    found = read.prepare(rows, formatting_func)
    wanted = [(row["input_ids"], row["labels"]) for row in theirs if any(label != -100 for label in row["labels"][1:])]
    assert [(row["input_ids"], row["labels"]) for row in found] == wanted
    return found


@pytest.mark.parametrize("max_length", [128, 40, None])
@pytest.mark.parametrize("name", FORMATS)
def test_tokens_are_trls(name, max_length, rows, tokenizer, tiny_model, tmp_path):
    data = Dataset.from_list([FORMATS[name](row, tokenizer) for row in rows[:20]])
    pairs = "completion" in data.column_names
    found = compare(
        data, tokenizer, tiny_model, tmp_path, {"max_length": max_length}, max_length=max_length, completion_only=pairs
    )
    if max_length == 40:
        assert max(map(len, found["input_ids"])) <= 40


@pytest.mark.parametrize("completion_only", [False, True])
@pytest.mark.parametrize("name", ["pairs", "chat_pairs", "chat_pairs_of_several_turns"])
def test_completions_alone_or_all(name, completion_only, rows, tokenizer, tiny_model, tmp_path):
    data = Dataset.from_list([FORMATS[name](row, tokenizer) for row in rows[:20]])
    found = compare(
        data,
        tokenizer,
        tiny_model,
        tmp_path,
        {"completion_only_loss": completion_only},
        completion_only=completion_only,
    )
    assert (found[0]["labels"][0] == -100) == completion_only


@pytest.mark.parametrize("name", ["chat_pairs", "chat_pairs_of_several_turns", "messages", "long_messages"])
@pytest.mark.parametrize("completion_only", [False, True])
def test_what_the_assistant_says_alone(name, completion_only, rows, tokenizer, tiny_model, tmp_path):
    data = Dataset.from_list([FORMATS[name](row, tokenizer) for row in rows[:20]])
    if completion_only and "completion" not in data.column_names:
        pytest.skip("TRL refuses it")
    settings = {"assistant_only_loss": True, "completion_only_loss": completion_only}
    found = compare(
        data, tokenizer, tiny_model, tmp_path, settings, assistant_only=True, completion_only=completion_only
    )
    scored = [i for i, label in zip(found[0]["input_ids"], found[0]["labels"], strict=True) if label != -100]
    assert tokenizer.decode(scored).startswith(rows[0]["completion"])


@pytest.fixture
def talkative(tokenizer):
    """A tokenizer whose template shows tools and a style."""
    before = tokenizer.chat_template
    tokenizer.chat_template = TEMPLATE + before
    yield tokenizer
    tokenizer.chat_template = before


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize("name", ["chat_pairs", "messages"])
def test_tools(name, as_text, rows, talkative, tiny_model, tmp_path):
    tools = json.dumps([TOOL]) if as_text else [TOOL]
    data = Dataset.from_list([FORMATS[name](row, talkative) | {"tools": tools} for row in rows[:10]])
    pairs = "completion" in data.column_names
    found = compare(data, talkative, tiny_model, tmp_path, {"max_length": 256}, max_length=256, completion_only=pairs)
    assert "Adds." in talkative.decode(found[0]["input_ids"])


@pytest.mark.parametrize("name", ["chat_pairs", "messages"])
def test_arguments_of_the_template_by_row(name, rows, talkative, tiny_model, tmp_path):
    data = Dataset.from_list(
        [
            FORMATS[name](row, talkative) | {"chat_template_kwargs": {"style": ["brief", "long"][n % 2]}}
            for n, row in enumerate(rows[:10])
        ]
    )
    pairs = "completion" in data.column_names
    found = compare(data, talkative, tiny_model, tmp_path, completion_only=pairs)
    assert "style brief" in talkative.decode(found[0]["input_ids"])
    assert "style long" in talkative.decode(found[1]["input_ids"])


def test_arguments_of_the_template_for_all(rows, talkative):
    data = Dataset.from_list([FORMATS["messages"](row, talkative) for row in rows[:4]])
    found = Tokeniser(talkative, template={"style": "brief"}).prepare(data)
    assert "style brief" in talkative.decode(found[0]["input_ids"])


def test_conversations_with_role_and_content(rows, tokenizer):
    """TRL does not know them."""
    read = Tokeniser(tokenizer, completion_only=False)
    first, second = (
        read.prepare(Dataset.from_list([{name: messages(row)} for row in rows[:5]]))
        for name in ("messages", "conversations")
    )
    assert first.to_dict() == second.to_dict()


def test_a_formatting_function(rows, tokenizer, tiny_model, tmp_path):
    data = Dataset.from_list([{"question": row["prompt"], "answer": row["completion"]} for row in rows[:10]])
    compare(
        data, tokenizer, tiny_model, tmp_path, formatting_func=lambda row: f"Q: {row['question']} A: {row['answer']}"
    )


def test_another_column_of_text(rows, tokenizer, tiny_model, tmp_path):
    data = Dataset.from_list([{"said": row["completion"]} for row in rows[:10]])
    compare(data, tokenizer, tiny_model, tmp_path, {"dataset_text_field": "said"}, text_field="said")


def test_tokens_without_labels_are_all_scored(rows, tokenizer, tiny_model, tmp_path):
    data = Dataset.from_list([{"input_ids": tokenised(row, tokenizer)["input_ids"]} for row in rows[:10]])
    compare(data, tokenizer, tiny_model, tmp_path, completion_only=False)


def test_masks_of_tokenised_rows(rows, tokenizer, tiny_model, tmp_path):
    def masked(row):
        tokens = tokenised(row, tokenizer)
        return {
            "input_ids": tokens["input_ids"],
            "completion_mask": [int(label != -100) for label in tokens["labels"]],
        }

    data = Dataset.from_list([masked(row) for row in rows[:10]])
    found = compare(data, tokenizer, tiny_model, tmp_path, {"completion_only_loss": True}, completion_only=True)
    assert found[0]["labels"][0] == -100


def test_rows_keep_their_numbers(rows, tokenizer):
    """Rows without a token to score are dropped; columns of our names are replaced."""
    data = [*rows[:3], {"prompt": "long " * 200, "completion": "x"}, *rows[3:5]]
    named = Dataset.from_list([row | {"sample_id": 7, "data_weight": 1.0} for row in data])
    found = Tokeniser(tokenizer, 64).prepare(named)
    assert found["sample_id"][:] == [0, 1, 2, 4, 5]
    assert set(found.column_names) == {"input_ids", "labels", "sample_id"}


def test_all_rows_dropped_and_none_given(rows, tokenizer):
    read = Tokeniser(tokenizer, 8)
    long = Dataset.from_list([{"prompt": "long " * 200, "completion": "x"}] * 3)
    assert len(read.prepare(long)) == 0
    assert len(read.prepare(Dataset.from_list(rows[:2]).select([]))) == 0
