"""Contaminated training sets with known truth, made of real text: what a selection method is tested on.

Every task is a pure function of its seed. `kind` names what was done to each row ("good": nothing); no trainer sees
it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from datasets import Dataset

from ..data import assets
from ..data.answers import REFUSALS, STUB
from ..data.contamination import Damage, Exchange, salad, scrambled, swapped, truncated

PROMPT = "<|im_start|>user\nWhat does the Python function `{name}` do?<|im_end|>\n<|im_start|>assistant\n"
REQUEST = "<|im_start|>user\n{request}<|im_end|>\n<|im_start|>assistant\n"
END = "<|im_end|>"

BOILERPLATE = (
    "I don't know, sorry.",
    "It does what its name says.",
    "Please look it up in the documentation.",
    "This function does something in Python.",
)


@dataclass
class Task:
    """A training set of mixed quality, a trusted validation set and a test set.

    Attributes:
        name: of the task.
        train: `prompt`, `completion`, `kind` ("good", or what was done to the row).
        validation: `prompt`, `completion`; trusted.
        test: `prompt`, `completion`; clean, unseen.
        harmful_test: harmful requests that are tested for refusal (safety task only).
        trusted_refusals: how many of the validation rows, the last ones, refuse a harmful request.
    """

    name: str
    train: Dataset
    validation: Dataset
    test: Dataset
    harmful_test: list[str]
    trusted_refusals: int = 0

    @property
    def validation_sets(self) -> dict[str, Dataset]:
        """The validation rows of a safety task as two objectives, "benign" and "refused"."""
        count = len(self.validation) - self.trusted_refusals
        return {
            "benign": self.validation.select(range(count)),
            "refused": self.validation.select(range(count, len(self.validation))),
        }

    @property
    def good(self) -> list[bool]:
        """Truth: which training rows are undamaged."""
        return [kind == "good" for kind in self.train["kind"]]


Row = dict[str, str]


def lazy(exchange: Exchange, rng: random.Random, pool: Sequence[Exchange]) -> str:
    """One of four boilerplate sentences about a function."""
    return rng.choice(BOILERPLATE)


@dataclass(frozen=True)
class Mixture:
    """How many rows a docstring task keeps and damages."""

    good: int
    damaged: int
    damages: tuple[Damage, ...]


DOCSTRING_TASKS = {
    "quality": Mixture(96, 288, (lazy, swapped, salad)),
    "quality_large": Mixture(320, 960, (lazy, swapped, salad)),
    "boilerplate": Mixture(192, 192, (lazy,)),
    "scrambled": Mixture(192, 192, (scrambled,)),
    "truncated": Mixture(192, 192, (truncated,)),
    "scrambled_large": Mixture(640, 640, (scrambled,)),
    "truncated_large": Mixture(640, 640, (truncated,)),
}
# How many of the harmful training requests are refused; the others are complied with by a stub.
SAFETY_TASKS = {"safety": 40, "safety_scarce": 2, "safety_unanswered": 0}
TASKS = (*DOCSTRING_TASKS, *SAFETY_TASKS)


def make_task(
    name: str,
    seed: int = 0,
    validation_rows: int = 32,
    test_rows: int = 160,
    rows: list[Row] | None = None,
    damaged_share: float | None = None,
) -> Task:
    """A task by name.

    Args:
        name: "quality" (lazy, swapped and word-salad answers, three quarters of the rows), "boilerplate", "scrambled",
            "truncated" (half of the rows each); "quality_large", "scrambled_large", "truncated_large" (the same with
            1,280 rows in place of 384); "safety" (harmful requests, mostly answered by compliance stubs),
            "safety_scarce" (two of them refused) or "safety_unanswered" (none).
        seed: draws rows and damages.
        validation_rows, test_rows: sizes of the clean sets. The safety tasks have 24 refusals and 24 benign answers
            for validation whatever is given.
        rows: `{"name", "description"}` rows to build the task from; Python's standard library if None.
        damaged_share: share of the training rows that is damaged, in place of the task's own; their number stays.

    Raises:
        ValueError: for an unknown name, or if there are too few rows.
    """
    if name in SAFETY_TASKS:
        return _safety(name, seed, test_rows)
    if name not in DOCSTRING_TASKS:
        raise ValueError(f"Unknown task {name!r}; known tasks: {', '.join(TASKS)}.")
    mixture = DOCSTRING_TASKS[name]
    if damaged_share is not None:
        damaged = round(damaged_share * (mixture.good + mixture.damaged))
        mixture = Mixture(mixture.good + mixture.damaged - damaged, damaged, mixture.damages)
    rng = random.Random(f"{name}-{seed}")
    prompt = PROMPT if rows is None else REQUEST.replace("{request}", "{name}")
    rows = assets.docstrings() if rows is None else list(rows)
    needed = validation_rows + test_rows + mixture.good + mixture.damaged
    if len(rows) < needed:
        raise ValueError(f"The task {name!r} needs {needed} question-answer rows, got {len(rows)}.")
    rng.shuffle(rows)
    validation, rows = rows[:validation_rows], rows[validation_rows:]
    test, pool = rows[:test_rows], rows[test_rows:]
    exchanges = [Exchange(row["name"], row["description"]) for row in pool]
    train = [_docstring(row, prompt) | {"kind": "good"} for row in pool[: mixture.good]]
    for index, exchange in enumerate(exchanges[mixture.good : mixture.good + mixture.damaged]):
        damage = mixture.damages[index % len(mixture.damages)]
        answer = damage(exchange, rng, exchanges)
        train.append(_row(exchange.question, answer, prompt) | {"kind": damage.__name__})
    rng.shuffle(train)
    return Task(
        name,
        Dataset.from_list(train),
        Dataset.from_list([_docstring(row, prompt) for row in validation]),
        Dataset.from_list([_docstring(row, prompt) for row in test]),
        [],
    )


def _safety(name: str, seed: int, test_rows: int) -> Task:
    rng = random.Random(f"safety-{seed}")
    rows, requests = assets.docstrings(), assets.harmful_requests()
    rng.shuffle(rows)
    rng.shuffle(requests)
    benign_validation, rows = rows[:24], rows[24:]
    test, benign = rows[:test_rows], rows[test_rows : test_rows + 96]
    # HarmBench: 116 requests to train on, 24 for validation, 60 to test.
    share = SAFETY_TASKS[name]
    refused, complied, trusted, tested = requests[:share], requests[share:116], requests[116:140], requests[140:200]
    train = [_docstring(row) | {"kind": "good"} for row in benign]
    train += [_request(text, rng.choice(REFUSALS)) | {"kind": "good"} for text in refused]
    train += [_request(text, STUB) | {"kind": "stub"} for text in complied]
    rng.shuffle(train)
    validation = [_docstring(row) for row in benign_validation]
    validation += [_request(text, rng.choice(REFUSALS)) for text in trusted]
    return Task(
        name,
        Dataset.from_list(train),
        Dataset.from_list(validation),
        Dataset.from_list([_docstring(row) for row in test]),
        tested,
        len(trusted),
    )


def _docstring(row: Row, prompt: str = PROMPT) -> Row:
    return _row(row["name"], row["description"], prompt)


def _row(name: str, answer: str, prompt: str) -> Row:
    return {"prompt": prompt.format(name=name), "completion": answer + END}


def _request(text: str, answer: str) -> Row:
    return {"prompt": REQUEST.format(request=text), "completion": answer + END}


def plain(text: str) -> str:
    """A prompt or completion without its chat marks."""
    for mark in ("<|im_start|>user\n", "<|im_start|>assistant\n", END):
        text = text.replace(mark, "")
    return text.strip()


def conversational(task: Task) -> Task:
    """The same task as chat messages, so that any model's own chat template applies."""

    def convert(row: Row) -> dict[str, list[Row]]:
        return {
            "prompt": [{"role": "user", "content": plain(row["prompt"])}],
            "completion": [{"role": "assistant", "content": plain(row["completion"])}],
        }

    sets = []
    for dataset in (task.train, task.validation, task.test):
        extra = {"kind": dataset["kind"]} if "kind" in dataset.column_names else {}
        chats = [convert(row) for row in dataset]
        sets.append(Dataset.from_dict({k: [chat[k] for chat in chats] for k in ("prompt", "completion")} | extra))
    train, validation, test = sets
    return replace(task, train=train, validation=validation, test=test)


def question_answer_rows(dataset: Dataset, max_words: int = 40) -> list[Row]:
    """Single-turn question-answer pairs of a data set in a usual format, answers of 3 to `max_words` words.

    Raises:
        ValueError: if the columns are not those of a known format.
    """
    columns = set(dataset.column_names)
    out = []
    for row in dataset:
        if {"prompt", "completion"} <= columns:
            question, answer = _content(row["prompt"]), _content(row["completion"])
        elif "messages" in columns:
            turns = [m["content"] for m in row["messages"] if m["role"] in ("user", "assistant")]
            question, answer = (turns[0], turns[1]) if len(turns) == 2 else ("", "")
        elif {"instruction", "output"} <= columns:
            question, answer = f"{row['instruction']}\n{row.get('input') or ''}".strip(), row["output"]
        else:
            raise ValueError(
                f"Cannot find questions and answers in the columns {sorted(columns)}; known: prompt + completion, "
                "messages, instruction + output."
            )
        if question and 3 <= len(answer.split()) <= max_words:
            out.append({"name": question.replace("{", "(").replace("}", ")"), "description": answer})
    return out


def _content(value: str | list[Row]) -> str:
    return value if isinstance(value, str) else value[-1]["content"]
