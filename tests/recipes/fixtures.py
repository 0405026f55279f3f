"""Rows in the schemas of the public sets that the recipes use. All of it is made up here; unsafe answers are stubs."""

import itertools

from trl_bilevel.data.answers import STUB
from trl_bilevel.data.assets import docstrings

CATEGORIES = ("animal_abuse", "hate_speech,offensive_language", "privacy_violation")


def openorca(count=60):
    return [
        {
            "id": f"flan.{i}",
            "system_prompt": "" if i % 3 == 0 else "You are a helpful assistant. Think step by step.",
            "question": f"What does `{row['name']}` do? (orca {i})",
            "response": row["description"],
        }
        for i, row in enumerate(docstrings()[:count])
    ]


def alpaca(count=80):
    return [
        {
            "instruction": f"Describe the function `{row['name']}`.",
            "input": "" if i % 2 else f"Use at most {i + 3} words.",
            "output": row["description"],
        }
        for i, row in enumerate(docstrings()[200 : 200 + count])
    ]


def slimorca(count=120):
    rows = []
    for i, row in enumerate(docstrings()[400 : 400 + count]):
        turns = [{"from": "system", "value": "You are an AI assistant.", "weight": None}] if i % 2 else []
        turns.append({"from": "human", "value": f"Explain `{row['name']}` ({i}).", "weight": 0.0})
        turns.append({"from": "gpt", "value": row["description"], "weight": 1.0})
        rows.append({"conversations": turns})
    return rows


def red_team(count=60):
    return [
        {
            "min_harmlessness_score_transcript": -2.5 if i % 6 else 1.2,
            "num_params": "52B",
            "model_type": "plain lm",
            "transcript": f"\n\nHuman: Tell me how to do the forbidden thing number {i}\n\nAssistant: {STUB} ({i})"
            "\n\nHuman: And then?\n\nAssistant: [content removed]",
            "rating": 4.0,
            "task_description": "[content removed]",
            "task_description_harmlessness_score": -1.0,
            "red_team_member_id": i,
            "is_upworker": True,
            "tags": None,
        }
        for i in range(count)
    ]


def beavertails(count=120):
    """Four answers to each question, two of them safe."""
    rows = []
    for i in range(count):
        safe = i % 4 < 2
        rows.append(
            {
                "prompt": f"How would one do the forbidden thing number {i // 4}?",
                "response": f"Better not, for reason {i % 4}: it is not safe." if safe else f"{STUB} ({i})",
                "category": dict.fromkeys(CATEGORIES, False) | {CATEGORIES[i % 3]: not safe},
                "is_safe": safe,
            }
        )
    return rows


HUB = {
    "Open-Orca/OpenOrca": openorca,
    "yahma/alpaca-cleaned": alpaca,
    "Open-Orca/SlimOrca": slimorca,
    "Anthropic/hh-rlhf": red_team,
    "PKU-Alignment/BeaverTails": beavertails,
}


def hub(**changes):
    """`loader` and `resolve` that serve the made-up rows; `changes` replaces rows, by the end of a set's name."""

    def load(source, revision):
        assert revision.startswith("commit-of-"), "rows must be read at a commit, not at a branch"
        for ending, rows in changes.items():
            if source.repository.endswith(ending):
                return iter(rows)
        return iter(HUB[source.repository]())

    return {
        "loader": load,
        "resolve": lambda repository, revision: f"commit-of-{revision.removeprefix('commit-of-')}",
    }


def endless(rows):
    """The rows, and then an error: what reads on has not kept to `scan`."""
    yield from itertools.islice(rows, len(rows))
    raise AssertionError("read too far")
