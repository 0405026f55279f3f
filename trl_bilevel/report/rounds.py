"""The rounds of a self-refining run: decisions, and responses beside the offline answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from ..data.formats import question_and_answer
from ..data.private import RESPONSES, find_private
from .rows import read_rows
from .run import Run

# Questions that are shown of a round, and of all rounds.
PER_ROUND, IN_ALL = 6, 48


def rounds_of(run: Run) -> list[dict[str, Any]]:
    """For each round its ledger `entry`, some `questions` that its responses answer, and the number of all of them."""
    share = min(PER_ROUND, max(1, IN_ALL // max(1, len(run.ledger))))
    folder = find_private(run.folder, RESPONSES)
    out = []
    for place, entry in enumerate(run.ledger):
        number = entry.get("round", place)
        path = folder / f"round-{number:04d}.parquet" if isinstance(number, int) else folder
        questions, count = _questions(run, path, share)
        out.append({"number": number, "entry": entry, "questions": questions, "all_questions": count})
    return out


def _questions(run: Run, path: Path, limit: int) -> tuple[list[dict[str, Any]], int]:
    """The questions of a round whose responses differ most in weight, and how many there are in all."""
    try:
        rows = pq.read_table(path).to_pylist() if path.is_file() else []
    except (OSError, ValueError):
        rows = []
    groups: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row.get("sample_id"), []).append(row)
    spread = {key: np.std([_number(row.get("weight"), 0.0) for row in group]) for key, group in groups.items()}
    chosen = sorted(groups, key=lambda key: -spread[key])[:limit]
    offline: dict[int, dict[str, Any]] = {}
    if run.told("weights", "asks_own_rows") is not False and run.rows_file is not None:
        offline = read_rows(run.rows_file, [key for key in chosen if isinstance(key, int)])
    questions = [
        {
            "number": key,
            "offline": question_and_answer(offline[key])[1] if key in offline else None,
            "responses": sorted(groups[key], key=lambda row: -_number(row.get("weight"), -1.0)),
        }
        for key in chosen
    ]
    return questions, len(groups)


def _number(value: Any, otherwise: float) -> float:
    return float(value) if isinstance(value, int | float) and np.isfinite(value) else otherwise
