"""What a self-refining run remembers of its rounds: the way back, the ledger, the responses. No trainer in here."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..core.implicit import Decision
from ..data.files import atomically, finite
from ..estimators import Estimator

LEDGER_FILE = "ledger.jsonl"
RESPONSES_FOLDER = "responses"
STATE_FILE = "rounds.safetensors"
BUFFER_FILE = "responses-rank{rank}.safetensors"
SUMMARY_FILE = "rounds.json"
# Of these files; raised when older code could not read them any more.
FORMAT = 1


class Snapshot:
    """Values of the trainable parameters, of the optimizer and of the responses' estimator, to go back to.

    Costs one more copy of the trainable parameters and of their optimizer state.

    Args:
        tensors: values by name.
        plain: what the optimizer's state holds beside tensors, by name (bitsandbytes counts steps in integers).
    """

    def __init__(self, tensors: dict[str, Tensor], plain: dict[str, Any]):
        self.tensors = tensors
        self.plain = plain

    @classmethod
    def take(cls, parameters: Sequence[Tensor], optimizer: Any, estimator: Estimator) -> Snapshot:
        """Copy the present values."""
        tensors = {f"parameter.{i}": p.detach() for i, p in enumerate(parameters)}
        tensors |= {f"estimator.{name}": value for name, value in estimator.tensors().items()}
        state = _flat(optimizer.state_dict()["state"], "optimizer")
        tensors |= {name: value for name, value in state.items() if isinstance(value, Tensor)}
        plain = {name: value for name, value in state.items() if not isinstance(value, Tensor)}
        return cls({name: value.clone() for name, value in tensors.items()}, plain)

    @torch.no_grad()
    def restore(self, parameters: Sequence[Tensor], optimizer: Any, estimator: Estimator) -> None:
        """Put the values back, bit for bit."""
        for i, parameter in enumerate(parameters):
            parameter.copy_(self.tensors[f"parameter.{i}"])
        # Cloned: the optimizer goes on to change what it was given, in place.
        saved = {name: value.clone() for name, value in self.tensors.items() if name.startswith("optimizer/")}
        state = _nested(saved | self.plain, "optimizer")
        optimizer.load_state_dict(
            {"state": {int(k): v for k, v in state.items()}, "param_groups": optimizer.state_dict()["param_groups"]}
        )
        estimator.load_tensors(_with_prefix(self.tensors, "estimator."))


@dataclass
class Rounds:
    """State of a run at any point of a round.

    Attributes:
        incoming (`Tensor` float32 `[n]`, *optional*): losses of the selection rows under the model that the present
            round started from, or under the present model between rounds.
        snapshot (`Snapshot`, *optional*): the way back, within a round.
        rejected (`int`): rounds in a row that were rolled back.
        generation (`dict`): what is known of the round's responses.
        ledger (`list[dict]`): entries of the finished rounds.
    """

    incoming: Tensor | None = None
    snapshot: Snapshot | None = None
    rejected: int = 0
    generation: dict[str, Any] = field(default_factory=dict)
    ledger: list[dict[str, Any]] = field(default_factory=list)

    def close(self, decision: Decision, trained: Tensor, **facts: Any) -> dict[str, Any]:
        """End the round: write the ledger entry, and count."""
        entry = {"round": len(self.ledger), **facts, **self.generation, **asdict(decision)}
        self.ledger.append(entry)
        self.rejected = 0 if decision.kept else self.rejected + 1
        self.incoming = trained if decision.kept else self.incoming
        self.snapshot = None
        self.generation = {}
        return entry

    def save(
        self,
        folder: str | os.PathLike[str],
        buffer: Sequence[Mapping[str, Any]],
        extra: Mapping[str, Tensor],
        rank: int = 0,
        shape: Mapping[str, Any] | None = None,
    ) -> None:
        """Write the state into a checkpoint, each file atomically.

        Args:
            folder: of the checkpoint.
            buffer: this process's responses that are still to be trained on, as TRL holds them; none between rounds.
            extra: further tensors by name.
            rank (`int`): of this process. The first one writes the state, each one its responses.
            shape: settings that must not change on resuming.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        parts = {f"{n}.{k}": v for n, part in enumerate(buffer) for k, v in part.items() if isinstance(v, Tensor)}
        atomically(folder / BUFFER_FILE.format(rank=rank), lambda path: save_file(_on_cpu(parts), path))
        if rank > 0:
            return
        tensors: dict[str, Tensor] = {} if self.incoming is None else {"incoming": self.incoming}
        if self.snapshot is not None:
            tensors |= {f"snapshot.{name}": value for name, value in self.snapshot.tensors.items()}
        tensors |= {f"extra.{name}": value for name, value in extra.items()}
        summary = {
            "format": FORMAT,
            "rejected": self.rejected,
            "generation": self.generation,
            "ledger": self.ledger,
            "in_round": self.snapshot is not None,
            "shape": dict(shape or {}),
            "plain": {} if self.snapshot is None else self.snapshot.plain,
        }
        atomically(folder / STATE_FILE, lambda path: save_file(_on_cpu(tensors), path))
        atomically(folder / SUMMARY_FILE, lambda path: path.write_text(json.dumps(summary, indent=1)))

    def load(
        self,
        folder: str | os.PathLike[str],
        device: torch.device,
        rank: int = 0,
        shape: Mapping[str, Any] | None = None,
    ) -> tuple[list[dict[str, Tensor]] | None, dict[str, Tensor]]:
        """Restore what `save` wrote; returns the responses still to be trained on, and the extra tensors.

        Raises:
            FileNotFoundError: if the folder has no such state.
            ValueError: if it is damaged, or its rounds have another shape than this run's.
        """
        folder = Path(folder)
        files = (SUMMARY_FILE, STATE_FILE, BUFFER_FILE.format(rank=rank))
        missing = [name for name in files if not (folder / name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{folder} has no {missing[0]}: it is not a checkpoint of a self-refining run of as many processes."
            )
        try:
            summary = json.loads((folder / SUMMARY_FILE).read_text())
            tensors, parts = (
                {name: value.to(device) for name, value in load_file(folder / file).items()} for file in files[1:]
            )
        except (json.JSONDecodeError, SafetensorError) as error:
            raise ValueError(f"The round state in {folder} is damaged ({error}). Resume from another one.") from error
        if summary.get("format") != FORMAT:
            raise ValueError(
                f"The round state in {folder} has format {summary.get('format')!r}, this version reads {FORMAT}. "
                "Resume with the version of trl-bilevel that wrote it."
            )
        saved = summary.get("shape", {})
        changed = [f"{k}: {saved[k]!r} then, {v!r} now" for k, v in (shape or {}).items() if saved.get(k, v) != v]
        if changed:
            raise ValueError(
                f"The rounds in {folder} have another shape ({'; '.join(changed)}). Resume with the same settings and "
                "number of processes."
            )
        self.rejected, self.generation, self.ledger = summary["rejected"], summary["generation"], summary["ledger"]
        self.incoming = tensors["incoming"].cpu() if "incoming" in tensors else None
        self.snapshot = Snapshot(_with_prefix(tensors, "snapshot."), summary["plain"]) if summary["in_round"] else None
        buffer: dict[int, dict[str, Tensor]] = {}
        for name, value in parts.items():
            number, key = name.split(".", 1)
            buffer.setdefault(int(number), {})[key] = value
        return [buffer[number] for number in sorted(buffer)] or None, _with_prefix(tensors, "extra.")

    def write_ledger(self, folder: str | os.PathLike[str]) -> None:
        """Write all entries as JSON lines, atomically."""
        lines = "".join(json.dumps(finite(entry)) + "\n" for entry in self.ledger)
        atomically(Path(folder) / LEDGER_FILE, lambda path: path.write_text(lines))


def write_responses(folder: str | os.PathLike[str], number: int, rows: Mapping[str, list[Any]]) -> None:
    """Write the responses of a round as parquet, atomically."""
    target = Path(folder) / RESPONSES_FOLDER / f"round-{number:04d}.parquet"
    target.parent.mkdir(parents=True, exist_ok=True)
    atomically(target, lambda path: Dataset.from_dict(dict(rows)).to_parquet(path))


def _flat(state: Mapping[Any, Any], prefix: str) -> dict[str, Any]:
    """A nested dict as one of paths; keys must not hold a slash."""
    out: dict[str, Any] = {}
    for key, value in state.items():
        path = f"{prefix}/{key}"
        out |= _flat(value, path) if isinstance(value, Mapping) else {path: value}
    return out


def _nested(flat: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """What `_flat` was given, with keys as text."""
    out: dict[str, Any] = {}
    for path, value in flat.items():
        *folders, name = path.removeprefix(f"{prefix}/").split("/")
        inner = out
        for folder in folders:
            inner = inner.setdefault(folder, {})
        inner[name] = value
    return out


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # Cloned: safetensors refuses tensors that share memory, as slices of one generation batch do.
    return {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
