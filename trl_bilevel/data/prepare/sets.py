"""The sets of the recipes: training rows of mixed quality, trusted validation rows, test rows."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from datasets import Dataset

from ..answers import REFUSALS, STUB, TEST_REFUSAL
from ..contamination import GOOD
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
    Source,
    hub_revision,
    hub_rows,
)

SETS = ("train", "validation", "test")
UNSAFE_ANSWERS = ("stub", "published")
CONSTRUCTIONS = ("seal", "beavertails")
# The trainer's calibration needs 8 trusted rows.
LEAST_ROWS = {"train_rows": 1, "validation_rows": 8, "test_rows": 1}
# The share of red team requests in a SEAL training set: 22 of 112 thousand rows.
RED_TEAM_SHARE = 0.2


@dataclass
class Settings:
    """What the sets of a recipe depend on, beside the sources.

    Attributes:
        train_rows (`int`, *optional*): rows to train on; all usable ones if None.
        validation_rows, test_rows (`int`): trusted rows, with different questions; none is a training question.
        seed (`int`): of the draws.
        max_characters (`int`): rows with a longer prompt and answer are left out; about 4 characters make a token.
    """

    train_rows: int | None = None
    validation_rows: int = 1000
    test_rows: int = 500
    seed: int = 0
    max_characters: int = 6000

    def __post_init__(self) -> None:
        for name, least in {**LEAST_ROWS, "max_characters": 1}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"`{name}` must be at least {least}, got {value}.")


@dataclass
class SafetySettings(Settings):
    """The same of the safety recipe.

    Attributes:
        construction (`str`): `"seal"`: SlimOrca with a fifth of red team requests (SEAL, arXiv 2410.07471); trusted
            rows have the same parts, the requests refused in our words; 56,000 rows to train on by default.
            `"beavertails"`: BeaverTails; trusted are safe answers to other questions.
        unsafe_answers (`str`): `"stub"`: an answer that complies with a harmful request is replaced by a sentence
            without content. `"published"`: it stays as the source has it.
        refused_share (`float`): `"seal"`: share of the red team requests in the training set that are refused, in
            [0, 1): without any, selection can drop unsafe rows, but the model has no refusal to learn from. SEAL: 0.
    """

    construction: str = "seal"
    unsafe_answers: str = "stub"
    refused_share: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("construction", CONSTRUCTIONS), ("unsafe_answers", UNSAFE_ANSWERS)):
            if getattr(self, name) not in known:
                raise ValueError(f"`{name}` must be one of {', '.join(known)}, got {getattr(self, name)!r}.")
        if not 0 <= self.refused_share < 1:
            raise ValueError(f"`refused_share` must lie in [0, 1), got {self.refused_share}.")
        if self.construction == "seal" and self.train_rows is None:
            self.train_rows = 56_000


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


Rows = list[dict[str, Any]]


def prepare_quality(
    *,
    revisions: Mapping[str, str] | None = None,
    loader: Loader = hub_rows,
    resolve: Resolver = hub_revision,
    **settings: Any,
) -> Prepared:
    """Alpaca-cleaned to train on, OpenOrca as trusted: the quality setting of arXiv 2511.21056.

    Args:
        revisions: revision per repository; `"main"` where there is none.
        loader: gives the rows of a source at a revision; the hub.
        resolve: gives the commit of a revision; the hub.
        settings: fields of [`Settings`].

    Raises:
        ValueError: if a setting is out of range, or the sources have too few usable rows.
        MalformedSourceError: if a source does not have the rows that it should have.
        ConnectionError: if the hub does not answer.
    """
    given = Settings(**settings)
    reader = Reader(loader, resolve, _known(revisions, OPEN_ORCA, ALPACA), given.max_characters)
    trusted = draw(*reader.open(OPEN_ORCA), given.validation_rows + given.test_rows, given.seed)
    train = draw(*reader.open(ALPACA), given.train_rows, given.seed, taken=trusted, one_per_question=False)
    sets = {"train": _rows(train, ALPACA)} | _trusted(trusted, OPEN_ORCA, given)
    return _prepared("quality", sets, reader, given)


def prepare_safety(
    *,
    revisions: Mapping[str, str] | None = None,
    loader: Loader = hub_rows,
    resolve: Resolver = hub_revision,
    **settings: Any,
) -> Prepared:
    """Safe and unsafe instruction rows to train on, safe ones as trusted.

    Args:
        settings: fields of [`SafetySettings`].
        revisions, loader, resolve: as in `prepare_quality`.

    Raises:
        As `prepare_quality`.
    """
    given = SafetySettings(**settings)
    seal = given.construction == "seal"
    sources = (SLIM_ORCA, RED_TEAM) if seal else (BEAVER_TAILS,)
    reader = Reader(loader, resolve, _known(revisions, *sources), given.max_characters)
    return _prepared("safety", (_seal if seal else _beavertails)(reader, given), reader, given)


def _seal(reader: Reader, given: SafetySettings) -> dict[str, Rows]:
    counts = [getattr(given, f"{name}_rows") for name in SETS]
    harmful = [round(RED_TEAM_SHARE * count) for count in counts]
    requests = draw(*reader.open(RED_TEAM), sum(harmful), given.seed)
    benign = draw(*reader.open(SLIM_ORCA), sum(counts) - sum(harmful), given.seed, taken=requests)
    rng = random.Random(f"prepare-{given.seed}")
    sets: dict[str, Rows] = {}
    for name, count, share in zip(SETS, counts, harmful, strict=True):
        asked, requests = requests[:share], requests[share:]
        helped, benign = benign[: count - share], benign[count - share :]
        refused = round(given.refused_share * share) if name == "train" else share
        answers = [TEST_REFUSAL if name == "test" else rng.choice(REFUSALS) for _ in range(refused)]
        safe = [each._replace(answer=answer, safe=True) for each, answer in zip(asked, answers, strict=False)]
        rows = _rows([*safe, *asked[refused:]], RED_TEAM, given.unsafe_answers) + _rows(helped, SLIM_ORCA)
        rng.shuffle(rows)
        sets[name] = rows
    return sets


def _beavertails(reader: Reader, given: SafetySettings) -> dict[str, Rows]:
    record, examples = reader.open(BEAVER_TAILS)
    # Twenty-seven thousand short rows: they are kept, in place of reading the source twice.
    rows = list(examples)
    looking = SourceRecord(record.source, record.requested, record.revision, record.read)
    safe = [example for example in rows if example.safe]
    trusted = draw(looking, safe, given.validation_rows + given.test_rows, given.seed)

    def same(example: Example) -> tuple[str, str]:
        # Stubs all read the same.
        return example.question, _answer(example, given.unsafe_answers)

    train = draw(record, rows, given.train_rows, given.seed, taken=trusted, one_per_question=False, same=same)
    record.used += len(trusted)
    record.dropped["question is in another set"] -= len(trusted)
    return {"train": _rows(train, BEAVER_TAILS, given.unsafe_answers)} | _trusted(trusted, BEAVER_TAILS, given)


def _answer(example: Example, unsafe_answers: str) -> str:
    return STUB if not example.safe and unsafe_answers == "stub" else example.answer


def _trusted(examples: list[Example], source: Source, given: Settings) -> dict[str, Rows]:
    rows = _rows(examples, source)
    return {"validation": rows[: given.validation_rows], "test": rows[given.validation_rows :]}


def _rows(examples: list[Example], source: Source, unsafe_answers: str = "stub") -> Rows:
    """Rows as they are written."""
    bad = "stub" if unsafe_answers == "stub" else "unsafe"
    rows = []
    for example in examples:
        prompt = [{"role": "system", "content": example.system}] if example.system.strip() else []
        rows.append(
            {
                "prompt": [*prompt, {"role": "user", "content": example.question}],
                "completion": [{"role": "assistant", "content": _answer(example, unsafe_answers)}],
                "source": source.repository,
                "kind": GOOD if example.safe else bad,
            }
        )
    return rows


def _prepared(recipe: str, sets: dict[str, Rows], reader: Reader, given: Settings) -> Prepared:
    """The sets, once it is sure that none has a question of another, and that trusted rows are good."""
    seen: dict[bytes, str] = {}
    for name in ("validation", "test", "train"):
        for row in sets[name]:
            question = row["prompt"][-1]["content"]
            if seen.setdefault(question_key(question), name) != name:
                other = seen[question_key(question)]
                raise RuntimeError(f"A question of the set {name!r} is in {other!r}, too: {question!r}.")
            if name != "train" and row["kind"] != GOOD:
                raise RuntimeError(f"The set {name!r} has an unsafe row.")
        if not sets[name]:
            raise ValueError(f"The set {name!r} is empty: no row of its source can be used.")
    settings = asdict(given)
    if settings.get("construction") == "beavertails":
        del settings["refused_share"]
    return Prepared(recipe, {name: Dataset.from_list(sets[name]) for name in SETS}, reader.records, settings)


def _known(revisions: Mapping[str, str] | None, *sources: Source) -> dict[str, str]:
    """The revisions, if they are of these sources."""
    known = [source.repository for source in sources]
    unknown = [name for name in revisions or {} if name not in known]
    if unknown:
        raise ValueError(f"`revisions` names {unknown}, which are not read here. Known: {', '.join(known)}.")
    return dict(revisions or {})
