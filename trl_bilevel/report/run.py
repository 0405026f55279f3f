"""What a run left on disk, read back. No torch in here: a report is made in seconds."""

import json
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from ..core.statistics import data_ranks
from ..data.files import read_json
from ..data.private import LEDGER, RECORD, find_private
from ..data.private import WEIGHTED as WEIGHTED_FILE

FORMAT = 1
WEIGHT = "data_weight"


@dataclass
class Run:
    """A run's folder, as far as it could be read."""

    folder: Path
    record: dict[str, Any] = field(default_factory=dict)  # `_record/run.json`; empty if there is none
    pilot: dict[str, Any] = field(default_factory=dict)  # `_record/pilot.json`
    history: list[dict[str, Any]] = field(default_factory=list)  # the trainer's log
    weights: np.ndarray | None = None  # float64 [N], of the training rows, mean one; NaN for rows not trained on
    scores: np.ndarray | None = None  # float64 [N]; NaN for rows without a score
    rows_file: Path | None = None  # parquet file with the rows' texts, whose weights are those of this run
    ledger: list[dict[str, Any]] = field(default_factory=list)  # rounds of a self-refining run
    wrong: dict[str, str] = field(default_factory=dict)  # files of rows that are left out, and why (see `mismatch`)

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name or "run"

    def told(self, *names: str, otherwise: Any = None) -> Any:
        """What the record says under a path of names; `otherwise` if it does not."""
        found: Any = self.record
        for name in names:
            found = found.get(name) if isinstance(found, dict) else None
        return otherwise if found is None else found

    @property
    def ranked(self) -> bool:
        """True if weights were all that was asked for: nothing was trained."""
        return self.told("kind") == "rank"

    @property
    def finished(self) -> bool:
        """True if training came to its end."""
        return bool(self.record.get("finished", not self.record and self.rows_file is not None))

    @cached_property
    def live(self) -> np.ndarray:
        """Weights of the rows that are trained on, float64 `[n]`; empty without weights."""
        return np.empty(0) if self.weights is None else self.weights[~np.isnan(self.weights)]

    @cached_property
    def ranks(self) -> np.ndarray:
        """Rank of each row, int64 `[N]`: 0 is the highest weight, ties in row order."""
        assert self.weights is not None
        return data_ranks(self.weights)

    @property
    def learned(self) -> bool:
        """True if the weights were learned in this run (else they were given, or there are none)."""
        return bool(self.told("weights", "learned", otherwise=self.weights is not None))

    @property
    def trusted(self) -> list[dict[str, Any]]:
        """Trusted rows that the pilot held back and scored."""
        return [row for row in self.pilot.get("trusted", []) if isinstance(row.get("score"), int | float)]

    @cached_property
    def trusted_scores(self) -> np.ndarray:
        """Scores of the trusted rows that the pilot held back, float64 `[c]`."""
        return np.array([row["score"] for row in self.trusted], dtype=float)

    def points(self, name: str) -> list[tuple[int, float]]:
        """The logged values of a quantity, by step."""
        found = {e["step"]: e[name] for e in self.history if isinstance(e.get(name), int | float) and "step" in e}
        return [(step, float(value)) for step, value in sorted(found.items()) if np.isfinite(value)]

    def validation_points(self, of: str | None = None) -> list[tuple[int, float]]:
        """Validation loss by step: of one set, or the weighted total."""
        entries = self.told("validation", otherwise=[])
        values = [(e["step"], e["total"] if of is None else e["sets"].get(of)) for e in entries]
        return [(step, float(value)) for step, value in values if value is not None]


