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

from ..answers import STUB
from .sources import Example, Loader, Raw, Resolver, Source

# Above this share of unreadable rows, the set is not what it is taken for.
MALFORMED_SHARE = 0.05
# Rows after which that share is looked at for the first time.
FIRST_LOOK = 200
# Marks that a tokenizer turns into control tokens: such a row could end its turn and speak in another role.
_CHAT_MARKS = re.compile(r"<\|[^|<>\s]{1,40}\|>|\[/?INST\]|<</?SYS>>|</?s>|<(?:start|end)_of_turn>")
# Null bytes, and halves of characters that no encoding has.
_NO_TEXT = re.compile(r"[\x00\ud800-\udfff]")


class MalformedSourceError(ValueError):
    """A source does not have the rows that it should have."""

    def __init__(self, source: Source, what: str):
        remedy = f"It has changed, or the revision is another set: give `--revision {source.repository}=COMMIT`."
        super().__init__(f"{source.repository} (split {source.split!r}) {what}. {remedy}")


@dataclass
class SourceRecord:
    """What became of a source's rows.

    Attributes:
        requested, revision: the revision that was asked for, and the commit that it stood for.
        read, used: rows read, and rows that went into the sets.
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
        published (`bool`): keep answers that comply with harmful requests; each becomes the stub else.
        records: of the sources that were opened.
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
    salt, others = str(seed).encode(), {question_key(example.question) for example in taken}
    best: dict[Any, tuple[bytes, Example]] = {}
    for example in examples:
        if question_key(example.question) in others:
            record.dropped["question is in another set"] += 1
            continue
        text = "\0".join((example.system, example.question, example.answer))
        found = hashlib.blake2b(text.encode(), digest_size=16, key=salt).digest(), example
        known = best.setdefault(same(example), found)
        if known is not found:
            record.dropped["duplicate"] += 1
            best[same(example)] = min(known, found, key=lambda pair: pair[0])
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
