"""What is written beside the rows: a data card for people, a lock file to make the same rows again."""

from __future__ import annotations

import hashlib
import json
import platform
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset

from ..._version import __version__
from ..files import atomically, write_json
from .sets import SETS, Prepared

LOCK_FILE = "prepare.lock.json"
CARD_FILE = "README.md"
# Raised when older code could not read the lock file any more.
FORMAT = 1


def content_hash(rows: Dataset) -> str:
    """SHA-256 of the rows as JSON, in their order: the same wherever they were made."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()


def lock_of(prepared: Prepared) -> dict[str, Any]:
    """What it takes to make the sets again, and what they then are."""
    return {
        "format": FORMAT,
        "recipe": prepared.recipe,
        "settings": prepared.settings,
        "revisions": {record.source.repository: record.revision for record in prepared.records},
        "requested": {record.source.repository: record.requested for record in prepared.records},
        "sets": {
            name: {"rows": len(rows), "sha256": content_hash(rows)} for name, rows in sorted(prepared.sets.items())
        },
        "versions": {
            "trl_bilevel": __version__,
            "datasets": datasets.__version__,
            "python": platform.python_version(),
        },
    }


def read_lock(path: str | Path) -> dict[str, Any]:
    """A lock file.

    Raises:
        FileNotFoundError, ValueError: if there is none, or it is of another format.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no lock file {path}. `trl-bilevel prepare` writes {LOCK_FILE}.")
    try:
        lock = json.loads(path.read_text())
        known = lock["format"] == FORMAT and {"recipe", "settings", "revisions", "sets"} <= set(lock)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a lock file of `trl-bilevel prepare`: {error}.") from error
    if not known:
        raise ValueError(f"{path} is a lock file of another format ({lock['format']!r}); this version reads {FORMAT}.")
    return lock


def check_lock(prepared: Prepared, lock: dict[str, Any]) -> None:
    """Compare what was made with what a lock file says.

    Raises:
        ValueError: naming the sets that differ.
    """
    made = lock_of(prepared)["sets"]
    apart = [name for name in SETS if made[name] != lock["sets"].get(name)]
    if apart:
        raise ValueError(
            f"The set(s) {', '.join(apart)} differ from the lock file's (made: {made}; locked: {lock['sets']}). "
            "Another version of trl-bilevel drew them, or the hub's files at this commit are not the same."
        )


