"""Weighted rows as other tools read them: the data file, and the entry of a config that names it.

Known of each, from its documentation:

- data-juicer: `topk_specified_field_selector` sorts by the number in `field_key` and keeps `topk` or `top_ratio`.
- LLaMA-Factory: an entry of `dataset_info.json` names the file, the format (`alpaca`, `sharegpt`) and the columns.
- axolotl: an entry of `datasets` names the file and how prompts are made (`chat_template`, `completion`, or fields).

None of the three reads a weight per row. Their part of the weights is which rows are there, and how often.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset

from .files import atomically
from .formats import CONVERSATIONS, MESSAGES, PAIRS, TEXT, layout_of
from .identity import DATA_WEIGHT

TOOLS = ("data-juicer", "llama-factory", "axolotl")
INFO_FILE = "dataset_info.json"


def write_for(tool: str, rows: Dataset, path: Path, name: str, selected: int | None = None) -> list[Path]:
    """Write rows for another tool, as JSON lines, and the config entry beside them; returns the files written.

    Args:
        tool (`str`): one of `TOOLS`.
        rows (`Dataset`): with `data_weight`.
        path (`Path`): of the data file; ends in `.jsonl`.
        name (`str`): of the data set in the tool's config.
        selected (`int`, *optional*): rows that data-juicer is to keep; by default half of them.

    Raises:
        ValueError: if the file has another ending, there are no rows, or their columns are not known to the tool.
    """
    if path.suffix != ".jsonl":
        raise ValueError(
            f"Data for {tool} is written as JSON lines: `--output` must end in .jsonl, got {str(path)!r}."
        )
    if len(rows) == 0:
        raise ValueError("No row is left to write: lower `--min-weight`.")
    layout = layout_of(rows)
    if layout not in (PAIRS, MESSAGES, CONVERSATIONS, TEXT):
        raise ValueError(
            f"The rows have the columns {rows.column_names}, which cannot be told to another tool. It takes "
            "`messages`, `conversations`, `prompt` and `completion`, or `text`."
        )
    if layout == PAIRS and not isinstance(rows[0]["prompt"], str):
        joined = rows.map(lambda row: {MESSAGES: [*row["prompt"], *row["completion"]]}, desc="Joining messages")
        rows, layout = joined.remove_columns(["prompt", "completion"]), MESSAGES
    atomically(path, lambda file: rows.to_json(str(file)))
    if tool == "llama-factory":
        entry = path.with_name(INFO_FILE)
        known = _read_info(entry)
        text = json.dumps(known | {name: llama_factory_entry(path.name, rows, layout)}, indent=2) + "\n"
    else:
        entry = path.with_suffix(f".{tool}.yaml")
        facts = axolotl_entry(path, layout) if tool == "axolotl" else data_juicer_recipe(path, layout, selected, name)
        text = _yaml(facts)
    atomically(entry, lambda file: file.write_text(text, encoding="utf-8"))
    return [path, entry]


def llama_factory_entry(file_name: str, rows: Dataset, layout: str) -> dict[str, Any]:
    """The entry of `dataset_info.json` for rows of a layout; plain text is for its stage `pt` only."""
    entry: dict[str, Any] = {"file_name": file_name}
    if layout == MESSAGES:
        tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user"}
        tags |= {"assistant_tag": "assistant", "system_tag": "system"}
        return entry | {"formatting": "sharegpt", "columns": {"messages": MESSAGES}, "tags": tags}
    if layout == CONVERSATIONS:
        system = {"system": "system"} if "system" in rows.column_names else {}
        return entry | {"formatting": "sharegpt", "columns": {"messages": CONVERSATIONS, **system}}
    columns = {"prompt": "text"} if layout == TEXT else {"prompt": "prompt", "response": "completion"}
    return entry | {"formatting": "alpaca", "columns": columns}


def axolotl_entry(path: Path, layout: str) -> dict[str, Any]:
    """The part `datasets` of an axolotl config. Text prompts go in as they are, without a template around them."""
    entry: dict[str, Any] = {"path": str(path), "ds_type": "json"}
    if layout == MESSAGES:
        entry |= {"type": "chat_template", "field_messages": MESSAGES}
    elif layout == CONVERSATIONS:
        mapping = {"role": "from", "content": "value"}
        entry |= {"type": "chat_template", "field_messages": CONVERSATIONS, "message_property_mappings": mapping}
    elif layout == TEXT:
        entry |= {"type": "completion", "field": "text"}
    else:
        fields = {"field_instruction": "prompt", "field_output": "completion"}
        entry["type"] = fields | {"format": "{instruction}", "no_input_format": "{instruction}"}
    return {"datasets": [entry]}


def data_juicer_recipe(path: Path, layout: str, selected: int | None, name: str) -> dict[str, Any]:
    """A recipe of data-juicer that keeps the rows of the highest weight."""
    amount = {"top_ratio": 0.5} if selected is None else {"topk": selected}
    keys = {PAIRS: ["prompt", "completion"], TEXT: "text"}.get(layout)
    step = {"topk_specified_field_selector": {"field_key": DATA_WEIGHT, **amount, "reverse": True}}
    return {
        "project_name": name,
        "dataset_path": str(path),
        "export_path": str(path.with_suffix(".selected.jsonl")),
        **({} if keys is None else {"text_keys": keys}),
        "process": [step],
    }


def _yaml(facts: Mapping[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(dict(facts), sort_keys=False, allow_unicode=True)


def _read_info(path: Path) -> dict[str, Any]:
    """What `dataset_info.json` says of other data sets, to be kept."""
    if not path.exists():
        return {}
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is there already, and is no JSON: {error}. Write to another folder.") from error
    if not isinstance(known, dict):
        raise ValueError(f"{path} is there already, and lists no data sets. Write to another folder.")
    return known
