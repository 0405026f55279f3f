"""Hidden states of rows: a function of the row, whatever stands beside it."""

import pytest
import torch

from tests.weights.conftest import prepare, trusted_sets
from trl_bilevel.weights.language_model import LanguageModel, left_as_it_was
from trl_bilevel.weights.processes import Processes
from trl_bilevel.weights.progress import Progress
from trl_bilevel.weights.reading import Reading, mean_states


@pytest.fixture
def reading(tiny_model, prepared, trusted):
    model = tiny_model()
    with left_as_it_was(model), torch.no_grad():
        yield Reading(LanguageModel(model), prepared, trusted, 0.5, Processes.now(), Progress(True))


def test_states_do_not_depend_on_the_batch(tiny_model, prepared):
    reader = LanguageModel(tiny_model().eval())
    together = mean_states(reader, prepared.batch([0, 1, 2]), 0.5)
    assert together.shape == (3, 64) and together.dtype == torch.float32
    alone = torch.cat([mean_states(reader, prepared.batch([row]), 0.5) for row in (0, 1, 2)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def test_states_are_means_of_answer_and_prompt(tiny_model, prepared):
    model = tiny_model().eval()
    row = prepared.dataset[0]
    with torch.no_grad():
        states = model(torch.tensor([row["input_ids"]]), output_hidden_states=True).hidden_states[1][0]
    answer = torch.tensor(row["labels"]) != -100
    expected = torch.cat([states[answer].mean(0), states[~answer].mean(0)])
    torch.testing.assert_close(mean_states(LanguageModel(model), prepared.batch([0]), 0.5)[0], expected)


def test_rows_come_back_in_the_order_of_their_places(reading):
    places = torch.tensor([7, 3, 70, 0])
    alone = torch.cat([mean_states(reading.model, reading.rows.batch([row]), 0.5) for row in places.tolist()])
    torch.testing.assert_close(reading.states(places), alone, atol=1e-5, rtol=1e-4)


def test_pairs_are_read_as_rows_of_their_own(reading, tokenizer, mixed):
    """A question with another row's answer, against the same text as a row."""
    found = reading.mismatched(torch.arange(10))
    place, question, answer = 4, int(found.questions[4]), int(found.answers[4])
    assert question != answer and mixed[question]["completion"] != mixed[answer]["completion"]
    row = {"prompt": mixed[question]["prompt"], "completion": mixed[answer]["completion"]}
    expected = mean_states(reading.model, prepare([row], tokenizer).batch([0]), 0.5)
    torch.testing.assert_close(found.states[place], expected[0], atol=1e-5, rtol=1e-4)


def test_places_of_pairs_beyond_the_first_batch(reading, monkeypatch):
    monkeypatch.setattr("trl_bilevel.weights.reading.NEAR_ROWS", 8)
    found = reading.mismatched(torch.arange(20))
    assert found.questions.tolist() == list(range(20))
    assert all(a // 8 == b // 8 for a, b in zip(found.questions.tolist(), found.answers.tolist(), strict=True))


def test_rows_without_questions_have_no_pairs(tiny_model, tokenizer, rows):
    text = [{"text": row["prompt"] + row["completion"]} for row in rows[:20]]
    model = tiny_model()
    with left_as_it_was(model):
        reading = Reading(
            LanguageModel(model),
            prepare(text, tokenizer),
            trusted_sets(tokenizer, a=text[:8]),
            0.5,
            Processes.now(),
            Progress(True),
        )
        assert reading.mismatched(torch.arange(20)) is None
