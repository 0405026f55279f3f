"""The public sets that the recipes are made of: where they are, how their rows are read, cleaned and drawn.

The schemas are those that the sets' own pages describe. No hub was reachable when this was written, so nothing here
was run against it: a set that has changed since is refused with its columns (`MalformedSourceError`). Rows are drawn
by the hash of what they say, so not by the order in which they come.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from datasets import load_dataset
from huggingface_hub import HfApi

from trl_bilevel.data.answers import STUB

# Above this share of unreadable rows, the set is not what it is taken for.
MALFORMED_SHARE = 0.05
# Rows after which that share is looked at for the first time.
FIRST_LOOK = 200
# Marks that a tokenizer turns into control tokens: such a row could end its turn and speak in another role.
_CHAT_MARKS = re.compile(r"<\|[^|<>\s]{1,40}\|>|\[/?INST\]|<</?SYS>>|</?s>|<(?:start|end)_of_turn>")
# Null bytes, and halves of characters that no encoding has.
_NO_TEXT = re.compile(r"[\x00\ud800-\udfff]")


class Example(NamedTuple):
    """A question and its answer; `safe` is False for an answer that complies with a harmful request."""

    question: str
    answer: str
    system: str = ""
    safe: bool = True


Raw = Mapping[str, Any]


@dataclass(frozen=True)
class Source:
    """A set on the hub, as `sources.yaml` has it; `read` gives None for a row of another kind than wanted."""

    repository: str
    read: Callable[[Raw], Example | None]
    split: str
    columns: Sequence[str]
    licence: str
    scan: int | None = None
    known_rows: int | None = None
    data_dir: str | None = None


Loader = Callable[[Source, str], Iterable[Raw]]
Resolver = Callable[[str, str], str]


@contextmanager
def _asking_the_hub(aim: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise ConnectionError(
            f"Could not {aim}: {type(error).__name__}: {error}. Is the hub reachable, and HF_HUB_OFFLINE unset?"
        ) from error


def hub_rows(source: Source, revision: str) -> Iterable[Raw]:
    """The rows of a source at a revision, streamed: no more is downloaded than is read.

    Raises:
        ConnectionError: if the hub does not answer, or has no such set or revision.
    """
    name, split = source.repository, source.split
    with _asking_the_hub(f"open {name} (split {split!r}, revision {revision!r})"):
        return load_dataset(name, data_dir=source.data_dir, split=split, revision=revision, streaming=True)


def hub_revision(repository: str, revision: str) -> str:
    """The commit hash that a branch, tag or hash of a dataset on the hub stands for; raises as `hub_rows`."""
    with _asking_the_hub(f"look up the revision {revision!r} of {repository}"):
        return str(HfApi().dataset_info(repository, revision=revision).sha)


def _openorca(row: Raw) -> Example:
    return Example(row["question"], row["response"], row["system_prompt"] or "")


def _alpaca(row: Raw) -> Example:
    question, given = row["instruction"], row["input"] or ""
    return Example(f"{question}\n\n{given}" if given.strip() else question, row["output"])


def _slimorca(row: Raw) -> Example | None:
    """One question, one answer, after an optional system prompt; longer conversations are of another kind."""
    turns = [(turn["from"], turn["value"]) for turn in row["conversations"]]
    system = turns.pop(0)[1] if turns and turns[0][0] == "system" else ""
    if [speaker for speaker, _ in turns] != ["human", "gpt"]:
        return None
    return Example(turns[0][1], turns[1][1], system or "")


_TURNS = re.compile(r"(?:\A|\n\n)(Human|Assistant): ?")


def _red_team(row: Raw) -> Example | None:
    """First request and reply of a transcript that a preference model finds harmful at its worst (score below 0)."""
    _, first, request, second, reply, *_ = _TURNS.split(row["transcript"])
    if (first, second) != ("Human", "Assistant"):
        raise ValueError("A transcript starts with a request and a reply.")
    # A greeting is nothing to refuse.
    if float(row["min_harmlessness_score_transcript"]) >= 0 or len(request.split()) < 4:
        return None
    return Example(request.strip(), reply.strip(), safe=False)


def _beavertails(row: Raw) -> Example:
    if not isinstance(row["is_safe"], bool):
        raise TypeError("`is_safe` is true or false.")
    return Example(row["prompt"], row["response"], safe=row["is_safe"])


_FACTS = yaml.safe_load(Path(__file__).with_name("sources.yaml").read_text())
OPEN_ORCA, ALPACA, SLIM_ORCA, RED_TEAM, BEAVER_TAILS = (
    Source(name, read, **_FACTS[name])
    for name, read in (
        ("Open-Orca/OpenOrca", _openorca),
        ("yahma/alpaca-cleaned", _alpaca),
        ("Open-Orca/SlimOrca", _slimorca),
        ("Anthropic/hh-rlhf", _red_team),
        ("PKU-Alignment/BeaverTails", _beavertails),
    )
)


class MalformedSourceError(ValueError):
    """A source does not have the rows that it should have."""

    def __init__(self, source: Source, what: str):
        remedy = f"It has changed, or the revision is another set: give `--revision {source.repository}=COMMIT`."
        super().__init__(f"{source.repository} (split {source.split!r}) {what}. {remedy}")


@dataclass
class SourceRecord:
    """What became of a source's rows: `used` went into the sets, the others were dropped, by reason.

    `revision` is the commit that the `requested` one stood for.
    """

    source: Source
    requested: str
    revision: str
    read: int = 0
    used: int = 0
    dropped: Counter[str] = field(default_factory=Counter)


@dataclass
class Reader:
    """Reads sources as `prepare_recipe` is told to, and notes what it read.

    Longer rows than `max_characters` are left out: cut at a trainer's `max_length` they would lose their end. Answers
    that comply with harmful requests become the stub, unless they are to stay as `published`.
    """

    loader: Loader
    resolve: Resolver
    revisions: Mapping[str, str]
    max_characters: int
    published: bool = False
    records: list[SourceRecord] = field(default_factory=list)

    def open(self, source: Source) -> tuple[SourceRecord, Iterator[Example]]:
        """A record, filled in while the readable examples are taken from the iterator."""
        requested = self.revisions.get(source.repository, "main")
        record = SourceRecord(source, requested, self.resolve(source.repository, requested))
        self.records.append(record)
        return record, self._examples(record)

    def _examples(self, record: SourceRecord) -> Iterator[Example]:
        source = record.source
        for row in itertools.islice(self.loader(source, record.revision), source.scan):
            record.read += 1
            missing = [name for name in source.columns if name not in row]
            if record.read == 1 and missing:
                names = ", ".join(map(repr, missing))
                raise MalformedSourceError(source, f"has no column {names} (its first row has {sorted(row)})")
            if record.read == FIRST_LOOK:
                _check_malformed(record)
            found = _read(source, row, self.max_characters)
            if isinstance(found, str):
                record.dropped[found] += 1
            else:
                yield found if found.safe or self.published else found._replace(answer=STUB)
        if record.read == 0:
            raise MalformedSourceError(source, "has no rows")
        _check_malformed(record)


def _check_malformed(record: SourceRecord) -> None:
    bad, columns = record.dropped["malformed"] + record.dropped["not text"], ", ".join(record.source.columns)
    if bad > MALFORMED_SHARE * record.read:
        what = f"has {bad} rows among its first {record.read} that cannot be read as {columns}"
        raise MalformedSourceError(record.source, what)


def _read(source: Source, row: Raw, max_characters: int) -> Example | str:
    """What a row says, or why it cannot be used."""
    try:
        example = source.read(row)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError):
        return "malformed"
    if example is None:
        return "of another kind"
    parts = (example.system, example.question, example.answer)
    if not all(isinstance(part, str) for part in parts) or any(map(_NO_TEXT.search, parts)):
        return "not text"
    if not example.question.strip() or not example.answer.strip():
        return "empty"
    if sum(map(len, parts)) > max_characters:
        return "too long"
    return "has chat marks" if any(map(_CHAT_MARKS.search, parts)) else example


def question_key(question: str) -> bytes:
    """What two questions that differ in case and white space only have in common."""
    return hashlib.blake2b(" ".join(question.split()).casefold().encode(), digest_size=16).digest()


def draw(
    record: SourceRecord,
    examples: Iterable[Example],
    count: int | None,
    seed: int,
    *,
    taken: Iterable[Example] = (),
    same: Callable[[Example], Any] = lambda example: question_key(example.question),
) -> list[Example]:
    """Distinct rows at random: those of the smallest keyed hashes, in the order of these.

    What is drawn depends on seed, `count` and the rows' contents: not on their order, nor on a library's shuffling.

    Args:
        record: notes what is dropped, and how many rows are used.
        examples: readable rows.
        count (`int`, *optional*): rows to draw; all if None.
        seed (`int`): key of the hashes.
        taken: rows whose questions must not occur.
        same: what makes two rows the same, of which one is kept; by default their questions.

    Raises:
        ValueError: if fewer than `count` rows are left.
    """

    def order(example: Example) -> bytes:
        text = "\0".join((example.system, example.question, example.answer))
        return hashlib.blake2b(text.encode(), digest_size=16, key=str(seed).encode()).digest()

    found, others = sorted(examples, key=order), {question_key(example.question) for example in taken}
    free = [example for example in found if question_key(example.question) not in others]
    best: dict[Any, Example] = {}
    for example in free:
        best.setdefault(same(example), example)
    record.dropped["question is in another set"] += len(found) - len(free)
    record.dropped["duplicate"] += len(free) - len(best)
    if count is not None and len(best) < count:
        reasons = ", ".join(f"{reason}: {number}" for reason, number in record.dropped.most_common() if number)
        raise ValueError(
            f"{record.source.repository} gives {len(best)} usable rows of {record.read} read, and {count} are needed "
            f"(dropped: {reasons or 'none'}). Lower `--train-rows`, `--validation-rows` or `--test-rows`, or raise "
            "`--max-characters`."
        )
    chosen = list(best.values())[:count]
    record.used += len(chosen)
    record.dropped["not drawn"] += len(best) - len(chosen)
    return chosen
