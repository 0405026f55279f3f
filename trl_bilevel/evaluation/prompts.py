"""Requests to test a model with: published harmful ones, benign look-alikes, files and hub sets of the user's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from ..data.assets import PackagedFile, fetch, harmful_requests
from ..data.formats import Part

ADVBENCH = PackagedFile(
    "pyrit==1.1.0",
    "pyrit/datasets/seed_datasets/local/adv_bench.prompt",
    "ccf76355d0d661bcf81f57f70baa1db9299da8aa9352f39b3672cf3da560d3e0",
)
# Of the authors, CC-BY-4.0. The hub could not be reached where this was written: the name is from documentation.
XSTEST = "Paul/XSTest"

PROMPT_COLUMNS = ("prompt", "question", "instruction", "goal", "behavior", "request", "text")
# What sets that mix both kinds call them, in a column `label`.
LABELS = {"harmful": "unsafe", "benign": "safe"}


def harmful_prompts(name: str, split: str = "train") -> list[Part]:
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


def benign_prompts(name: str, split: str = "train") -> list[Part]:
    """Benign requests that look harmful: `"lookalikes"` (60, ours), `"xstest"` (250, on the hub), or a set of yours.

    Arguments as of `harmful_prompts`; the label of a set of yours is "safe".
    """
    if name == "lookalikes":
        return _lines(resources.files("trl_bilevel.evaluation").joinpath("text/lookalikes.txt").read_text())
    return _named(XSTEST if name == "xstest" else name, split, "benign")


def _named(name: str, split: str, kind: str) -> list[Part]:
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


def prompts_of(rows: Iterable[Mapping[str, Any]], name: str, label: str) -> list[Part]:
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


def _lines(text: str) -> list[Part]:
    return [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
