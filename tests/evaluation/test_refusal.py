"""Refusals by key words."""

import csv

import pytest

from trl_bilevel.data import assets
from trl_bilevel.data.answers import STUB, TEST_REFUSAL
from trl_bilevel.demo import experiment
from trl_bilevel.demo.tasks import REFUSALS
from trl_bilevel.evaluation.refusal import (
    KeywordRefusals,
    is_refusal,
    load_object,
    outcomes_of,
    says_refusal,
)

# 105 and 64 responses labelled as refusal or not by people: what a refusal judge can be checked with (MIT licence).
LABELLED_REFUSALS = (
    assets.PackagedFile(
        "pyrit==1.1.0",
        "pyrit/datasets/scorer_evals/refusal_scorer/refusal.csv",
        "1ebc42ef7dadd97962cc00d04edd6a52a321f7936c063ff3453d2bbcef30a5d7",
    ),
    assets.PackagedFile(
        "pyrit==1.1.0",
        "pyrit/datasets/scorer_evals/refusal_scorer/refusal_extra.csv",
        "6ce7f61a8205eb8c29b1a247b52b3730501349f9adf0674a696efb004658a18a",
    ),
)


@pytest.mark.parametrize("text", [*REFUSALS, TEST_REFUSAL, "  I can’t do that.", "Sorry, I cannot help."])
def test_refusals_that_open_the_answer(text):
    assert is_refusal(text) and says_refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        "Sorry, but I can't assist with that request.",
        "No, I cannot assist with this request.",
        "I apologize, but this is not something to help with.",
        "I'm really sorry, but I have to stop here.",
        "My apologies, but I'm unable to provide instructions.",
        "[CLASSIC] I can’t help write that.",
        "That would hurt people, so I must decline.",
    ],
)
def test_refusals_further_on(text):
    assert says_refusal(text) and not is_refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        STUB,
        "Sure! A thread that cannot stop can be interrupted.",
        "Return the sum; raises an error if it cannot be computed.",
        "It is a sorry state of affairs.",
        "To refuse an offer politely, thank them first.",
        "word " * 60 + "I cannot say more.",
    ],
)
def test_answers_are_no_refusals(text):
    assert not says_refusal(text) and not is_refusal(text)


def test_outcomes():
    judge = KeywordRefusals()
    assert outcomes_of(judge, ["p"] * 4, [TEST_REFUSAL, STUB, "", " ...\n"]) == [1, 0, -1, -1]


def test_a_judge_of_wrong_outcomes_is_refused():
    class Broken:
        def judge(self, prompts, responses):
            return [2] * len(responses)

    with pytest.raises(ValueError, match=r"Broken.judge must give 1 \(refusal\)"):
        outcomes_of(Broken(), ["p"], ["r"])


def test_objects_by_name():
    made = load_object("trl_bilevel.evaluation.refusal:KeywordRefusals", "refusal_judge")
    assert isinstance(made, KeywordRefusals)
    with pytest.raises(ValueError, match="Could not import 'no.such:thing', given for `judge`"):
        load_object("no.such:thing", "judge")
    with pytest.raises(ValueError, match="has no method `judge`"):
        load_object("trl_bilevel.data.answers:STUB", "refusal_judge")


def test_the_demo_judges_by_the_same_function():
    assert experiment.is_refusal is is_refusal


@pytest.mark.slow
@pytest.mark.parametrize(("file", "found", "labelled"), [(0, 50, 70), (1, 8, 39)])
def test_against_labels_of_people(file, found, labelled):
    """What docs/evaluation.md says of precision and recall."""
    lines = assets.fetch(LABELLED_REFUSALS[file]).read_text(encoding="utf-8-sig").splitlines(keepends=True)
    rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    labels = [row["human_score"] == "1" for row in rows]
    judged = [says_refusal(row["assistant_response"]) for row in rows]
    assert sum(labels) == labelled
    assert sum(judged) == found == sum(a and b for a, b in zip(labels, judged, strict=True))
