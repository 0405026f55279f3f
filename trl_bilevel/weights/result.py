"""What `learn_weights` gives back: a weight per row, and what it rests on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..core.resampling import systematic_resample
from ..data.export import weighted_dataset
from ..data.files import atomically, write_json
from ..data.identity import fingerprint
from .choose import Choice

WEIGHTS_FILE, FACTS_FILE = "weights.safetensors", "weights.json"
# Of these files; raised when older code could not read them any more.
FORMAT = 1


@dataclass
class RowWeights:
    """Weights of training rows.

    Attributes:
        values (`Tensor` float32 `[rows]`): in the caller's order, mean one; NaN for rows that have no token to learn
            from within `max_length`.
        scores (`Tensor` float32 `[rows]`): what the weights follow from, higher is better; NaN where the weight is.
        facts (`dict`): what produced them: settings, model, seed, rows, versions, seconds.
        rows (`Dataset`, *optional*): the caller's rows.
        choice (`Choice`, *optional*): all that choosing found out; not saved.
        decode (callable, *optional*): makes text of token ids; not saved.
        scorer (`RowScorer`, *optional*): weighs further rows by the same measure; saved by its own `save`. None with a
            pilot or a `formatting_func`.
    """

    values: Tensor
    scores: Tensor
    facts: dict[str, Any] = field(default_factory=dict)
    rows: Dataset | None = None
    choice: Choice | None = None
    decode: Callable[..., str] | None = None
    scorer: Any = None

    def __len__(self) -> int:
        """Number of the caller's rows."""
        return len(self.values)

    def to_dataset(self, top_k: int | None = None) -> Dataset:
        """The caller's rows with `sample_id`, `data_weight` (missing where NaN) and `data_rank` (0: highest weight).

        Args:
            top_k (`int`, *optional*): only the rows of the `top_k` highest weights, in the caller's order.

        Raises:
            ValueError: if the weights were loaded without rows, or `top_k` is out of range.
        """
        if self.rows is None:
            raise ValueError("These weights have no rows: load them with `RowWeights.load(folder, rows)`.")
        return weighted_dataset(self.rows, self.values, top_k)

    def resample(self, count: int | None = None, seed: int = 42) -> Dataset:
        """The caller's rows as often as their weights say, in random order: for any trainer that knows no weights.

        Args:
            count (`int`, *optional*): rows to draw; by default as many as have a weight.
            seed (`int`): of the draw. Each row comes the floor or the ceiling of its expected number of times.
        """
        count = int((~torch.isnan(self.values)).sum()) if count is None else count
        generator = torch.Generator().manual_seed(seed)
        return self.to_dataset().select(systematic_resample(torch.nan_to_num(self.values), count, generator).tolist())

    def save(self, folder: str | Path) -> None:
        """Write `weights.safetensors` and `weights.json` into a folder, each whole or not at all; no text of a row."""
        write_files(Path(folder), {"values": self.values, "scores": self.scores}, {"facts": self.facts})

    @classmethod
    def load(cls, folder: str | Path, rows: Dataset | None = None) -> RowWeights:
        """Read what `save` wrote.

        Args:
            rows (`Dataset`, *optional*): the rows that were weighed, for `to_dataset`.

        Raises:
            FileNotFoundError: if the folder holds no weights.
            ValueError: if they are damaged, of another version, or of other rows.
        """
        told, tensors = read_files(Path(folder))
        facts = told["facts"]
        if rows is not None and (len(rows) != len(tensors["values"]) or fingerprint(rows) != facts.get("fingerprint")):
            raise ValueError(
                f"The weights in {folder} are of {len(tensors['values'])} other rows than the {len(rows)} given. Give "
                "the rows that were weighed, unchanged and in the same order."
            )
        return cls(tensors["values"], tensors["scores"], facts, rows)


def write_files(folder: Path, tensors: dict[str, Tensor], told: dict[str, Any]) -> None:
    """Write `weights.safetensors` and `weights.json` into a folder, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    held = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    atomically(folder / WEIGHTS_FILE, lambda path: save_file(held, path))
    write_json(folder / FACTS_FILE, {"format": FORMAT} | told)


def read_files(folder: Path, missing: str = "") -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `weights.json` and `weights.safetensors` of a folder hold; `missing`: what to say if they are not there."""
    if not (folder / WEIGHTS_FILE).is_file() or not (folder / FACTS_FILE).is_file():
        raise FileNotFoundError(f"{folder} has no weights ({WEIGHTS_FILE}, {FACTS_FILE}){missing}.")
    try:
        told = json.loads((folder / FACTS_FILE).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS_FILE)
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"The weights in {folder} are damaged ({error}). Use other ones.") from error
    if not isinstance(told, dict) or not {"facts", "values", "scores"} <= {*told, *tensors}:
        raise ValueError(f"The weights in {folder} are damaged (parts are missing). Use other ones.")
    if told.get("format") != FORMAT:
        raise ValueError(
            f"The weights in {folder} have format {told.get('format')!r}, this version reads {FORMAT}. Use the "
            "version of trl-bilevel that wrote them."
        )
    return told, tensors


def equal_weights(kept: Tensor) -> Tensor:
    """Weight one for the rows that count, NaN for the others, float32 `[N]`."""
    return torch.where(kept, 1.0, torch.nan)
