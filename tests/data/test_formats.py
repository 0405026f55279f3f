"""The one reader of rows: usual formats, odd rows, and what JSON can hold."""

import json
import math
from dataclasses import dataclass

import numpy as np
import pytest
from datasets import Dataset

from trl_bilevel.data import formats
from trl_bilevel.data.files import finite, read_json, write_json
from trl_bilevel.data.formats import (
    answered,
    assistant,
    content,
    layout_of,
    parts,
    question_and_answer,
    turns,
    user,
    with_answer,
)

PARTED = [{"type": "text", "text": "one"}, {"type": "image"}, {"type": "text", "text": "two"}]
SHARED = [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]


@pytest.mark.parametrize(
    ("columns", "layout"),
    [
        (["prompt", "completion", "source"], "pairs"),
        (["messages", "prompt"], "messages"),
        (["conversations"], "conversations"),
        (["instruction", "input", "output"], "instruction"),
        (["question", "response"], "question"),
        (["text", "n"], "text"),
        (["input_ids", "labels"], "tokens"),
        (["input_ids", "messages"], "messages"),
        (["prompt"], None),
        ([], None),
    ],
)
def test_columns_tell_the_format(columns, layout):
    assert layout_of(columns) == layout == layout_of(Dataset.from_dict({name: [1] for name in columns}))


def test_the_text_field_has_a_name():
    assert layout_of(["body"], "body") == "text" and layout_of(["text"], "body") is None
    assert parts({"body": "all"}, "body") == ("", "all")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "q", "completion": "a"}, ("q", "a")),
        ({"prompt": user("q"), "completion": assistant("a")}, (user("q"), assistant("a"))),
        ({"messages": user("q") + assistant("a")}, (user("q"), assistant("a"))),
        ({"conversations": SHARED}, ([{"role": "system", "content": "s"}, *user("q")], assistant("a"))),
        ({"instruction": "q", "input": None, "output": "a"}, (user("q"), assistant("a"))),
        ({"instruction": "q", "input": "more", "output": "a"}, (user("q\nmore"), assistant("a"))),
        ({"question": "q", "response": "a"}, (user("q"), assistant("a"))),
        ({"text": "all"}, ("", "all")),
        # Columns of sets that were joined are missing in the rows of the other set.
        ({"messages": None, "prompt": "q", "completion": "a"}, ("q", "a")),
        ({"prompt": None, "completion": None, "messages": user("q")}, ([], user("q"))),
        ({"input_ids": [1], "text": "all"}, ("", "all")),
        ({"messages": []}, ([], [])),
        ({"messages": None}, ("", "")),
        ({"prompt": None, "completion": "a"}, ("", "a")),
        ({"text": None}, ("", "")),
        ({"text": 3}, ("", "3")),
        # What a chat template reads stays.
        (
            {"messages": [{"role": "assistant", "content": None, "tool_calls": [1]}]},
            ([], [{"role": "assistant", "content": None, "tool_calls": [1]}]),
        ),
    ],
)
def test_what_is_asked_and_answered(row, expected):
    before = json.dumps(row)
    assert parts(row) == expected and json.dumps(row) == before


def test_a_conversation_must_end_with_the_assistant():
    assert answered({"conversations": SHARED})[1] == assistant("a")
    assert answered({"prompt": "q", "completion": ""}) == ("q", "")
    for row in ({"messages": user("q")}, {"messages": []}, {"messages": None}, {"conversations": SHARED[:2]}):
        with pytest.raises(ValueError, match="Row 3 does not end with a message of the assistant"):
            answered(row, where="Row 3")


@pytest.mark.parametrize("row", [{"ask": "a", "reply": "b"}, {"input_ids": [1, 2]}, {}])
def test_rows_without_text_are_refused(row):
    with pytest.raises(ValueError, match=r"A row has the columns .* no text format is recognised"):
        parts(row)


@pytest.mark.parametrize(
    ("part", "text", "named"),
    [
        (None, "", ""),
        ("a", "a", "a"),
        ([], "", ""),
        (user("q"), "q", "q"),
        (SHARED, "s\nq\na", "system: s\nhuman: q\ngpt: a"),
        ([{"role": "user", "content": PARTED}], "one\ntwo", "one\ntwo"),
        ([{"content": "a"}, {"role": "user", "content": None}], "a", "?: a\nuser: "),
        (["a", "b"], "a\nb", ""),
    ],
)
def test_parts_as_text(part, text, named):
    assert content(part) == text and turns(part) == named


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "q", "completion": "a"}, ("q", "a")),
        ({"prompt": [{"role": "user", "content": "q"}], "completion": [{"content": "a"}]}, ("q", "a")),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, ("q", "a")),
        (
            {"messages": [{"role": r, "content": r[0]} for r in ("system", "user", "assistant")]},
            ("system: s\nuser: u", "a"),
        ),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, ("q", "a")),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "part"}]}]}, ("", "part")),
        ({"text": "all of it"}, ("", "all of it")),
        ({"question": "q", "answer": "a", "n": 3}, ("", "question: q\nanswer: a")),
        ({"prompt": None, "completion": None}, ("", "")),
        ({"n": 3}, ("", "(no text in this row)")),
    ],
)  # fmt: skip
def test_rows_of_any_format_can_be_read(row, expected):
    assert question_and_answer(row) == expected


def test_another_answer():
    assert with_answer("old", "new") == "new"
    assert with_answer(user("q") + assistant("old"), "new") == user("q") + assistant("new")
    assert with_answer(SHARED, "new") == [*SHARED[:2], {"from": "gpt", "value": "new"}]
    assert content(with_answer([{"role": "assistant", "content": PARTED}], "new")) == "new"
    kept = [{"role": "assistant", "content": "old", "tool_calls": None}]
    assert with_answer(kept, "new") == [kept[0] | {"content": "new"}] and kept[0]["content"] == "old"


def test_every_trainable_format_is_known():
    assert set(formats.TRAINABLE) == {"pairs", "messages", "conversations", "text", "tokens"}


@dataclass
class Facts:
    loss: float
    rows: list


def test_values_as_json_holds_them(tmp_path):
    value = {1: math.nan, "a": [math.inf, -1.5, True, None], "b": Facts(math.nan, [np.float32(0.5), np.int64(3)])}
    value |= {"c": np.array([1.0, math.nan]), "d": tmp_path, "e": ("x", {"y"})}
    found = finite(value)
    assert found == {
        "1": None,
        "a": [None, -1.5, True, None],
        "b": {"loss": None, "rows": [0.5, 3]},
        "c": [1.0, None],
        "d": str(tmp_path),
        "e": ["x", "{'y'}"],
    }
    assert finite({"a": ["b", 1, False]}, str.upper) == {"A": ["B", 1, False]}
    path = tmp_path / "x.json"
    write_json(path, value)
    assert read_json(path) == found and [file.name for file in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize("text", [None, "", '{"a": ', "[1]", "3", "[" * 100_000, b"\xff"])
def test_a_file_that_is_no_object_holds_nothing(text, tmp_path):
    if text is not None:
        (tmp_path / "x.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert read_json(tmp_path / "x.json") == {}