def load_run(folder: str | Path, rows_file: str | Path | None = None) -> Run:
    """Read a run's folder; `rows_file` holds its rows, if that is not `weighted.parquet` in the folder."""
    folder = Path(folder)
    if not folder.is_dir():
        hint = " It is a file: give the folder that holds it." if folder.is_file() else ""
        raise FileNotFoundError(f"There is no run folder {folder}.{hint} Give the `output_dir` of a run.")
    run = Run(folder, read_json(folder / RECORD / "run.json"), read_json(folder / RECORD / "pilot.json"))
    for part in (run.record, run.pilot):
        if part and part.get("format") != FORMAT:
            raise ValueError(
                f"The run record in {folder} has format {part.get('format')!r}, this version reads {FORMAT}. Make the "
                "report with the version of trl-bilevel that wrote it."
            )
    files = _rows_files(run, rows_file)
    run.history = run.told("log_history", otherwise=[])
    run.ledger = _ledger(find_private(folder, LEDGER))
    run.weights = _weights(run, files)
    found = {path: mismatch(run, path) for path in files}
    run.rows_file = next((path for path, wrong in found.items() if wrong is None), None)
    run.wrong = {path.name: wrong for path, wrong in found.items() if wrong is not None}
    run.scores = _scores(run)
    if not (run.record or run.pilot or run.ledger or run.weights is not None):
        raise ValueError(
            f"{folder} holds no run: no {RECORD}/run.json, no {WEIGHTED_FILE}, no ledger.jsonl. Give the `output_dir` "
            "of `trl-bilevel sft`, `refine` or `rank`, or of one of their trainers."
        )
    return run


def mismatch(run: Run, path: Path) -> str | None:
    """What is wrong with a file as that of the run's rows, to follow its name; None if nothing is.

    Its weights tell: a folder that was used before may hold the rows of an earlier run, and as many of them.
    """
    values = _numbers(path, WEIGHT)
    if values is None:
        return f"cannot be read, or has no column {WEIGHT}, by which its rows could be told from others"
    if run.weights is None:
        return "is not of this run, of which no weights are known"
    if len(values) != len(run.weights):
        return f"has {len(values)} rows, the run had {len(run.weights)}"
    # Weights that were given may have another mean, and may have been given to rows that were then dropped.
    known = ~np.isnan(run.weights)
    values, own = (part[known] * (known.sum() / (part[known].sum() or 1.0)) for part in (values, run.weights))
    if not np.allclose(values, own, rtol=1e-5, atol=1e-6):
        return "has other weights than this run: it is of another one"
    return None


def _rows_files(run: Run, given: str | Path | None) -> list[Path]:
    """The files that may hold the run's rows."""
    if given is not None:
        path = Path(given)
        if not path.is_file():
            raise FileNotFoundError(f"There is no file {path} with the weighted rows.")
        if path.suffix != ".parquet":
            raise ValueError(
                f"`rows_file` (`--rows`) must be a .parquet file with the weighted rows, got {str(path)!r}. Convert "
                "it: `datasets.load_dataset('json', data_files=FILE, split='train').to_parquet(...)`."
            )
        return [path]
    noted = run.told("rows_file")
    paths = [find_private(run.folder, WEIGHTED_FILE), *([run.folder / noted] if noted else [])]
    return [path for path in paths if path.suffix == ".parquet" and path.is_file()]


def _weights(run: Run, files: list[Path]) -> np.ndarray | None:
    """Those of the record. The first file of rows speaks for a run without a record, or one that was given them."""
    told = run.told("weights", otherwise={})
    if told and not (told.get("learned") or told.get("given")):
        return None
    own = run.folder / RECORD / "weights.parquet"
    others = [] if told.get("learned") or (run.pilot and not run.record) else files
    found = (_numbers(path, WEIGHT) for path in [own, *others])
    return next((values for values in found if values is not None and len(values)), None)


def _scores(run: Run) -> np.ndarray | None:
    """Scores of the pilot."""
    path = run.folder / RECORD / "scores.parquet"
    ids, values = _numbers(path, "sample_id"), _numbers(path, "score")
    if run.weights is None or ids is None or values is None or ids.max(initial=0) >= len(run.weights):
        return None
    scores = np.full(len(run.weights), np.nan)
    scores[ids.astype(np.int64)] = values
    return scores


def _numbers(path: Path, column: str) -> np.ndarray | None:
    """A column of a parquet file as float64, NaN where missing; None if it is not there or cannot be read."""
    try:
        with pq.ParquetFile(path) as file:
            return file.read([column])[column].to_numpy().astype(np.float64)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _ledger(path: Path) -> list[dict[str, Any]]:
    """The lines that can be read: of a run that was killed, the last may be cut off."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        with suppress(ValueError, RecursionError):
            found.append(json.loads(line))
    return [entry for entry in found if isinstance(entry, dict)]
