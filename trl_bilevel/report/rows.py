"""The rows that a report shows: training rows of most and of least weight, where the weight went, and responses."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.dataset import dataset as parquet

from ..data.formats import question_and_answer
from ..data.private import RESPONSES, find_private
from .run import Run
from .text import clean

# Rows of each kind that are embedded; up to three times as many are all embedded.
SAMPLE = 500
# Characters of a question and of an answer that are embedded.
QUESTION, ANSWER = 400, 600
# A column is categorical if it has at most so many values in the rows looked at first.
CATEGORIES, LOOKED_AT = 40, 2000
SHOWN_CATEGORIES = 12
CATEGORY_COLUMNS = 4
# Questions that are shown of a round, and of all rounds.
PER_ROUND, IN_ALL = 6, 48
OWN_COLUMNS = ("sample_id", "data_weight", "data_rank")


class Share(NamedTuple):
    """The rows of one value of a column: how many, their share of all rows and of the weight, their mean weight."""

    value: str
    rows: int
    of_rows: float
    of_weight: float
    mean: float


class Category(NamedTuple):
    """Where the weight went, by the values of a column: those of most rows first; the rest is one, "(N others)"."""

    column: str
    shares: list[Share]


def chosen_rows(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the rows to embed, by rank, int64, and which of them make up the random sample (bool)."""
    ranks = run.ranks
    order = np.argsort(ranks)
    live = order[~np.isnan(run.weights[order])]  # type: ignore[index]
    if len(order) <= 3 * SAMPLE:
        return order, np.ones(len(order), dtype=bool)
    random = np.random.default_rng(0).choice(order, SAMPLE, replace=False)
    chosen = np.unique(np.concatenate([live[:SAMPLE], live[-SAMPLE:], random]))
    chosen = chosen[np.argsort(ranks[chosen])]
    return chosen, np.isin(chosen, random)


def read_rows(path: Path, numbers: Sequence[int]) -> dict[int, dict[str, Any]]:
    """Some rows of a parquet file by number, as dicts."""
    file, wanted = parquet(path), sorted(numbers)
    names = [name for name in file.schema.names if name not in ("input_ids", "labels", "attention_mask")]
    return dict(zip(wanted, file.take(wanted, columns=names).to_pylist(), strict=True))


def row_table(run: Run, categories: Sequence[Category]) -> dict[str, Any]:
    """What the table of rows shows, as columns of equal length, for `script_json`."""
    assert run.weights is not None
    numbers, sampled = chosen_rows(run)
    rows = {} if run.rows_file is None else read_rows(run.rows_file, numbers.tolist())
    scores = np.full(len(numbers), np.nan) if run.scores is None else run.scores[numbers]
    # More digits than a reader compares make the file longer.
    weights, scores = np.round(run.weights[numbers], 6), np.round(scores, 6)
    texts = [question_and_answer(rows[n]) if n in rows else ("", "") for n in numbers.tolist()]
    labels = [c.column for c in categories]
    return {
        "row": numbers.tolist(),
        "weight": weights.tolist(),
        "rank": (run.ranks[numbers] + 1).tolist(),
        "score": scores.tolist(),
        "random": sampled.astype(int).tolist(),
        "question": [clean(question, QUESTION) for question, _ in texts],
        "answer": [clean(answer, ANSWER) for _, answer in texts],
        "labels": {name: [clean(rows.get(n, {}).get(name, ""), 60) for n in numbers.tolist()] for name in labels},
    }


def categories_of(run: Run) -> list[Category]:
    """The categorical columns of the rows; that of a group selector first, however many values it has."""
    if run.rows_file is None or run.weights is None or not len(run.live):
        return []
    group = run.told("settings", "selector_group_column")
    with pq.ParquetFile(run.rows_file) as file:
        names = [field.name for field in file.schema_arrow if _may_be_categorical(field)]
        first = next(file.iter_batches(batch_size=LOOKED_AT, columns=names), None) if names else None
        if first is None:
            return []
        names = [n for n in names if n == group or 2 <= len(first[n].unique()) <= min(CATEGORIES, first.num_rows // 2)]
        names.sort(key=lambda name: (name != group, name != "source"))
        found = [_category(name, file.read([name])[name], run.weights) for name in names[:CATEGORY_COLUMNS]]
    return [category for category in found if len(category.shares) > 1]


def _may_be_categorical(field: pa.Field) -> bool:
    kinds = ("is_string", "is_large_string", "is_dictionary", "is_boolean", "is_integer")
    plain = any(getattr(pa.types, kind)(field.type) for kind in kinds)
    return plain and field.name not in (*OWN_COLUMNS, "prompt", "completion", "text")


def _category(column: str, values: pa.ChunkedArray, weights: np.ndarray) -> Category:
    live = np.flatnonzero(~np.isnan(weights))
    texts = values.take(pa.array(live)).to_pylist()
    texts = np.array([clean("(missing)" if value is None else value, 60) for value in texts], dtype=object)
    kinds, place, counts = np.unique(texts, return_inverse=True, return_counts=True)
    mass = np.bincount(place, weights[live])
    order = np.argsort(-counts, kind="stable")
    groups = [(kinds[n], order[k : k + 1]) for k, n in enumerate(order[:SHOWN_CATEGORIES])]
    if len(others := order[SHOWN_CATEGORIES:]):
        groups.append((f"({len(others)} others)", others))
    shares = []
    for label, members in groups:
        count, weight = int(counts[members].sum()), float(mass[members].sum())
        shares.append(Share(label, count, count / len(live), weight / (mass.sum() or 1.0), weight / count))
    return Category(column, shares)


def rounds_of(run: Run) -> list[dict[str, Any]]:
    """For each round its ledger `entry`, some `questions` that its responses answer, and the number of all of them."""
    share = min(PER_ROUND, max(1, IN_ALL // max(1, len(run.ledger))))
    out = []
    for place, entry in enumerate(run.ledger):
        number = entry.get("round", place)
        questions, count = _questions(run, find_private(run.folder, RESPONSES) / f"round-{number:04d}.parquet", share)
        out.append({"number": number, "entry": entry, "questions": questions, "all_questions": count})
    return out


def _questions(run: Run, path: Path, limit: int) -> tuple[list[dict[str, Any]], int]:
    """The questions of a round whose responses differ most in weight, and how many there are in all."""
    try:
        rows = pq.read_table(path).to_pylist()
    except (OSError, ValueError):
        rows = []
    groups: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["sample_id"], []).append(row)
    spread = {key: np.std([_weight(row, 0.0) for row in group]) for key, group in groups.items()}
    chosen = sorted(groups, key=lambda key: -spread[key])[:limit]
    offline: dict[int, dict[str, Any]] = {}
    if run.told("weights", "asks_own_rows") is not False and run.rows_file is not None:
        offline = read_rows(run.rows_file, chosen)
    questions = [
        {
            "number": key,
            "offline": question_and_answer(offline[key])[1] if key in offline else None,
            "responses": sorted(groups[key], key=lambda row: -_weight(row, -1.0)),
        }
        for key in chosen
    ]
    return questions, len(groups)


def _weight(row: dict[str, Any], otherwise: float) -> float:
    value = row["weight"]
    return float(value) if value is not None and np.isfinite(value) else otherwise
