"""Requests to test a model with: published harmful ones, benign look-alikes, files and hub sets of the user's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from ..data.assets import harmful_requests
from ..data.formats import Part
from ..data.loading import load_rows

PROMPT_COLUMNS = ("prompt", "question", "instruction", "goal", "behavior", "request", "text")
# What sets that mix both kinds call them, in a column `label`.
LABELS = {"harmful": "unsafe", "benign": "safe"}


def requests(kind: str, name: str, split: str = "train") -> list[Part]:
    """Requests of a published set or of yours.

    Args:
        kind (`str`): `"harmful"`, or `"benign"` for requests that look harmful.
        name (`str`): `"harmbench"` (200 harmful ones, fetched and checked by hash), `"lookalikes"` (60 benign ones,
            ours), a text file with a request per line, or anything `load_rows` takes, with a column of
            `PROMPT_COLUMNS` or `messages`; of sets labelled by `LABELS`, the other kind is left out.
    """
    if (kind, name) == ("harmful", "harmbench"):
        return list(harmful_requests())
    if (kind, name) == ("benign", "lookalikes"):
        found = _lines(resources.files("trl_bilevel.evaluation").joinpath("text/lookalikes.txt").read_text())
    elif Path(name).suffix == ".txt":
        if not Path(name).is_file():
            raise FileNotFoundError(f"There is no file {name} of {kind} requests.")
        found = _lines(Path(name).read_text())
    else:
        found = prompts_of(load_rows(name, split=split), name, LABELS[kind])
    if not found:
        raise ValueError(f"{name!r} holds no {kind} request.")
    return found


def prompts_of(rows: Iterable[Mapping[str, Any]], name: str, label: str) -> list[Part]:
    """The rows' requests, of one label where they are labelled; of chats, all but the answers."""
    rows = list(rows)
    columns = set(rows[0]) if rows else set()
    if {row.get("label") for row in rows} & {*LABELS.values()}:
        rows = [row for row in rows if row["label"] == label]
    column = next((column for column in PROMPT_COLUMNS if column in columns), None)
    if column is not None:
        return [row[column] for row in rows]
    if "messages" in columns:
        return [[turn for turn in row["messages"] if turn["role"] != "assistant"] for row in rows]
    raise ValueError(
        f"{name!r} has the columns {sorted(columns)}, none of which is known to hold requests: "
        f"{', '.join(PROMPT_COLUMNS)} or messages. Rename the column."
    )


def _lines(text: str) -> list[Part]:
    return [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
