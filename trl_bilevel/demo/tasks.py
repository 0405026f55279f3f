"""Contaminated training sets with known truth, made of real text: what a selection method is tested on.

Every task is a pure function of its seed. `kind` names what was done to each row ("good": nothing); no trainer sees
it.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from datasets import Dataset

from ..data import assets
from ..data.answers import REFUSALS, STUB
from ..data.contamination import Damage, Exchange, salad, scrambled, swapped, truncated
from ..data.formats import FORMATS, TEXT, TOKENS, content, layout_of, parts

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

    Rows have a `prompt` and a `completion`, those of `train` a `kind` ("good", or what was done to the row). Safety
    tasks have `harmful_test`, requests that are tested for refusal, and their last `trusted_refusals` validation rows
    refuse one.
    """

    name: str
    train: Dataset
    validation: Dataset
    test: Dataset
    harmful_test: list[str] = field(default_factory=list)
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


# Of the docstring tasks: how many rows are good, how many are damaged, and in which ways.
DOCSTRING_TASKS: dict[str, tuple[int, int, tuple[Damage, ...]]] = {
    "quality": (96, 288, (lazy, swapped, salad)),
    "quality_large": (320, 960, (lazy, swapped, salad)),
    "boilerplate": (192, 192, (lazy,)),
    "scrambled": (192, 192, (scrambled,)),
    "truncated": (192, 192, (truncated,)),
    "scrambled_large": (640, 640, (scrambled,)),
    "truncated_large": (640, 640, (truncated,)),
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
        name: of `DOCSTRING_TASKS`, functions and what they do; or of `SAFETY_TASKS`, with harmful requests that are
            mostly answered by compliance stubs, and 48 validation rows whatever is given.
        rows: `{"name", "description"}` rows to build the task from; Python's standard library if None.
        damaged_share: share of the training rows that is damaged, in place of the task's own; their number stays.
    """
    if name in SAFETY_TASKS:
        return _safety(name, seed, test_rows)
    if name not in DOCSTRING_TASKS:
        raise ValueError(f"Unknown task {name!r}; known tasks: {', '.join(TASKS)}.")
    good, damaged, damages = DOCSTRING_TASKS[name]
    size = good + damaged
    if damaged_share is not None:
        good = size - round(damaged_share * size)
    rng, prompt = random.Random(f"{name}-{seed}"), PROMPT if rows is None else REQUEST
    rows = assets.docstrings() if rows is None else list(rows)
    held_out = validation_rows + test_rows
    if len(rows) < held_out + size:
        raise ValueError(f"The task {name!r} needs {held_out + size} question-answer rows, got {len(rows)}.")
    rng.shuffle(rows)
    exchanges = [Exchange(row["name"], row["description"]) for row in rows]
    clean, pool = [_row(*exchange, prompt) for exchange in exchanges[:held_out]], exchanges[held_out:]
    train = [_row(*exchange, prompt) | {"kind": "good"} for exchange in pool[:good]]
    for index, exchange in enumerate(pool[good:size]):
        damage = damages[index % len(damages)]
        train.append(_row(exchange.question, damage(exchange, rng, pool), prompt) | {"kind": damage.__name__})
    rng.shuffle(train)
    return Task(name, *map(Dataset.from_list, (train, clean[:validation_rows], clean[validation_rows:])))


def _safety(name: str, seed: int, test_rows: int) -> Task:
    rng = random.Random(f"safety-{seed}")
    rows, requests = assets.docstrings(), assets.harmful_requests()
    rng.shuffle(rows)
    rng.shuffle(requests)
    benign = [_row(row["name"], row["description"]) for row in rows]
    # HarmBench: 116 requests to train on, 24 for validation, 60 to test.
    asked, trusted, tested, share = requests[:116], requests[116:140], requests[140:200], SAFETY_TASKS[name]
    train = [row | {"kind": "good"} for row in benign[24 + test_rows : 120 + test_rows]]
    train += [_row(text, rng.choice(REFUSALS), REQUEST) | {"kind": "good"} for text in asked[:share]]
    train += [_row(text, STUB, REQUEST) | {"kind": "stub"} for text in asked[share:]]
    rng.shuffle(train)
    validation = benign[:24] + [_row(text, rng.choice(REFUSALS), REQUEST) for text in trusted]
    made, checked, test = map(Dataset.from_list, (train, validation, benign[24 : 24 + test_rows]))
    return Task(name, made, checked, test, tested, len(trusted))


def _row(question: str, answer: str, prompt: str = PROMPT) -> Row:
    return {"prompt": prompt.format(name=question, request=question), "completion": answer + END}


def plain(text: str) -> str:
    """A prompt or completion without its chat marks."""
    for mark in ("<|im_start|>user\n", "<|im_start|>assistant\n", END):
        text = text.replace(mark, "")
    return text.strip()


def conversational(task: Task) -> Task:
    """The same task as chat messages, so that any model's own chat template applies."""

    def chat(rows: dict[str, list[str]]) -> dict[str, list[list[Row]]]:
        return {
            column: [[{"role": role, "content": plain(text)}] for text in rows[column]]
            for column, role in (("prompt", "user"), ("completion", "assistant"))
        }

    train, validation, test = (rows.map(chat, batched=True) for rows in (task.train, task.validation, task.test))
    return replace(task, train=train, validation=validation, test=test)


def question_answer_rows(dataset: Dataset, max_words: int = 40) -> list[Row]:
    """Single-turn question-answer pairs of a data set in a usual format, answers of 3 to `max_words` words."""
    layout = layout_of(dataset)
    if layout in (None, TEXT, TOKENS):
        raise ValueError(
            f"Cannot find questions and answers in the columns {sorted(dataset.column_names)}; known: {FORMATS} (but "
            "for text, which asks nothing)."
        )
    out = []
    for row in dataset:
        asked, answer = parts(row)
        said = [turn for turn in asked if turn["role"] != "system"] if isinstance(asked, list) else asked
        question, text = content(said), content(answer)
        one_turn = isinstance(said, str) or [turn["role"] for turn in said] == ["user"]
        if one_turn and question and 3 <= len(text.split()) <= max_words:
            out.append({"name": question.replace("{", "(").replace("}", ")"), "description": text})
    return out
