"""What data cards and model cards say of a selection: method, settings, data, results, citation (`text/*.md`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from datasets import Dataset

from .._version import __version__

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


def table(head: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """A markdown table."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(map(_cell, row))} |" for row in rows)


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
