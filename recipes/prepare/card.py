"""What is written beside the rows: a data card for people (`card.md`), a lock file to make the same rows again."""

from __future__ import annotations

import hashlib
import json
import platform
from bisect import bisect
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset
from huggingface_hub import DatasetCard, DatasetCardData

from trl_bilevel import __version__
from trl_bilevel.data.files import atomically, read_json, write_json

from .sets import SETS, Prepared

LOCK_FILE = "prepare.lock.json"
# Of the hub.
SIZES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M")
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
        "sets": {name: {"rows": len(rows), "sha256": content_hash(rows)} for name, rows in prepared.sets.items()},
        "versions": {
            "trl_bilevel": __version__,
            "datasets": datasets.__version__,
            "python": platform.python_version(),
        },
    }


def read_lock(path: Path) -> dict[str, Any]:
    """A lock file; an OSError or ValueError if there is none, or it is of another format."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no lock file {path}. `python -m recipes.prepare` writes {LOCK_FILE}.")
    lock = read_json(path)
    if lock.get("format") != FORMAT or not {"recipe", "settings", "revisions", "sets"} <= set(lock):
        raise ValueError(
            f"{path} is not a lock file of `python -m recipes.prepare` that this version can read: it has the format "
            f"{lock.get('format')!r}, not {FORMAT}, or lacks a part. Give the {LOCK_FILE} of this version."
        )
    return lock


def write_prepared(prepared: Prepared, folder: Path, expected: dict[str, Any] | None = None) -> dict[str, Any]:
    """Write `train.parquet`, `validation.parquet`, `test.parquet`, the data card and the lock file; returns the lock.

    Every file is written whole or not at all; the lock file comes last. Sets that differ from those of the lock
    `expected` are a ValueError, and nothing is written.
    """
    lock = lock_of(prepared)
    made, locked = lock["sets"], (expected or lock)["sets"]
    apart = [name for name in SETS if made[name] != locked.get(name)]
    if apart:
        raise ValueError(
            f"The set(s) {', '.join(apart)} differ from the lock file's (made: {made}; locked: {locked}). Another "
            "version of trl-bilevel drew them, or the hub's files at this commit are not the same."
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in prepared.sets.items():
        atomically(folder / f"{name}.parquet", lambda path, rows=rows: rows.to_parquet(str(path)))
    atomically(folder / "README.md", lambda path: path.write_text(data_card(prepared, lock)))
    write_json(folder / LOCK_FILE, lock)
    return lock


def data_card(prepared: Prepared, lock: dict[str, Any]) -> str:
    """The data card: metadata as the hub reads it, then text."""
    files = [{"split": name, "path": f"{name}.parquet"} for name in SETS]
    data = DatasetCardData(
        language="en",
        license="other",
        license_name="licences-of-the-sources",
        size_categories=SIZES[bisect([1000, 10_000, 100_000], sum(map(len, prepared.sets.values())))],
        source_datasets=list(lock["revisions"]),
        task_categories=["text-generation"],
        configs=[{"config_name": "default", "data_files": files}],
        pretty_name=f"trl-bilevel {prepared.recipe}",
        tags=["trl-bilevel", "data-selection"],
    )
    template = str(Path(__file__).with_name("card.md"))
    facts: dict[str, Any] = {"prepared": prepared, "lock": lock, "lock_file": LOCK_FILE, "version": __version__}
    return str(DatasetCard.from_template(data, template_path=template, **facts))
