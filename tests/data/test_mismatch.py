"""Answers put behind other questions: which tokens go where."""

import torch

from trl_bilevel.data.mismatch import mismatched
from trl_bilevel.data.rows import pad_rows

ROWS = [
    {"input_ids": [1, 2, 11, 12], "labels": [-100, -100, 11, 12]},
    {"input_ids": [1, 3, 4, 21], "labels": [-100, -100, -100, 21]},
    {"input_ids": [1, 5, 31, 32, 33], "labels": [-100, -100, 31, -100, 33]},
]


def test_each_question_gets_the_next_answer():
    found = mismatched(pad_rows(ROWS, pad_token_id=9))
    assert [(each.question, each.answer) for each in found] == [(0, 1), (1, 2), (2, 0)]
    assert found[0].row == {"input_ids": [1, 2, 21], "labels": [-100, -100, 21]}
    # Tokens within an answer that are not scored stay in it.
    assert found[1].row == {"input_ids": [1, 3, 4, 31, 32], "labels": [-100, -100, -100, 31, -100]}
    assert found[2].row == {"input_ids": [1, 5, 11, 12], "labels": [-100, -100, 11, 12]}


def test_padding_may_be_on_either_side():
    right = pad_rows(ROWS)
    left = {name: torch.zeros_like(value) for name, value in right.items()}
    left["labels"][:] = -100
    for place, row in enumerate(ROWS):
        count = len(row["input_ids"])
        for name, value in (*row.items(), ("attention_mask", [1] * count)):
            left[name][place, -count:] = torch.tensor(value)
    assert mismatched(left) == mismatched(right)


def test_the_same_question_or_answer_is_passed_over():
    same = [ROWS[0], ROWS[0], {"input_ids": [1, 7, 11, 12], "labels": [-100, -100, 11, 12]}, ROWS[1]]
    found = mismatched(pad_rows(same))
    assert [(each.question, each.answer) for each in found] == [(0, 3), (1, 3), (2, 3), (3, 0)]


def test_without_questions_there_is_nothing_to_swap():
    text = [{"input_ids": [n, 2, 3], "labels": [n, 2, 3]} for n in range(4)]
    assert mismatched(pad_rows(text)) == []
    assert mismatched(pad_rows(ROWS[:1])) == []
    assert mismatched(pad_rows([ROWS[0], text[0]])) == []


def test_a_long_question_leaves_room_for_an_answer():
    long = [{"input_ids": [*range(1, 9), 50], "labels": [-100] * 8 + [50]}, ROWS[2]]
    found = mismatched(pad_rows(long))
    assert len(found[0].row["input_ids"]) == 9 and found[0].row["labels"][-1] == 31
