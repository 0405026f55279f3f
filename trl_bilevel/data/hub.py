"""Weighted rows on the hub, with a data card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from datasets import Dataset

from .cards import render, selection_facts
from .identity import DATA_RANK, DATA_WEIGHT, SAMPLE_ID

DATA_FILE = "data/train.parquet"
COLUMNS = {
    SAMPLE_ID: "number of the row in the training set",
    DATA_WEIGHT: "weight of the row, 1 is the average; missing where a row was never trained on",
    DATA_RANK: "0 is the highest weight",
}


def data_card(
    repo: str, rows: Dataset, record: Mapping[str, Any], results: Sequence[tuple[str, str]] = (), note: str = ""
) -> str:
    """The data card of weighted rows: metadata as the hub reads it, then text.

    Args:
        repo (`str`): name on the hub, `USER/NAME`.
        rows (`Dataset`): what is uploaded.
        record: `run.json` of the run that weighted them, or an empty dict.
        results: lines for the table of results.
        note (`str`): which rows these are, if not all.
    """
    name = repo.split("/")[-1]
    metadata = {"tags": ["trl-bilevel", "data-selection", "sample-weights"], "pretty_name": name}
    facts = selection_facts(record, results) | {"repo": repo, "name": name, "rows": rows, "note": note}
    facts["columns"] = [(column, meaning) for column, meaning in COLUMNS.items() if column in rows.column_names]
    facts["weighted"] = DATA_WEIGHT in rows.column_names
    return render("weighted_card.md", metadata, [("train", DATA_FILE)], **facts)


def push_rows(repo: str, rows: Dataset, card: str, *, private: bool | None = None, api: Any = None) -> str:
    """Upload rows and card to a data set repository, which is made if need be; returns its address.

    Args:
        repo (`str`): `USER/NAME`.
        private (`bool`, *optional*): of a new repository; the account's default if None.
        api (*optional*): in place of `huggingface_hub.HfApi()`, which uses the token that the user has logged in with.
    """
    if api is None:
        from huggingface_hub import HfApi

        api = HfApi(library_name="trl-bilevel")
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / DATA_FILE).parent.mkdir()
        rows.to_parquet(str(folder / DATA_FILE))
        (folder / "README.md").write_text(card, encoding="utf-8")
        api.create_repo(repo_id=repo, repo_type="dataset", private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo, repo_type="dataset", folder_path=str(folder), commit_message="Weighted rows of trl-bilevel"
        )
    return f"https://huggingface.co/datasets/{repo}"
