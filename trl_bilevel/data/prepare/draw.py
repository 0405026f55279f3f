"""Reading, cleaning and drawing of rows: by the hash of what they say, so not by the order in which they come."""

from __future__ import annotations

import hashlib
import heapq
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from .sources import Example, Loader, Raw, Resolver, Source

# Above this share of unreadable rows, the set is not what it is taken for.
MALFORMED_SHARE = 0.05
# Rows after which that share is looked at for the first time.
FIRST_LOOK = 200
# Marks that a tokenizer turns into control tokens: such a row could end its turn and speak in another role.
_CHAT_MARKS = re.compile(r"<\|[^|<>\s]{1,40}\|>|\[/?INST\]|<</?SYS>>|</?s>|<(?:start|end)_of_turn>")
# Null bytes, and halves of characters that no encoding has.
_NO_TEXT = re.compile(r"[\x00\ud800-\udfff]")
_SPACE = re.compile(r"\s+")


class MalformedSourceError(ValueError):
    """A source does not have the rows that it should have."""


@dataclass
class SourceRecord:
    """What became of a source's rows.

    Attributes:
        source: the source.
        requested, revision: the revision that was asked for, and the commit that it stood for.
        read: rows read.
        used: rows that went into the sets.
        dropped: rows that did not, by reason.
    """

    source: Source
    requested: str
    revision: str
    read: int = 0
    used: int = 0
    dropped: Counter[str] = field(default_factory=Counter)


@dataclass
class Reader:
    """Reads sources, and notes what it read.

    Attributes:
        loader: gives the rows of a source at a revision.
        resolve: gives the commit of a revision.
        revisions: by repository; `"main"` where there is none.
        max_characters (`int`): longer rows are left out: cut at a trainer's `max_length` they would lose their end.
        records: of the sources that were opened.
    """

    loader: Loader
    resolve: Resolver
    revisions: Mapping[str, str]
    max_characters: int
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
                raise MalformedSourceError(
                    f"{source.repository} has no column {', '.join(map(repr, missing))} (its first row has "
                    f"{sorted(row)}): it has changed, or the revision is another set. Give an older `--revision "
                    f"{source.repository}=COMMIT`."
                )
            if record.read == FIRST_LOOK:
                _check_malformed(record)
            found = _read(source, row, self.max_characters)
            if isinstance(found, str):
                record.dropped[found] += 1
            else:
                yield found
        if record.read == 0:
            raise MalformedSourceError(f"{source.repository} (split {source.split!r}) has no rows.")
        _check_malformed(record)


def _check_malformed(record: SourceRecord) -> None:
    bad = record.dropped["malformed"] + record.dropped["not text"]
    if bad > MALFORMED_SHARE * record.read:
        raise MalformedSourceError(
            f"{bad} of the first {record.read} rows of {record.source.repository} cannot be read as "
            f"{', '.join(record.source.columns)}: it has changed. Give an older "
            f"`--revision {record.source.repository}=COMMIT`."
        )


def _read(source: Source, row: Raw, max_characters: int) -> Example | str:
    """What a row says, or why it cannot be used."""
    try:
        example = source.read(row)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError):
        return "malformed"
    if example is None:
        return "of another kind"
    parts = (example.system, example.question, example.answer)
    if not all(isinstance(part, str) for part in parts):
        return "not text"
    if not example.question.strip() or not example.answer.strip():
        return "empty"
    if sum(map(len, parts)) > max_characters:
        return "too long"
    if any(map(_CHAT_MARKS.search, parts)):
        return "has chat marks"
    return "not text" if any(map(_NO_TEXT.search, parts)) else example


def question_key(question: str) -> bytes:
    """What two questions that differ in case and white space only have in common."""
    return hashlib.blake2b(_SPACE.sub(" ", question).strip().casefold().encode(), digest_size=16).digest()


def draw(
    record: SourceRecord,
    examples: Iterable[Example],
    count: int | None,
    seed: int,
    *,
    taken: Iterable[Example] = (),
    one_per_question: bool = True,
    same: Callable[[Example], Any] = lambda example: (example.question, example.answer),
) -> list[Example]:
    """Distinct rows at random: those of the smallest keyed hashes, in the order of these.

    What is drawn depends on seed, `count` and the rows' contents: not on their order, nor on a library's shuffling.

    Args:
        record: notes what is dropped, and how many rows are used.
        examples: readable rows.
        count (`int`, *optional*): rows to draw; all if None.
        seed (`int`): key of the hashes.
        taken: rows whose questions must not occur.
        one_per_question (`bool`): keep one row per question, else one per distinct row.
        same: what makes two rows the same.

    Raises:
        ValueError: if fewer than `count` rows are left.
    """
    salt, others = str(seed).encode(), {question_key(example.question) for example in taken}
    best: dict[Any, tuple[bytes, Example]] = {}
    for example in examples:
        key = question_key(example.question)
        if key in others:
            record.dropped["question is in another set"] += 1
            continue
        text = "\0".join((example.system, example.question, example.answer))
        order = hashlib.blake2b(text.encode(), digest_size=16, key=salt).digest()
        identity = key if one_per_question else same(example)
        known = best.get(identity)
        if known is not None:
            record.dropped["duplicate"] += 1
        if known is None or order < known[0]:
            best[identity] = (order, example)
    if count is not None and len(best) < count:
        reasons = ", ".join(f"{reason}: {number}" for reason, number in record.dropped.most_common())
        raise ValueError(
            f"{record.source.repository} gives {len(best)} usable rows of {record.read} read, and {count} are needed "
            f"(dropped: {reasons or 'none'}). Lower `--train-rows`, `--validation-rows` or `--test-rows`, or raise "
            "`--max-characters`."
        )
    chosen = heapq.nsmallest(len(best) if count is None else count, best.values(), key=lambda pair: pair[0])
    record.used += len(chosen)
    record.dropped["not drawn"] += len(best) - len(chosen)
    return [example for _, example in chosen]
