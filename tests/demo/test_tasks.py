"""The demo's data."""

import pytest
from datasets import Dataset

from trl_bilevel.data.answers import REFUSALS
from trl_bilevel.demo.experiment import ARMS, LEARNING, budget_of, make_trainer
from trl_bilevel.demo.tasks import conversational, make_task, plain, question_answer_rows


def test_trusted_rows_of_a_safety_task_are_two_objectives():
    task = make_task("safety")
    for rows in (task, conversational(task)):
        sets = rows.validation_sets
        assert [len(part) for part in sets.values()] == [24, 24]
        answers = {
            name: {plain(a if isinstance(a, str) else a[0]["content"]) for a in part["completion"]}
            for name, part in sets.items()
        }
        assert answers["refused"] <= {text.strip() for text in REFUSALS}
        assert not answers["benign"] & {text.strip() for text in REFUSALS}


def test_validation_weights_reach_the_trainer(tiny_model, tokenizer, tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    budget = budget_of("safety", overrides={"validation_weights": {"benign": 0.7, "refused": 0.3}}, lora_layers=0)
    trainer, _ = make_trainer(
        "bilevel", make_task("safety"), seed=0, budget=budget, model=str(tmp_path / "model"), output_dir=str(tmp_path)
    )
    assert trainer.validation.weights == {"benign": 0.7, "refused": 0.3}


LONG = "An answer of some words."
FORMATS = {
    "pairs": [{"prompt": "Why?", "completion": LONG}, {"prompt": "What?", "completion": "Too short."}],
    "messages": [
        {
            "messages": [
                {"role": "system", "content": "Be kind."},
                {"role": "user", "content": "Why?"},
                {"role": "assistant", "content": LONG},
            ]
        },
        {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": LONG}] * 2},
    ],
    "instruction": [{"instruction": "Why", "input": "?", "output": LONG}],
}


@pytest.mark.parametrize("name", FORMATS)
def test_questions_and_answers_of_usual_formats(name):
    question = "Why\n?" if name == "instruction" else "Why?"
    rows = question_answer_rows(Dataset.from_list(FORMATS[name]))
    assert rows == [{"name": question, "description": LONG}]


def test_unknown_columns_are_named():
    with pytest.raises(ValueError, match=r"columns \['text'\]. Known formats"):
        question_answer_rows(Dataset.from_list([{"text": "a"}]))


def test_arms_that_learn_are_arms():
    assert LEARNING.keys() <= ARMS.keys() and not {"alignment", "loss"} & ARMS.keys()
