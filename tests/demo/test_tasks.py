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
    assert trainer.trusted.weights == {"benign": 0.7, "refused": 0.3}


def test_questions_of_a_users_own_rows():
    """Single questions with a short answer, of any format; what asks nothing is refused."""
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "Why {x}?"}]
    answer = [{"role": "assistant", "content": "Since it is so."}]
    expected = [{"name": "Why (x)?", "description": "Since it is so."}]
    for row in (
        {"messages": chat + answer},
        {"prompt": chat, "completion": answer},
        {"conversations": [{"from": "human", "value": "Why {x}?"}, {"from": "gpt", "value": "Since it is so."}]},
        {"instruction": "Why {x}?", "input": "", "output": "Since it is so."},
    ):
        assert question_answer_rows(Dataset.from_list([row])) == expected
    for left_out in (chat + answer + chat[1:] + answer, chat, answer, [*chat, {"role": "assistant", "content": "no"}]):
        assert question_answer_rows(Dataset.from_list([{"messages": left_out}])) == []
    with pytest.raises(ValueError, match=r"Cannot find questions and answers in the columns \['text'\]"):
        question_answer_rows(Dataset.from_list([{"text": "all"}]))


def test_arms_that_learn_are_arms():
    assert LEARNING.keys() <= ARMS.keys() and not {"alignment", "loss"} & ARMS.keys()
