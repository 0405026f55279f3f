"""What data cards and model cards say of a selection: method, settings, data, results, citation (`text/*.md`)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from .._version import __version__
from .files import atomically

PAPER_TITLE = "Bilevel Data Curation for LLM Fine-tuning: Offline Selection and Online Self-Refining Generation"
PAPER_ID = "2511.21056"
CITATION = f"""@article{{xiao2025bilevel,
  title   = {{{{{PAPER_TITLE}}}}},
  author  = {{Xiao and Chen}},
  year    = {{2025}},
  journal = {{arXiv preprint arXiv:{PAPER_ID}}}
}}"""


def selection_section(record: Mapping[str, Any], results: Sequence[tuple[str, str]] = ()) -> str:
    """Markdown sections on how weights came about: of `run.json`, or what `record.describe` says of a trainer.

    Args:
        record: the run's record; may be empty, or lack any part.
        results: further lines of the table of results, as (name, value).
    """
    return _filled("selection.md", record=record, results=results)


def add_selection_to_card(folder: Path, record: dict[str, Any]) -> None:
    """Add what the record says of the weights to the model card that TRL has written; no text of any row."""
    card = folder / "README.md"
    if not card.is_file():
        return
    text = card.read_text(encoding="utf-8")
    head, citations, rest = text.partition("## Citations")
    section = selection_section(record)
    text = f"{head}{section}\n{citations}{rest}" if citations else f"{text}\n{section}"
    atomically(card, lambda path: path.write_text(text, encoding="utf-8"))


def data_card(
    repo: str, rows: Dataset, record: Mapping[str, Any], results: Sequence[tuple[str, str]] = (), note: str = ""
) -> str:
    """The data card of weighted rows; `record` and `results` as of `selection_section`.

    Args:
        repo (`str`): name on the hub, `USER/NAME`.
        rows (`Dataset`): what is uploaded.
        note (`str`): which rows these are, if not all.
    """
    from huggingface_hub import DatasetCardData

    name, files = repo.split("/")[-1], [{"split": "train", "path": "data/train-*"}]
    metadata = DatasetCardData(
        task_categories=["text-generation"],
        configs=[{"config_name": "default", "data_files": files}],
        tags=["trl-bilevel", "data-selection", "sample-weights"],
        pretty_name=name,
    )
    facts = {"repo": repo, "name": name, "rows": rows, "record": record, "results": results, "note": note}
    return f"---\n{metadata.to_yaml()}\n---\n\n{_filled('weighted_card.md', **facts)}"


def _filled(template: str, **facts: Any) -> str:
    from jinja2 import ChainableUndefined, Environment, PackageLoader

    loader = PackageLoader("trl_bilevel.data", "text")
    environment = Environment(loader=loader, undefined=ChainableUndefined, keep_trailing_newline=True)
    environment.filters |= {"cell": _cell, "count": "{:,}".format}
    environment.globals |= {"paper_title": PAPER_TITLE, "paper_id": PAPER_ID, "citation": CITATION}
    return environment.get_template(template).render(facts, version=__version__)


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
