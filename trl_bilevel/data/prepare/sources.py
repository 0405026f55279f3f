"""The public sets that the recipes are made of: where they are, what a row looks like, and how it is read.

The schemas are those that the sets' own pages describe. No hub was reachable when this was written, so nothing here
was run against it: a set that has changed since is refused with its columns (`MalformedSourceError`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from typing import Any, NamedTuple

import yaml


class Example(NamedTuple):
    """A question and its answer; `safe` is False for an answer that complies with a harmful request."""

    question: str
    answer: str
    system: str = ""
    safe: bool = True


Raw = Mapping[str, Any]


@dataclass(frozen=True)
class Source:
    """A set on the hub, as `text/sources.yaml` has it; `read` gives None for a row of another kind than wanted."""

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
    from datasets import load_dataset

    name, split = source.repository, source.split
    with _asking_the_hub(f"open {name} (split {split!r}, revision {revision!r})"):
        return load_dataset(name, data_dir=source.data_dir, split=split, revision=revision, streaming=True)


def hub_revision(repository: str, revision: str) -> str:
    """The commit hash that a branch, tag or hash of a dataset on the hub stands for; raises as `hub_rows`."""
    from huggingface_hub import HfApi

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


_FACTS = yaml.safe_load(resources.files("trl_bilevel.data").joinpath("text/sources.yaml").read_text())
OPEN_ORCA = Source("Open-Orca/OpenOrca", _openorca, **_FACTS["Open-Orca/OpenOrca"])
ALPACA = Source("yahma/alpaca-cleaned", _alpaca, **_FACTS["yahma/alpaca-cleaned"])
SLIM_ORCA = Source("Open-Orca/SlimOrca", _slimorca, **_FACTS["Open-Orca/SlimOrca"])
RED_TEAM = Source("Anthropic/hh-rlhf", _red_team, **_FACTS["Anthropic/hh-rlhf"])
BEAVER_TAILS = Source("PKU-Alignment/BeaverTails", _beavertails, **_FACTS["PKU-Alignment/BeaverTails"])
