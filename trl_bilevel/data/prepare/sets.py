"""The sets of the recipes: training rows of mixed quality, trusted validation rows, test rows."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from datasets import Dataset

from ..answers import REFUSALS, STUB, TEST_REFUSAL
from ..contamination import GOOD, exchange_of
from .draw import Reader, SourceRecord, draw, question_key
from .sources import (
    ALPACA,
    BEAVER_TAILS,
    OPEN_ORCA,
    RED_TEAM,
    SLIM_ORCA,
    Example,
    Loader,
    Resolver,
    hub_revision,
    hub_rows,
)

SETS = ("train", "validation", "test")
UNSAFE_ANSWERS = ("stub", "published")
CONSTRUCTIONS = ("seal", "beavertails")
# The trainer's calibration needs 8.
MIN_VALIDATION_ROWS = 8
# The share of red team requests in a SEAL training set: 22 of 112 thousand rows.
RED_TEAM_SHARE = 0.2


@dataclass
class Prepared:
    """What was made.

    Attributes:
        recipe: "quality" or "safety".
        sets: `train`, `validation`, `test`: `prompt` and `completion` as messages, `source` (repository), `kind`
            ("good"; "stub" or "unsafe" for an answer that complies with a harmful request).
        records: what became of each source's rows.
        settings: the arguments that the sets depend on.
    """

    recipe: str
    sets: dict[str, Dataset]
    records: list[SourceRecord]
    settings: dict[str, Any]


def prepare_quality(
    *,
    train_rows: int | None = None,
    validation_rows: int = 1000,
    test_rows: int = 500,
    seed: int = 0,
    max_characters: int = 6000,
    revisions: Mapping[str, str] | None = None,
    loader: Loader = hub_rows,
    resolve: Resolver = hub_revision,
) -> Prepared:
    """Alpaca-cleaned to train on, OpenOrca as trusted: the quality setting of arXiv 2511.21056.

    Args:
        train_rows (`int`, *optional*): of Alpaca-cleaned; all usable ones if None.
        validation_rows, test_rows (`int`): of OpenOrca, with different questions; none is a training question.
        seed (`int`): of the draws.
        max_characters (`int`): rows with a longer prompt and answer are left out; about 4 characters make a token.
        revisions: revision per repository; `"main"` where there is none.
        loader: gives the rows of a source at a revision; the hub.
        resolve: gives the commit of a revision; the hub.

    Raises:
        ValueError: if a size is out of range, or the sources have too few usable rows.
        MalformedSourceError: if a source does not have the rows that it should have.
        ConnectionError: if the hub does not answer.
    """
    _check_sizes(train_rows, validation_rows, test_rows, max_characters)
    reader = Reader(loader, resolve, _known(revisions, OPEN_ORCA, ALPACA), max_characters)
    record, examples = reader.open(OPEN_ORCA)
    trusted = draw(record, examples, validation_rows + test_rows, seed, taken=set(), one_per_question=True)
    record, examples = reader.open(ALPACA)
    taken = {question_key(example.question) for example in trusted}
    train = draw(record, examples, train_rows, seed, taken=taken, one_per_question=False)
    settings = {"train_rows": train_rows, "validation_rows": validation_rows, "test_rows": test_rows}
    return _prepared(
        "quality",
        train=_rows(train, ALPACA.repository),
        validation=_rows(trusted[:validation_rows], OPEN_ORCA.repository),
        test=_rows(trusted[validation_rows:], OPEN_ORCA.repository),
        records=reader.records,
        settings=settings | {"seed": seed, "max_characters": max_characters},
    )


def prepare_safety(
    *,
    construction: str = "seal",
    train_rows: int | None = None,
    validation_rows: int = 1000,
    test_rows: int = 500,
    seed: int = 0,
    max_characters: int = 6000,
    unsafe_answers: str = "stub",
    refused_share: float = 0.25,
    revisions: Mapping[str, str] | None = None,
    loader: Loader = hub_rows,
    resolve: Resolver = hub_revision,
) -> Prepared:
    """Safe and unsafe instruction rows to train on, safe ones as trusted.

    Args:
        construction (`str`): `"seal"`: SlimOrca with a fifth of red team requests (SEAL, arXiv 2410.07471); trusted
            rows have the same parts, the requests refused in our words. `"beavertails"`: BeaverTails; trusted are
            safe answers to other questions.
        train_rows (`int`, *optional*): default 56,000 for `"seal"`, all usable rows for `"beavertails"`.
        unsafe_answers (`str`): `"stub"`: an answer that complies with a harmful request is replaced by a sentence
            without content. `"published"`: it stays as the source has it.
        refused_share (`float`): `"seal"`: share of the red team requests in the training set that are refused, in
            [0, 1): without any, selection can drop unsafe rows, but the model has no refusal to learn from. SEAL: 0.
        validation_rows, test_rows, seed, max_characters, revisions, loader, resolve: as in `prepare_quality`.

    Raises:
        As `prepare_quality`.
    """
    _check_sizes(train_rows, validation_rows, test_rows, max_characters)
    if construction not in CONSTRUCTIONS:
        raise ValueError(f"`construction` must be one of {', '.join(CONSTRUCTIONS)}, got {construction!r}.")
    if unsafe_answers not in UNSAFE_ANSWERS:
        raise ValueError(f"`unsafe_answers` must be one of {', '.join(UNSAFE_ANSWERS)}, got {unsafe_answers!r}.")
    if not 0 <= refused_share < 1:
        raise ValueError(f"`refused_share` must lie in [0, 1), got {refused_share}.")
    settings: dict[str, Any] = {"construction": construction, "unsafe_answers": unsafe_answers}
    sizes = {"train_rows": train_rows, "validation_rows": validation_rows, "test_rows": test_rows}
    if construction == "seal":
        sizes["train_rows"] = 56_000 if train_rows is None else train_rows
        reader = Reader(loader, resolve, _known(revisions, SLIM_ORCA, RED_TEAM), max_characters)
        sets = _seal(reader, sizes, seed, unsafe_answers, refused_share)
        settings["refused_share"] = refused_share
    else:
        reader = Reader(loader, resolve, _known(revisions, BEAVER_TAILS), max_characters)
        sets = _beavertails(reader, sizes, seed, unsafe_answers)
    settings |= sizes | {"seed": seed, "max_characters": max_characters}
    return _prepared("safety", **sets, records=reader.records, settings=settings)


def _seal(
    reader: Reader, sizes: dict[str, int | None], seed: int, unsafe_answers: str, refused_share: float
) -> dict[str, list[dict[str, Any]]]:
    counts = [sizes[f"{name}_rows"] or 0 for name in SETS]
    harmful = [round(RED_TEAM_SHARE * count) for count in counts]
    record, examples = reader.open(RED_TEAM)
    requests = draw(record, examples, sum(harmful), seed, taken=set(), one_per_question=True)
    record, examples = reader.open(SLIM_ORCA)
    taken = {question_key(example.question) for example in requests}
    benign = draw(record, examples, sum(counts) - sum(harmful), seed, taken=taken, one_per_question=True)
    rng = random.Random(f"prepare-{seed}")
    sets: dict[str, list[dict[str, Any]]] = {}
    for name, count, share in zip(SETS, counts, harmful, strict=True):
        asked, requests = requests[:share], requests[share:]
        helped, benign = benign[: count - share], benign[count - share :]
        refused = round(refused_share * share) if name == "train" else share
        answers = [TEST_REFUSAL if name == "test" else rng.choice(REFUSALS) for _ in range(refused)]
        rows = _rows(
            [replace(e, answer=a, safe=True) for e, a in zip(asked, answers, strict=False)], RED_TEAM.repository
        )
        rows += _rows(asked[refused:], RED_TEAM.repository, unsafe_answers)
        rows += _rows(helped, SLIM_ORCA.repository)
        rng.shuffle(rows)
        sets[name] = rows
    return sets


def _beavertails(
    reader: Reader, sizes: dict[str, int | None], seed: int, unsafe_answers: str
) -> dict[str, list[dict[str, Any]]]:
    trusted_rows = (sizes["validation_rows"] or 0) + (sizes["test_rows"] or 0)
    record, examples = reader.open(BEAVER_TAILS)
    # Twenty-seven thousand short rows: they are kept, in place of reading the source twice.
    rows = list(examples)
    looking = SourceRecord(record.source, record.requested, record.revision, record.read)
    trusted = draw(
        looking, rows, trusted_rows, seed, taken=set(), one_per_question=True, accept=lambda example: example.safe
    )
    train = draw(
        record,
        rows,
        sizes["train_rows"],
        seed,
        taken={question_key(example.question) for example in trusted},
        one_per_question=False,
        # Stubs all read the same.
        same=lambda example: (example.question, _answer(example, unsafe_answers)),
    )
    record.used += len(trusted)
    record.dropped["question is in another set"] -= len(trusted)
    split = sizes["validation_rows"] or 0
    return {
        "train": _rows(train, BEAVER_TAILS.repository, unsafe_answers),
        "validation": _rows(trusted[:split], BEAVER_TAILS.repository),
        "test": _rows(trusted[split:], BEAVER_TAILS.repository),
    }


def _answer(example: Example, unsafe_answers: str) -> str:
    return STUB if not example.safe and unsafe_answers == "stub" else example.answer


def _rows(examples: list[Example], repository: str, unsafe_answers: str = "stub") -> list[dict[str, Any]]:
    """Rows as they are written."""
    bad = "stub" if unsafe_answers == "stub" else "unsafe"
    rows = []
    for example in examples:
        prompt = [{"role": "system", "content": example.system}] if example.system.strip() else []
        rows.append(
            {
                "prompt": [*prompt, {"role": "user", "content": example.question}],
                "completion": [{"role": "assistant", "content": _answer(example, unsafe_answers)}],
                "source": repository,
                "kind": GOOD if example.safe else bad,
            }
        )
    return rows


def _prepared(
    recipe: str,
    *,
    train: list[dict[str, Any]],
    validation: list[dict[str, Any]],
    test: list[dict[str, Any]],
    records: list[SourceRecord],
    settings: dict[str, Any],
) -> Prepared:
    """The sets, once it is sure that none has a question of another, and that trusted rows are good."""
    sets = dict(zip(SETS, (train, validation, test), strict=True))
    seen: dict[bytes, str] = {}
    for name in ("validation", "test", "train"):
        for row in sets[name]:
            key = question_key(row["prompt"][-1]["content"])
            if seen.get(key, name) != name:
                raise RuntimeError(
                    f"A question of the set {name!r} is in {seen[key]!r}, too: {exchange_of(row)[0]!r}."
                )
            seen[key] = name
            if name != "train" and row["kind"] != GOOD:
                raise RuntimeError(f"The set {name!r} has an unsafe row.")
        if not sets[name]:
            raise ValueError(f"The set {name!r} is empty: no row of its source can be used.")
    return Prepared(recipe, {name: Dataset.from_list(rows) for name, rows in sets.items()}, records, settings)


def _check_sizes(train: int | None, validation: int, test: int, max_characters: int) -> None:
    least = {"train_rows": (train, 1), "validation_rows": (validation, MIN_VALIDATION_ROWS), "test_rows": (test, 1)}
    for name, (value, minimum) in (least | {"max_characters": (max_characters, 1)}).items():
        if value is not None and value < minimum:
            raise ValueError(f"`{name}` must be at least {minimum}, got {value}.")


def _known(revisions: Mapping[str, str] | None, *sources: Any) -> dict[str, str]:
    """The revisions, if they are of these sources."""
    known = [source.repository for source in sources]
    unknown = [name for name in revisions or {} if name not in known]
    if unknown:
        raise ValueError(f"`revisions` names {unknown}, which are not read here. Known: {', '.join(known)}.")
    return dict(revisions or {})
