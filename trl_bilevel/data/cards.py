"""What data cards and model cards say of a selection, filled into templates of `text/`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from datasets import Dataset

from .._version import __version__
from .identity import DATA_RANK, DATA_WEIGHT, SAMPLE_ID

PAPER_TITLE = "Bilevel Data Curation for LLM Fine-tuning: Offline Selection and Online Self-Refining Generation"
PAPER_ID = "2511.21056"
CITATION = f"""@article{{xiao2025bilevel,
  title   = {{{{{PAPER_TITLE}}}}},
  author  = {{Xiao and Chen}},
  year    = {{2025}},
  journal = {{arXiv preprint arXiv:{PAPER_ID}}}
}}"""
# Settings of a run that a card shows; the others are in the run's report.
SHOWN_SETTINGS = (
    *("weight_estimator", "selector_weighting", "selector_preset"),
    *("validation_loss_weight", "calibration_sharpness", "filter_rate", "pilot_steps", "pilot_scored_rows"),
    *("num_rounds", "steps_per_round", "num_generations", "implicit_weight_temperature"),
    *("learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "seed"),
)
COLUMNS = {
    SAMPLE_ID: "number of the row in the training set",
    DATA_WEIGHT: "weight of the row, 1 is the average; missing where a row was never trained on",
    DATA_RANK: "0 is the highest weight",
}
METHODS = {
    "value_function": "a short pilot run of two sets of adapters, one pulled by the trusted rows",
    "lookahead": "how much a few steps on the trusted rows change a row's loss",
    "loss": "a row's own loss, which reproduces published results",
}


def selection_section(record: Mapping[str, Any], results: Sequence[tuple[str, str]] = ()) -> str:
    """Markdown sections on how weights came about: of `run.json`, or what `record.describe` says of a trainer.

    Args:
        record: the run's record; may be empty, or lack any part.
        results: further lines of the table of results, as (name, value).
    """
    return _filled("selection.md", **selection_facts(record, results))


def selection_facts(record: Mapping[str, Any], results: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """What `text/selection.md` is filled in with; arguments as of `selection_section`."""
    settings = record.get("settings", {})
    return {
        "record": record,
        "settings": {k: v for k, v in settings.items() if k in SHOWN_SETTINGS and v is not None},
        "method": METHODS.get(str(settings.get("weight_estimator"))),
        "results": [*results, *_results(record)],
        "paper": f"[{PAPER_TITLE}](https://huggingface.co/papers/{PAPER_ID})",
    }


def _results(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    followed = record.get("validation") or []
    ends = followed[:1] + followed[1:][-1:]
    out = [(f"validation loss, step {entry['step']}", f"{entry['total']:.4f}") for entry in ends]
    losses = record.get("evaluation", {}).get("losses") or []
    if losses:
        out.append((f"eval loss, {len(losses)} rows", f"{sum(losses) / len(losses):.4f}"))
    sizes = [entry["selector/ess"] for entry in record.get("log_history", []) if "selector/ess" in entry]
    return out + [("effective sample size while training", f"{size:.0%} of the rows") for size in sizes[-1:]]


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
    return render("weighted_card.md", metadata, [("train", "data/train-*")], **facts)


def render(template: str, metadata: Mapping[str, Any], splits: Iterable[tuple[str, str]], **facts: Any) -> str:
    """A data card: metadata as the hub reads it, then a template of `text/`, filled in.

    Args:
        metadata: fields of `huggingface_hub.DatasetCardData`.
        splits: name and file of each split.
    """
    from huggingface_hub import DatasetCardData

    files = [{"split": name, "path": path} for name, path in splits]
    configs = [{"config_name": "default", "data_files": files}]
    data = DatasetCardData(task_categories=["text-generation"], configs=configs, **metadata)
    return f"---\n{data.to_yaml()}\n---\n\n{_filled(template, **facts)}"


def _filled(template: str, **facts: Any) -> str:
    from jinja2 import ChainableUndefined, Environment, PackageLoader

    loader = PackageLoader("trl_bilevel.data", "text")
    environment = Environment(loader=loader, undefined=ChainableUndefined, keep_trailing_newline=True)
    environment.filters |= {"cell": _cell, "count": "{:,}".format}
    return environment.get_template(template).render(**facts, citation=CITATION, version=__version__)


def table(head: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """A markdown table."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(map(_cell, row))} |" for row in rows)


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
