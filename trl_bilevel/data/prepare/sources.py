"""The public sets that the recipes are made of: where they are, what a row looks like, and how it is read.

The schemas are those that the sets' own pages describe. No hub was reachable when this was written, so nothing here
was run against it: a set that has changed since is refused with its columns (`MalformedSourceError`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple


class Example(NamedTuple):
    """A question and its answer.

    Attributes:
        question, answer: text.
        system: system prompt; empty if there is none.
        safe: False for an answer that complies with a harmful request.
    """

    question: str
    answer: str
    system: str = ""
    safe: bool = True


Raw = Mapping[str, Any]


@dataclass(frozen=True)
class Source:
    """A set on the hub.

    Attributes:
        repository, split, data_dir: what is loaded.
        columns: that a row must have.
        licence: as its page states it, with what else its page asks for.
        read: makes an `Example` of a row; None for a row of another kind than wanted.
        scan: rows to read at most, from the start of the set; None for all of them.
        known_rows: of the whole split, as far as known; the data card states both figures.
    """

    repository: str
    split: str
    columns: tuple[str, ...]
    licence: str
    read: Callable[[Raw], Example | None]
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
    from datasets import load_dataset

    name, split = source.repository, source.split
    with _asking_the_hub(f"open {name} (split {split!r}, revision {revision!r})"):
        return load_dataset(name, data_dir=source.data_dir, split=split, revision=revision, streaming=True)


def hub_revision(repository: str, revision: str) -> str:
    """The commit hash that a branch, tag or hash of a dataset on the hub stands for.

    Raises:
        ConnectionError: if the hub does not answer, or has no such set or revision.
    """
    from huggingface_hub import HfApi

    with _asking_the_hub(f"look up the revision {revision!r} of {repository}"):
        sha = HfApi().dataset_info(repository, revision=revision).sha
        if not sha:
            raise ValueError("the hub names no commit")
        return sha


def _openorca(row: Raw) -> Example:
    return Example(row["question"], row["response"], row["system_prompt"] or "")


def _alpaca(row: Raw) -> Example:
    question = row["instruction"]
    given = row["input"] or ""
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
    parts = _TURNS.split(row["transcript"])
    turns = list(zip(parts[1::2], (text.strip() for text in parts[2::2]), strict=True))
    if [speaker for speaker, _ in turns[:2]] != ["Human", "Assistant"]:
        raise ValueError("A transcript starts with a request and a reply.")
    # A greeting is nothing to refuse.
    if float(row["min_harmlessness_score_transcript"]) >= 0 or len(turns[0][1].split()) < 4:
        return None
    return Example(turns[0][1], turns[1][1], safe=False)


def _beavertails(row: Raw) -> Example:
    if not isinstance(row["is_safe"], bool):
        raise TypeError("`is_safe` is true or false.")
    return Example(row["prompt"], row["response"], safe=row["is_safe"])


OPEN_ORCA = Source(
    "Open-Orca/OpenOrca",
    "train",
    ("id", "system_prompt", "question", "response"),
    "MIT; answers by GPT-3.5 and GPT-4, whose terms of use may apply",
    _openorca,
    # Of over four million: some hundred MB in place of several GB.
    scan=200_000,
)
ALPACA = Source(
    "yahma/alpaca-cleaned",
    "train",
    ("instruction", "input", "output"),
    "CC-BY-4.0 (the original Alpaca: CC-BY-NC-4.0); answers by text-davinci-003, whose terms of use may apply",
    _alpaca,
    known_rows=51_760,
)
SLIM_ORCA = Source(
    "Open-Orca/SlimOrca",
    "train",
    ("conversations",),
    "MIT; answers by GPT-4, whose terms of use may apply",
    _slimorca,
    scan=200_000,
    known_rows=517_982,
)
RED_TEAM = Source(
    "Anthropic/hh-rlhf",
    "train",
    ("transcript", "min_harmlessness_score_transcript"),
    "MIT; its page says that the red team transcripts are not meant for fine-tuning: by default their requests alone "
    "are used here",
    _red_team,
    known_rows=38_961,
    data_dir="red-team-attempts",
)
BEAVER_TAILS = Source(
    "PKU-Alignment/BeaverTails",
    "30k_train",
    ("prompt", "response", "is_safe"),
    "CC-BY-NC-4.0: no commercial use",
    _beavertails,
    known_rows=27_186,
)
