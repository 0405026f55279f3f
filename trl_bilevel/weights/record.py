"""What choosing leaves on disk for a report: scores, weights, and the trusted rows that were held back."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from ..core.statistics import data_ranks
from ..data.files import atomically, write_json
from ..data.identity import DATA_RANK, DATA_WEIGHT, SAMPLE_ID
from .choose import Choice

RUN_FILE, PILOT_FILE = "run.json", "pilot.json"
SCORES_FILE, WEIGHTS_FILE = "scores.parquet", "weights.parquet"
# Of `pilot.json`; raised when older code could not read it any more.
FORMAT = 1
# Trusted rows and characters of each that are kept as text.
TRUSTED_TEXTS, TEXT_LENGTH = 200, 1500


def run_record(facts: Mapping[str, Any], rows_file: str) -> dict[str, Any]:
    """`run.json` of a choice that no training followed, from facts of its `RowWeights`."""
    seconds = facts.get("seconds", 0.0)
    own = ("model", "device", "processes", "versions", "settings")
    data = {"rows_trained_on": facts["rows_kept"]} | {k: facts[k] for k in ("rows", "fingerprint", "validation")}
    return {
        "format": FORMAT,
        "kind": "rank",
        "finished": True,
        **{name: facts[name] for name in own},
        "data": data,
        "weights": {"learned": True, "given": False},
        "seconds": {"selection": seconds, "total": seconds},
        "rows_file": rows_file,
    }


def write_pilot(folder: Path, choice: Choice, decode: Callable[..., str]) -> None:
    """Write `pilot.json` and `scores.parquet`; `decode` makes text of token ids (a tokenizer's)."""
    entries: list[dict[str, Any]] = []
    held = choice.held_back
    scores, shares = choice.trusted_scores.tolist(), held.shares().tolist()
    for (name, place), score, share in zip(held.places(), scores, shares, strict=True):
        entry: dict[str, Any] = {"set": name, "score": score[0], "ending": score[1], "share": share}
        if len(entries) < TRUSTED_TEXTS:
            entry |= row_texts(held.sets[name].dataset[place], decode)
        entries.append(entry)
    known = choice.scores[:, 0].isfinite()
    table = {
        SAMPLE_ID: pa.array(known.nonzero().squeeze(1).numpy()),
        "score": _column(choice.scores[known][:, 0]),
        "ending": _column(choice.scores[known][:, 1]),
    }
    told = {"format": FORMAT, "seconds": choice.facts["pilot_seconds"], "trusted": entries}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / PILOT_FILE, {k: choice.facts[k] for k in ("steps", "learning_rate", "rows_scored")} | told)
    _write_table(folder / SCORES_FILE, table)


def write_weights(folder: Path, weights: Tensor) -> None:
    """Write `weights.parquet`: weight and rank of every row of the caller."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_table(folder / WEIGHTS_FILE, {DATA_WEIGHT: _column(weights), DATA_RANK: pa.array(data_ranks(weights))})


def row_texts(row: Mapping[str, Any], decode: Callable[..., str], limit: int = TEXT_LENGTH) -> dict[str, str]:
    """Prompt and answer of a prepared row."""
    pairs = list(zip(row["input_ids"], row["labels"], strict=True))
    first = next((n for n, (_, label) in enumerate(pairs) if label != -100), len(pairs))
    parts = {"prompt": [i for i, _ in pairs[:first]], "answer": [i for i, label in pairs if label != -100]}
    return {name: decode(ids, skip_special_tokens=True)[:limit] for name, ids in parts.items()}


def _column(values: Tensor) -> pa.Array:
    return pa.array(values.detach().float().cpu().numpy(), from_pandas=True)


def _write_table(path: Path, columns: Mapping[str, pa.Array]) -> None:
    atomically(path, lambda file: pq.write_table(pa.table(dict(columns)), file))
