"""Weighted rows on the hub, with a data card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from datasets import Dataset

from .cards import citation_section, selection_section, table
from .identity import DATA_WEIGHT

DATA_FILE = "data/train.parquet"
CARD_FILE = "README.md"
COLUMNS = (
    ("`sample_id`", "number of the row in the training set"),
    ("`data_weight`", "weight of the row, 1 is the average; missing where a row was never trained on"),
    ("`data_rank`", "0 is the highest weight"),
)


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
    from huggingface_hub import DatasetCard, DatasetCardData

    metadata = DatasetCardData(
        task_categories=["text-generation"],
        tags=["trl-bilevel", "data-selection", "sample-weights"],
        pretty_name=repo.split("/")[-1],
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": DATA_FILE}]}],
    )
    own = [(name, meaning) for name, meaning in COLUMNS if name.strip("`") in rows.column_names]
    use = (
        "```python\nfrom datasets import load_dataset\n"
        "from trl_bilevel import BilevelSFTConfig, BilevelSFTTrainer\n\n"
        f'rows = load_dataset("{repo}", split="train")\n'
        'args = BilevelSFTConfig(output_dir="out", weight_estimator="none")  # trains with these weights\n'
        "trainer = BilevelSFTTrainer(model, args, train_dataset=rows)\n```"
    )
    weighted = DATA_WEIGHT in rows.column_names
    first = f"{len(rows):,} training rows{' with a weight each' if weighted else ''}. {note}".strip()
    parts = [
        f"---\n{metadata.to_yaml()}\n---",
        f"# {repo.split('/')[-1]}",
        f"{first} The rows keep the licence of the data that they come from.",
        "## Columns\n\n" + table(("column", "meaning"), own) if own else "",
        f"## Use\n\n{use}" if weighted else "",
        selection_section(record, results),
        citation_section(),
    ]
    text = "\n\n".join(part for part in parts if part)
    return str(DatasetCard(text))


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
        (folder / CARD_FILE).write_text(card, encoding="utf-8")
        api.create_repo(repo_id=repo, repo_type="dataset", private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo, repo_type="dataset", folder_path=str(folder), commit_message="Weighted rows of trl-bilevel"
        )
    return f"https://huggingface.co/datasets/{repo}"
