"""Damage that is seeded, touches answers only, and does not give itself away; the demo's sets stay what they were."""

import hashlib
import json
import random

import pytest
from datasets import Dataset

from trl_bilevel.data.answers import BOILERPLATE, STUB
from trl_bilevel.data.contamination import DAMAGES, Exchange, contaminate, exchange_of
from trl_bilevel.demo.tasks import make_task

QUESTIONS = [f"What is {name}?" for name in "abcdefghijklmnopqrstuvwxyz"]
ANSWERS = [f"Number {i} of the letters:\n\n it comes before {i + 1} and after {i - 1} ." for i in range(26)]
FORMATS = {
    "text": lambda q, a: {"prompt": q + "\n", "completion": f" {a}<|im_end|>\n"},
    "chat": lambda q, a: {
        "prompt": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": q}],
        "completion": [{"role": "assistant", "content": a}],
    },
    "conversations": lambda q, a: {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]},
    "parts": lambda q, a: {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": q}]},
            {"role": "assistant", "content": [{"type": "text", "text": a}]},
        ]
    },
    "messages": lambda q, a: {
        "messages": [
            {"role": "user", "content": "Hello."},
            {"role": "assistant", "content": "Hello!"},
            {"role": "user", "content": q},
            {"role": "assistant", "content": a},
        ]
    },
}


def clean(name):
    rows = [FORMATS[name](q, a) | {"number": i} for i, (q, a) in enumerate(zip(QUESTIONS, ANSWERS, strict=True))]
    return Dataset.from_list(rows)


@pytest.mark.parametrize("name", FORMATS)
def test_only_answers_of_the_chosen_rows_change(name):
    rows = clean(name)
    out = contaminate(rows, 0.5, list(DAMAGES), seed=1)
    assert out.column_names == [*rows.column_names, "kind"]
    assert {k: out.features[k] for k in rows.column_names} == dict(rows.features)
    kinds = out["kind"][:]
    assert kinds.count("good") == 13 and {kinds.count(kind) for kind in DAMAGES} == {2, 3}
    for before, after, kind in zip(rows, out, kinds, strict=True):
        assert exchange_of(before).question == exchange_of(after).question and before["number"] == after["number"]
        assert (exchange_of(before).answer == exchange_of(after).answer) == (kind == "good")


@pytest.mark.parametrize("kind", DAMAGES)
def test_what_each_kind_does(kind):
    rows = clean("text")
    before = [row["completion"] for row in rows]
    damaged = [
        (old, row["completion"])
        for old, row in zip(before, contaminate(rows, 0.6, [kind]), strict=True)
        if row["kind"] == kind
    ]
    assert len(damaged) == 16
    for old, new in damaged:
        # What surrounds an answer would tell a damaged row from a good one without reading it.
        assert new.startswith(" ") and not new.startswith("  ") and new.endswith("<|im_end|>\n")
        old, new = (text[1 : -len("<|im_end|>\n")] for text in (old, new))
        if kind == "lazy":
            assert new in BOILERPLATE
        elif kind == "stub":
            assert new == STUB
        elif kind == "swapped":
            assert new in ANSWERS and new != old
        elif kind == "salad":
            assert len(new.split()) == len(old.split()) and new not in ANSWERS
        elif kind == "scrambled":
            assert sorted(new.split()) == sorted(old.split()) and "\n\n" in new
        else:
            assert old.startswith(new) and len(new.split()) == len(old.split()) // 3


def test_a_pure_function_of_the_seed():
    rows = clean("chat")
    state = random.getstate()
    first, again, other = (contaminate(rows, seed=seed) for seed in (5, 5, 6))
    assert list(first) == list(again) != list(other)
    assert random.getstate() == state and rows.column_names == ["prompt", "completion", "number"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kinds": ["rotten"]}, "must be some of lazy, swapped"),
        ({"kinds": []}, "must be some of"),
        ({"rate": 1.0}, "`rate` must lie between 0 and 1, got 1.0"),
        ({"column": "number"}, "column 'number' already"),
        ({"rows": Dataset.from_list([{"prompt": "a", "completion": "b"}] * 3)}, "3 rows are too few"),
        ({"rows": Dataset.from_list([{"prompt": f"{i}", "completion": "same"} for i in range(9)])}, "Only 0 of 4"),
        ({"rows": Dataset.from_list([{"prompt": "q", "completion": f"{i}"} for i in range(9)])}, "same question"),
        ({"rows": Dataset.from_list([{"question": "a", "answer": "b"}] * 9)}, "columns ['question', 'answer']"),
        (
            {"rows": Dataset.from_list([{"messages": [{"role": "user", "content": "a"}]}] * 9)},
            "does not end with a message of the assistant",
        ),
    ],
)
def test_mistakes_are_named(change, message):
    given = {"rows": clean("text"), "kinds": ["swapped"]} | change
    with pytest.raises(ValueError) as error:
        contaminate(**given)
    assert message in str(error.value)


def test_an_answer_of_one_word_is_not_scrambled():
    rows = Dataset.from_list(
        [{"prompt": f"{i}", "completion": "one" if i % 2 else "one two three"} for i in range(12)]
    )
    out = contaminate(rows, 0.4, ["scrambled"])
    assert all(row["completion"] != "one" for row in out if row["kind"] == "scrambled")


def test_swapping_skips_other_rows_with_the_same_question():
    pool = [Exchange("a", "1"), Exchange("a", "2"), Exchange("b", "3")]
    answers = {DAMAGES["swapped"](pool[0], random.Random(seed), pool) for seed in range(20)}
    assert answers == {"3"}


@pytest.mark.parametrize(
    ("task", "digest"),
    [("quality", "a5b0cc69535daf7e"), ("scrambled", "2a90553adbc3c48b"), ("truncated", "7eacd41f2c49073e")],
)
def test_the_demos_sets_are_those_that_were_measured(task, digest):
    made = make_task(task, 0)
    text = json.dumps([list(made.train), list(made.validation), list(made.test), made.harmful_test])
    assert hashlib.sha256(text.encode()).hexdigest().startswith(digest)