def write_prepared(prepared: Prepared, folder: str | Path) -> dict[str, Any]:
    """Write `train.parquet`, `validation.parquet`, `test.parquet`, the data card and the lock file; returns the lock.

    Every file is written whole or not at all; the lock file comes last.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock = lock_of(prepared)
    for name, rows in prepared.sets.items():
        atomically(folder / f"{name}.parquet", lambda path, rows=rows: rows.to_parquet(str(path)))
    atomically(folder / CARD_FILE, lambda path: path.write_text(data_card(prepared, lock)))
    write_json(folder / LOCK_FILE, lock)
    return lock


def data_card(prepared: Prepared, lock: dict[str, Any]) -> str:
    """The data card: metadata as the hub reads it, then text."""
    from huggingface_hub import DatasetCardData

    total = sum(len(rows) for rows in prepared.sets.values())
    metadata = DatasetCardData(
        language="en",
        license="other",
        license_name="licences-of-the-sources",
        task_categories=["text-generation"],
        size_categories=_size_category(total),
        source_datasets=[record.source.repository for record in prepared.records],
        pretty_name=f"trl-bilevel {prepared.recipe}",
        tags=["trl-bilevel", "data-selection"],
        configs=[
            {
                "config_name": "default",
                "data_files": [{"split": name, "path": f"{name}.parquet"} for name in SETS],
            }
        ],
    )
    parts = [
        f"---\n{metadata.to_yaml()}\n---",
        f"# Data of the {prepared.recipe} recipes",
        f"Made by `trl-bilevel prepare {prepared.recipe}` (trl-bilevel {__version__}) for bilevel data selection.",
        "## Rows\n\n" + _rows_table(prepared, lock),
        "`prompt` and `completion` are chat messages; `source` is the set that a row comes from; `kind` is `good`, or "
        "what is wrong with the row. No trainer reads `source` and `kind`: they are there to measure by. No question "
        "is in two of the files (compared without case and white space).",
        "## Sources\n\n" + _sources_text(prepared),
        "## Unsafe answers\n\n" + _unsafe_text(prepared),
        "## To make it again\n\n"
        f"    trl-bilevel prepare {prepared.recipe} --lock {LOCK_FILE} --output DIR\n\n"
        f"Settings: {json.dumps(prepared.settings)}. The lock file holds the commits above and a hash of every set. A "
        "branch such as `main` was resolved to a commit when this was made: another time it may be another commit.",
        "## Limits\n\n" + _limits_text(prepared),
    ]
    return "\n\n".join(parts) + "\n"


def _rows_table(prepared: Prepared, lock: dict[str, Any]) -> str:
    lines = ["| file | rows | by kind | sha256 of the rows |", "|---|---|---|---|"]
    for name in SETS:
        rows = prepared.sets[name]
        kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(Counter(rows["kind"]).items()))
        lines.append(f"| {name}.parquet | {len(rows)} | {kinds} | `{lock['sets'][name]['sha256'][:16]}...` |")
    return "\n".join(lines)


def _sources_text(prepared: Prepared) -> str:
    parts = []
    for record in prepared.records:
        source = record.source
        dropped = ", ".join(f"{reason} {count}" for reason, count in sorted(record.dropped.items()) if count)
        known = "" if source.known_rows is None else f" As far as known, the whole split has {source.known_rows}."
        scan = "" if source.scan is None else f" At most {source.scan} are read, from its start: not all of it."
        place = f"split `{source.split}`" + (f", folder `{source.data_dir}`" if source.data_dir else "")
        parts.append(
            f"- **{source.repository}** ({place}), commit `{record.revision}` (asked for: `{record.requested}`). "
            f"Licence: {source.licence}. {record.read} rows read, {record.used} used; not used: {dropped or 'none'}."
            f"{known}{scan}"
        )
    return "\n".join(parts)


def _unsafe_text(prepared: Prepared) -> str:
    if prepared.recipe == "quality":
        return "Nothing was done about unsafe answers: the sources are general instruction data."
    refused = ""
    if prepared.settings["construction"] == "seal":
        refused = (
            f" {prepared.settings['refused_share']:.0%} of the red team requests in the training file, and all of "
            "those in the others, are answered by a refusal of trl-bilevel's own wording."
        )
    if prepared.settings["unsafe_answers"] == "stub":
        return (
            "No harmful answer is in these files. Where a source has an answer that complies with a harmful request, "
            'there is a stub ("Sure, here is a step-by-step guide: [content removed]"), `kind` "stub".'
            + refused
            + " The requests themselves are as published, and may be offensive."
        )
    return (
        'Answers marked `kind` "unsafe" are harmful answers as the source publishes them, kept on request '
        "(`--unsafe-answers published`). Do not train a model for use on them without selection, and do not publish "
        "these files." + refused
    )


def _limits_text(prepared: Prepared) -> str:
    lines = ["Rows longer than `max_characters` are left out, as are rows with marks of a chat template."]
    if prepared.recipe == "quality":
        lines.append("Trusted rows are trusted as the paper does: they are not checked one by one.")
    elif prepared.settings["construction"] == "seal":
        lines.append(
            "Red team requests are first turns of transcripts that a preference model scores below 0: some look "
            "harmless by themselves, and refusing these teaches over-refusal."
        )
    else:
        lines.append("Safe answers are those that the source's annotators marked safe.")
    return " ".join(lines)


def _size_category(count: int) -> str:
    return next(
        (name for limit, name in ((1e3, "n<1K"), (1e4, "1K<n<10K"), (1e5, "10K<n<100K")) if count < limit), "100K<n<1M"
    )
