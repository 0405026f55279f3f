"""The sets of the recipes: training rows of mixed quality, trusted validation rows, test rows."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from datasets import Dataset

from trl_bilevel.data.answers import REFUSALS, STUB, TEST_REFUSAL
from trl_bilevel.data.contamination import GOOD

from .sources import (
    ALPACA,
    BEAVER_TAILS,
    OPEN_ORCA,
    RED_TEAM,
    SLIM_ORCA,
    Example,
    Loader,
    Reader,
    Resolver,
    Source,
    SourceRecord,
    draw,
    hub_revision,
    hub_rows,
)

SETS = ("train", "validation", "test")
# The trainer's calibration needs 8 trusted rows.
LEAST = {"train_rows": 1, "validation_rows": 8, "test_rows": 1, "max_characters": 1}
CHOICES = {"construction": ("seal", "beavertails"), "unsafe_answers": ("stub", "published")}
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
        for name, least in LEAST.items():
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
        for name, known in CHOICES.items():
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


def prepare_recipe(
    recipe: str,
    *,
    revisions: Mapping[str, str] | None = None,
    loader: Loader = hub_rows,
    resolve: Resolver = hub_revision,
    **settings: Any,
) -> Prepared:
    """The sets of a recipe, from the hub.

    Args:
        recipe (`str`): `"quality"`: Alpaca-cleaned to train on, OpenOrca as trusted (arXiv 2511.21056);
            `"safety"`: safe and unsafe instruction rows to train on, safe ones as trusted.
        revisions: revision per repository; `"main"` where there is none.
        loader: gives the rows of a source at a revision; the hub.
        resolve: gives the commit of a revision; the hub.
        settings: fields of [`Settings`]; for `"safety"` of [`SafetySettings`].

    Raises:
        ValueError: if a setting is out of range, or the sources have too few usable rows.
        MalformedSourceError: if a source does not have the rows that it should have.
        ConnectionError: if the hub does not answer.
    """
    given = Settings(**settings) if recipe == "quality" else SafetySettings(**settings)
    facts = asdict(given)
    build, *sources = BUILDS[facts.get("construction", "quality")]
    known = [source.repository for source in sources]
    unknown = [name for name in revisions or {} if name not in known]
    if unknown:
        raise ValueError(f"`revisions` names {unknown}, which are not read here. Known: {', '.join(known)}.")
    published = facts.get("unsafe_answers") == "published"
    reader = Reader(loader, resolve, revisions or {}, given.max_characters, published)
    sets = build(reader, given)
    for name in SETS:
        if not sets[name]:
            raise ValueError(f"The set {name!r} is empty: no row of its source can be used.")
    return Prepared(recipe, {name: Dataset.from_list(sets[name]) for name in SETS}, reader.records, facts)


def _quality(reader: Reader, given: Settings) -> dict[str, Rows]:
    trusted = draw(*reader.open(OPEN_ORCA), given.validation_rows + given.test_rows, given.seed)
    train = draw(*reader.open(ALPACA), given.train_rows, given.seed, taken=trusted, same=lambda row: row[:2])
    return {"train": _rows(train, ALPACA)} | _trusted(trusted, OPEN_ORCA, given)


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
        rows = _rows([*safe, *asked[refused:]], RED_TEAM) + _rows(helped, SLIM_ORCA)
        rng.shuffle(rows)
        sets[name] = rows
    return sets


def _beavertails(reader: Reader, given: SafetySettings) -> dict[str, Rows]:
    record, examples = reader.open(BEAVER_TAILS)
    # Twenty-seven thousand short rows: they are kept, in place of reading the source twice.
    rows = list(examples)
    safe = [example for example in rows if example.safe]
    looking = replace(record, dropped=Counter())
    trusted = draw(looking, safe, given.validation_rows + given.test_rows, given.seed)

    train = draw(record, rows, given.train_rows, given.seed, taken=trusted, same=lambda row: row[:2])
    record.used += len(trusted)
    record.dropped["question is in another set"] -= len(trusted)
    return {"train": _rows(train, BEAVER_TAILS)} | _trusted(trusted, BEAVER_TAILS, given)


def _trusted(examples: list[Example], source: Source, given: Settings) -> dict[str, Rows]:
    rows = _rows(examples, source)
    return {"validation": rows[: given.validation_rows], "test": rows[given.validation_rows :]}


BUILDS: dict[str, tuple[Any, ...]] = {
    "quality": (_quality, OPEN_ORCA, ALPACA),
    "seal": (_seal, SLIM_ORCA, RED_TEAM),
    "beavertails": (_beavertails, BEAVER_TAILS),
}


def _rows(examples: list[Example], source: Source) -> Rows:
    """Rows as they are written."""
    rows = []
    for example in examples:
        prompt = [{"role": "system", "content": example.system}] if example.system.strip() else []
        rows.append(
            {
                "prompt": [*prompt, {"role": "user", "content": example.question}],
                "completion": [{"role": "assistant", "content": example.answer}],
                "source": source.repository,
                "kind": GOOD if example.safe else "stub" if example.answer == STUB else "unsafe",
            }
        )
    return rows
