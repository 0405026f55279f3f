"""The caller's rows with their weights, and as other tools read them: a data file, and a config entry that names it.

The tools read no weight per row: their part of the weights is which rows are there, and how often.
"""

import json
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset, Value
from torch import Tensor

from ..core.statistics import data_ranks
from .files import atomically
from .formats import CONVERSATIONS, MESSAGES, PAIRS, layout_of
from .identity import DATA_RANK, DATA_WEIGHT, SAMPLE_ID


def weighted_dataset(rows: Dataset, weights: Tensor, top_k: int | None = None) -> Dataset:
    """`rows` with the columns `sample_id`, `data_weight` (float32; missing where NaN) and `data_rank`.

    Args:
        rows (`Dataset`): the caller's rows.
        weights (`Tensor` float32 `[len(rows)]`).
        top_k (`int`, *optional*): keep the rows of rank below `top_k` only; never rows without a weight.

    Raises:
        ValueError: if `top_k` is not between 1 and the number of rows.
    """
    if top_k is not None and not 1 <= top_k <= len(rows):
        raise ValueError(f"`top_k` must lie between 1 and the number of rows ({len(rows)}), got {top_k}.")
    ranks = data_ranks(weights)
    out = rows.add_column(SAMPLE_ID, list(range(len(rows))))
    values = [None if weight != weight else weight for weight in weights.tolist()]
    out = out.add_column(DATA_WEIGHT, values, feature=Value("float32")).add_column(DATA_RANK, ranks.tolist())
    if top_k is None:
        return out
    kept = torch.from_numpy(ranks < top_k) & ~torch.isnan(weights)
    return out.select(kept.nonzero().squeeze(1).tolist())


def given_weights(train: Dataset) -> Tensor:
    """Weights of the column `data_weight`, float32 `[rows]`; 0 where missing.

    Raises:
        ValueError, TypeError: if they are no weights.
    """
    values = train.with_format(None)[DATA_WEIGHT][:]
    if any(isinstance(value, bool) or not isinstance(value, int | float | None) for value in values):
        raise TypeError(f"`data_weight` of `train_dataset` must be numbers, got {values[0]!r} in the first row.")
    weights = torch.tensor([float("nan") if value is None else value for value in values], dtype=torch.float32)
    known = weights[~torch.isnan(weights)]
    if len(known) == 0 or not bool(torch.isfinite(known).all()) or float(known.min()) < 0 or float(known.sum()) <= 0:
        raise ValueError(
            "`data_weight` of `train_dataset` must be finite numbers of at least 0, and not 0 for all rows (missing "
            "for rows that were never trained on)."
        )
    return torch.nan_to_num(weights, nan=0.0)


def write_for(tool: str, rows: Dataset, path: Path, name: str) -> list[Path]:
    """Write rows for another tool, as JSON lines, and the config entry beside them; returns the files written.

    Args:
        tool (`str`): "llama-factory" or "axolotl".
        rows (`Dataset`): at least one.
        path (`Path`): of the data file; ends in `.jsonl`.
        name (`str`): of the data set in LLaMA-Factory's `dataset_info.json`.

    Raises:
        ValueError: if the file has another ending, or the rows' columns are not known to the tool.
    """
    if path.suffix != ".jsonl":
        raise ValueError(
            f"Data for {tool} is written as JSON lines: `--output` must end in .jsonl, got {str(path)!r}."
        )
    layout = layout_of(rows)
    entries = yaml.safe_load(resources.files("trl_bilevel.data").joinpath("text/tools.yaml").read_text())[tool]
    if layout not in entries:
        raise ValueError(
            f"The rows have the columns {rows.column_names}, which cannot be told to another tool. It takes "
            "`messages`, `conversations`, `prompt` and `completion`, or `text`."
        )
    if layout == PAIRS and not isinstance(rows[0]["prompt"], str):
        joined = rows.map(lambda row: {MESSAGES: [*row["prompt"], *row["completion"]]}, desc="Joining messages")
        rows, layout = joined.remove_columns(["prompt", "completion"]), MESSAGES
    entry = entries[layout]
    if tool == "axolotl":
        facts = path.with_suffix(".axolotl.yaml")
        document = {"datasets": [{"path": str(path), "ds_type": "json"} | entry]}
        text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
    else:
        facts = path.with_name("dataset_info.json")
        if layout == CONVERSATIONS and "system" in rows.column_names:
            entry["columns"]["system"] = "system"
        document = _other_entries(facts) | {name: {"file_name": path.name} | entry}
        text = json.dumps(document, indent=2) + "\n"
    atomically(path, lambda file: rows.to_json(str(file)))
    atomically(facts, lambda file: file.write_text(text, encoding="utf-8"))
    return [path, facts]


def _other_entries(path: Path) -> dict[str, Any]:
    """What `dataset_info.json` says of other data sets, to be kept."""
    try:
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"{path} is there already, and is no JSON: {error}. Write to another folder.") from error
    if not isinstance(known, dict):
        raise ValueError(f"{path} is there already, and lists no data sets. Write to another folder.")
    return known
