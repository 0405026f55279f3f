"""Seeded ways to damage clean rows, to see whether selection finds them.

Each kind of damage is a pure function of an exchange, a random generator and a pool of other exchanges; `contaminate`
applies them to a part of a dataset.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from datasets import Dataset

from .answers import BOILERPLATE, STUB
from .formats import CONVERSATIONS, MESSAGES, PAIRS, answered, content, layout_of, with_answer

GOOD = "good"
# Rows that the pool of other answers needs at least.
MIN_ROWS = 4
# Draws until a row counts as one that cannot be damaged in this way.
TRIES = 8
# What a text answer may end in that is not its own words: marks of a chat template.
_END_MARKS = re.compile(r"(?:\s|<\|[^|<>]*\|>|</s>)*\Z")


class Exchange(NamedTuple):
    """A question and its answer, as text."""

    question: str
    answer: str


Damage = Callable[[Exchange, random.Random, Sequence[Exchange]], str]


def lazy(exchange: Exchange, rng: random.Random, pool: Sequence[Exchange]) -> str:
    """One of four boilerplate sentences."""
    return rng.choice(BOILERPLATE)


def swapped(exchange: Exchange, rng: random.Random, pool: Sequence[Exchange]) -> str:
    """A right answer to another question."""
    for _ in range(100):
        others = [other for other in rng.sample(pool, 2) if other.question != exchange.question]
        if others:
            return rng.choice(others).answer
    raise ValueError("Answers cannot be swapped: (nearly) all rows ask the same question.")


def salad(exchange: Exchange, rng: random.Random, pool: Sequence[Exchange]) -> str:
    """As many words as the answer has, drawn from other answers."""
    words = [word for other in rng.sample(pool, 4) for word in other.answer.split()]
    rng.shuffle(words)
    return " ".join(words[: len(exchange.answer.split())])


def scrambled(exchange: Exchange, rng: random.Random, pool: Sequence[Exchange]) -> str:
    """The answer's own words in random order; spaces and line breaks stay where they are."""
    words = exchange.answer.split()
    rng.shuffle(words)
    left = iter(words)
    return re.sub(r"\S+", lambda _: next(left), exchange.answer)


def truncated(exchange: Exchange, rng: random.Random, pool: Sequence[Exchange]) -> str:
    """The first third of the answer's words, at least two."""
    words = list(re.finditer(r"\S+", exchange.answer))
    if not words:
        return exchange.answer
    kept = min(len(words), max(2, len(words) // 3))
    return exchange.answer[: words[kept - 1].end()]


def stub(exchange: Exchange, rng: random.Random, pool: Sequence[Exchange]) -> str:
    """An answer that complies and says nothing; what stands for an unsafe answer in the safety tasks."""
    return STUB


DAMAGES: dict[str, Damage] = {damage.__name__: damage for damage in (lazy, swapped, salad, scrambled, truncated, stub)}


def contaminate(
    rows: Dataset,
    rate: float = 0.5,
    kinds: Sequence[str] = ("lazy", "swapped", "salad"),
    seed: int = 0,
    column: str = "kind",
) -> Dataset:
    """The rows, a part of them damaged, with a column that names what was done to each.

    A pure function of its arguments. Rows keep their order; of a damaged row only the (last) answer changes. White
    space around an answer and chat marks at its end stay, so that they do not give the damage away.

    Args:
        rows (`Dataset`): clean rows: `prompt` and `completion` (text or messages), `messages`, or
            `conversations`.
        rate (`float`): share of the rows to damage, in (0, 1); kinds get equal parts of it.
        kinds (`Sequence[str]`): of `DAMAGES`: "lazy", "swapped", "salad", "scrambled", "truncated", "stub".
        seed (`int`): draws rows and damages.
        column (`str`): name of the new column; `"good"` marks rows that were left alone.

    Returns:
        `Dataset`: as many rows, same columns and `column`.

    Raises:
        ValueError: for an unknown kind, a rate out of range, an unknown format, or if too few rows can be damaged.
    """
    unknown = [kind for kind in kinds if kind not in DAMAGES]
    if unknown or not kinds:
        raise ValueError(f"`kinds` must be some of {', '.join(DAMAGES)}, got {list(kinds)}.")
    if not 0 < rate < 1:
        raise ValueError(f"`rate` must lie between 0 and 1, got {rate}: some rows must stay good, and some not.")
    if column in rows.column_names:
        raise ValueError(f"The rows have a column {column!r} already. Give another name for `column`.")
    if len(rows) < MIN_ROWS:
        raise ValueError(f"{len(rows)} rows are too few to damage some of them: give at least {MIN_ROWS}.")
    exchanges = [exchange_of(row) for row in rows]
    parts = [_split(exchange.answer) for exchange in exchanges]
    pool = [Exchange(exchange.question, part[1]) for exchange, part in zip(exchanges, parts, strict=True)]
    rng = random.Random(f"contaminate-{seed}")
    wanted = [kinds[index % len(kinds)] for index in range(max(1, round(rate * len(rows))))]
    answers: dict[int, str] = {}
    names = [GOOD] * len(rows)
    for place in rng.sample(range(len(rows)), len(rows)):
        if len(answers) == len(wanted):
            break
        kind = wanted[len(answers)]
        damaged = _damage(pool[place], DAMAGES[kind], rng, pool)
        if damaged is not None:
            before, _, after = parts[place]
            answers[place], names[place] = before + damaged + after, kind
    if len(answers) < len(wanted):
        raise ValueError(
            f"Only {len(answers)} of {len(wanted)} rows could be damaged: the answers are too short or too alike for "
            f"{wanted[len(answers)]!r}. Lower `rate`, or choose other `kinds`."
        )
    name = _answer_column(rows.column_names)
    values = [
        with_answer(value, answers[place]) if place in answers else value for place, value in enumerate(rows[name][:])
    ]
    out = rows.remove_columns(name).add_column(name, values, feature=rows.features[name])
    return out.select_columns(rows.column_names).add_column(column, names)


def _damage(exchange: Exchange, damage: Damage, rng: random.Random, pool: Sequence[Exchange]) -> str | None:
    """A damaged answer that differs from the right one; None if there is none."""
    for _ in range(TRIES):
        answer = damage(exchange, rng, pool)
        if answer != exchange.answer:
            return answer
    return None


def _split(answer: str) -> tuple[str, str, str]:
    """White space before an answer, its own words, white space and chat marks after it."""
    body = answer.lstrip()
    found = _END_MARKS.search(body)
    end = found.start() if found else len(body)
    return answer[: len(answer) - len(body)], body[:end], body[end:]


def exchange_of(row: Mapping[str, Any]) -> Exchange:
    """The last question of a row, with what stands before it, and its (last) answer.

    Raises:
        ValueError: if the row has another format than those of `contaminate`, or does not end in an answer.
    """
    _answer_column(row)
    asked, answer = answered(row)
    return Exchange(content(asked), answer if isinstance(answer, str) else content(answer[-1:]))


def _answer_column(columns: Any) -> str:
    """The column that holds the answers."""
    layout = layout_of(columns)
    if layout not in (PAIRS, MESSAGES, CONVERSATIONS):
        raise ValueError(
            f"A row has the columns {list(columns)}. Known formats: `prompt` and `completion`, `messages`, or "
            "`conversations`. Rename the columns, or map the rows beforehand."
        )
    return "completion" if layout == PAIRS else layout
