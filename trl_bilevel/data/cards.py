"""What data cards and model cards say of a selection: method, settings, data, results, citation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .._version import __version__

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
    parts = [f"## Data selection\n\n{_method(record)}"]
    settings = {k: v for k, v in record.get("settings", {}).items() if k in SHOWN_SETTINGS and v is not None}
    if settings:
        parts.append("### Settings\n\n" + table(("setting", "value"), [(k, f"`{v}`") for k, v in settings.items()]))
    facts = _data(record)
    if facts:
        parts.append("### Data\n\n" + table(("what", "value"), facts))
    lines = [*results, *_results(record)]
    if lines:
        note = "Losses are in nats per token, and of trusted rows: these chose the weights, so they flatter."
        parts.append("### Results\n\n" + table(("what", "value"), lines) + f"\n\n{note}")
    return "\n\n".join(parts) + "\n"


def citation_section() -> str:
    """The paper's citation as markdown."""
    return f"## Citation\n\n```bibtex\n{CITATION}\n```\n"


def table(head: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    """A markdown table."""
    plain = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in [list(head), ["---"] * len(head), *plain])


def _method(record: Mapping[str, Any]) -> str:
    settings, weights = record.get("settings", {}), record.get("weights", {})
    source = f"trl-bilevel {__version__}"
    paper = f"[{PAPER_TITLE}](https://huggingface.co/papers/{PAPER_ID})"
    if weights.get("given"):
        return f"Every training row had a fixed weight, given with the data. Made with {source}."
    if settings.get("weight_estimator") == "none":
        return f"No data selection: every training row counted the same. Made with {source}."
    how = METHODS.get(str(settings.get("weight_estimator")))
    rounds = " In rounds, the model answered questions anew, and kept what helped." * (record.get("kind") == "refine")
    return (
        "Every training row has a weight, learned so that a model trained on the weighted rows does best on a small "
        f"set of trusted rows (bilevel data selection, {paper}).{f' Scores come from {how}.' if how else ''}{rounds} "
        f"Made with {source}."
    )


def _data(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    data = record.get("data", {})
    out = [("base model", str(record["model"]))] if record.get("model") else []
    if "rows" in data:
        out.append(("training rows", f"{data['rows']:,}, of which {data.get('rows_trained_on', data['rows']):,} used"))
    out += [
        (f"trusted rows ({name})", f"{facts['rows']:,}, weight {facts['weight']:.2f}")
        for name, facts in data.get("validation", {}).items()
    ]
    return out


def _results(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    out = []
    followed = record.get("validation") or []
    if isinstance(followed, list) and followed:
        first, last = followed[0], followed[-1]
        out.append((f"validation loss, step {first['step']}", f"{first['total']:.4f}"))
        if last is not first:
            out.append((f"validation loss, step {last['step']}", f"{last['total']:.4f}"))
    losses = record.get("evaluation", {}).get("losses") or []
    if losses:
        out.append((f"eval loss, {len(losses)} rows", f"{sum(losses) / len(losses):.4f}"))
    sizes = [entry["selector/ess"] for entry in record.get("log_history", []) if "selector/ess" in entry]
    if sizes:
        out.append(("effective sample size while training", f"{sizes[-1]:.0%} of the rows"))
    return out
