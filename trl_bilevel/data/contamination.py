"""Seeded ways to damage clean rows, to see whether selection finds them: functions of exchanges, and `contaminate`."""

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
# What a text answer may begin and end in that is not its own words: white space, marks of a chat template.
_PARTS = re.compile(r"(\s*)(.*?)((?:\s|<\|[^|<>]*\|>|</s>)*)", re.DOTALL)


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
    ends = [0, *(word.end() for word in re.finditer(r"\S+", exchange.answer))]
    return exchange.answer[: ends[min(len(ends) - 1, max(2, (len(ends) - 1) // 3))]]


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
    name = _answer_column(rows.column_names)
    values, names = rows[name][:], [GOOD] * len(rows)
    whole = [exchange_of(row) for row in rows]
    # White space before an answer, its own words, white space and chat marks after it.
    parts = [_PARTS.fullmatch(exchange.answer).groups() for exchange in whole]  # type: ignore[union-attr]
    pool = [Exchange(exchange.question, part[1]) for exchange, part in zip(whole, parts, strict=True)]
    rng = random.Random(f"contaminate-{seed}")
    left = [kinds[index % len(kinds)] for index in range(max(1, round(rate * len(rows))))][::-1]
    for place in rng.sample(range(len(rows)), len(rows)):
        if not left:
            break
        before, right, after = parts[place]
        tries = (DAMAGES[left[-1]](pool[place], rng, pool) for _ in range(TRIES))
        damaged = next((answer for answer in tries if answer != right), None)
        if damaged is not None:
            values[place], names[place] = with_answer(values[place], before + damaged + after), left.pop()
    if left:
        done = len(rows) - names.count(GOOD)
        raise ValueError(
            f"Only {done} of {done + len(left)} rows could be damaged: the answers are too short or too alike for "
            f"{left[-1]!r}. Lower `rate`, or choose other `kinds`."
        )
    out = rows.remove_columns(name).add_column(name, values, feature=rows.features[name])
    return out.select_columns(rows.column_names).add_column(column, names)


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
