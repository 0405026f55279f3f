"""The rounds of a self-refining run: decisions, and responses beside the offline answers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from ..data.formats import question_and_answer
from ..data.private import RESPONSES, find_private
from .rows import read_rows
from .run import Run
from .text import clean

# Questions that are shown of a round, and of all rounds; characters of a response.
PER_ROUND, IN_ALL = 6, 48
QUESTION, RESPONSE = 500, 500
# What is told of a round: entries of the ledger.
FACTS = {
    "questions": "questions asked",
    "responses": "responses",
    "responses_cut": "cut at the length limit",
    "responses_empty": "empty",
    "score_mean": "mean score",
    "score_std_within_group": "spread of the scores of a question",
    "weight_std_within_group": "spread of the weights of a question",
    "eval_loss": "eval loss after the round",
    "seconds": "seconds",
}


def rounds_of(run: Run) -> list[dict[str, Any]]:
    """For each round its ledger entry, its facts in words, and the questions that its responses answer."""
    out: list[dict[str, Any]] = []
    share = min(PER_ROUND, max(1, IN_ALL // max(1, len(run.ledger))))
    for entry in run.ledger:
        number = entry.get("round", len(out))
        folder = find_private(run.folder, RESPONSES)
        path = folder / f"round-{number:04d}.parquet" if isinstance(number, int) else folder
        questions, count = _questions(run, path, share)
        facts = {"number": clean(number), "facts": _facts(entry), "questions": questions, "all_questions": count}
        out.append({"entry": entry} | facts)
    return out


def _facts(entry: Mapping[str, Any]) -> list[tuple[str, str]]:
    shown = [(label, entry[name]) for name, label in FACTS.items() if entry.get(name) is not None]
    return [(label, f"{value:.4g}" if isinstance(value, float) else clean(value)) for label, value in shown]


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
    out = []
    for key in chosen:
        group = sorted(groups[key], key=lambda row: -_number(row.get("weight"), -1.0))
        responses = [
            {
                "text": clean(row.get("response", ""), RESPONSE),
                "weight": _shown(row.get("weight")),
                "score": _shown(row.get("score")),
                "cut": bool(row.get("cut")),
            }
            for row in group
        ]
        asked = {
            "number": clean(key),
            "question": clean(group[0].get("prompt", ""), QUESTION),
            "weight": _shown(group[0].get("question_weight")),
            "offline": clean(question_and_answer(offline[key])[1], RESPONSE) if key in offline else None,
            "responses": responses,
        }
        out.append(asked)
    return out, len(groups)


def _number(value: Any, otherwise: float) -> float:
    return float(value) if isinstance(value, int | float) and np.isfinite(value) else otherwise


def _shown(value: Any) -> str:
    return f"{value:.3f}" if np.isfinite(_number(value, np.nan)) else "none"
