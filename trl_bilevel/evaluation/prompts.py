"""Requests to test a model with: published harmful ones, benign look-alikes, files and hub sets of the user's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from ..demo.assets import PackagedFile, fetch, harmful_requests
from .rows import Text

ADVBENCH = PackagedFile(
    "pyrit==1.1.0",
    "pyrit/datasets/seed_datasets/local/adv_bench.prompt",
    "ccf76355d0d661bcf81f57f70baa1db9299da8aa9352f39b3672cf3da560d3e0",
)
# 105 and 64 responses labelled as refusal or not by people: what a refusal judge can be checked with (MIT licence).
LABELLED_REFUSALS = (
    PackagedFile(
        "pyrit==1.1.0",
        "pyrit/datasets/scorer_evals/refusal_scorer/refusal.csv",
        "1ebc42ef7dadd97962cc00d04edd6a52a321f7936c063ff3453d2bbcef30a5d7",
    ),
    PackagedFile(
        "pyrit==1.1.0",
        "pyrit/datasets/scorer_evals/refusal_scorer/refusal_extra.csv",
        "6ce7f61a8205eb8c29b1a247b52b3730501349f9adf0674a696efb004658a18a",
    ),
)
# Of the authors, CC-BY-4.0. The hub could not be reached where this was written: the name is from documentation.
XSTEST = "Paul/XSTest"

PROMPT_COLUMNS = ("prompt", "question", "instruction", "goal", "behavior", "request", "text")
# What sets that mix both kinds call them, in a column `label`.
LABELS = {"harmful": "unsafe", "benign": "safe"}


def harmful_prompts(name: str, split: str = "train") -> list[Text]:
    """Harmful requests: `"harmbench"` (200), `"advbench"` (520), both fetched and checked by hash, or a set of yours.

    Args:
        name (`str`): one of these, a text file with a request per line, or anything `load_rows` takes, with a column
            of `PROMPT_COLUMNS`; rows whose `label` is not "unsafe" are left out if there is such a label.
        split (`str`): of a data set.
    """
    if name == "harmbench":
        return list(harmful_requests())
    if name == "advbench":
        import yaml

        return [seed["value"] for seed in yaml.safe_load(fetch(ADVBENCH).read_text())["seeds"]]
    return _named(name, split, "harmful")


def benign_prompts(name: str, split: str = "train") -> list[Text]:
    """Benign requests that look harmful: `"lookalikes"` (60, ours), `"xstest"` (250, on the hub), or a set of yours.

    Args:
        name (`str`): one of these, a text file with a request per line, or anything `load_rows` takes, with a column
            of `PROMPT_COLUMNS`; rows whose `label` is not "safe" are left out if there is such a label.
        split (`str`): of a data set.
    """
    if name == "lookalikes":
        return _lines(resources.files("trl_bilevel.evaluation").joinpath("text/lookalikes.txt").read_text())
    return _named(XSTEST if name == "xstest" else name, split, "benign")


def _named(name: str, split: str, kind: str) -> list[Text]:
    from ..data.loading import load_rows

    if Path(name).suffix == ".txt":
        if not Path(name).is_file():
            raise FileNotFoundError(f"There is no file {name} of {kind} requests.")
        found = _lines(Path(name).read_text())
    else:
        found = prompts_of(load_rows(name, split=split), name, LABELS[kind])
    if not found:
        raise ValueError(f"{name!r} holds no {kind} request.")
    return found


def prompts_of(rows: Iterable[Mapping[str, Any]], name: str, label: str) -> list[Text]:
    """The rows' requests, of one label where they are labelled.

    Raises:
        ValueError: if no column is known to hold requests.
    """
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


def _lines(text: str) -> list[Text]:
    return [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
