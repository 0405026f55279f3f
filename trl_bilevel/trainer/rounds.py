"""What a self-refining run remembers of its rounds: the way back, the ledger, the files. No trainer in here."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback

from ..core.implicit import Decision
from ..data.files import atomically, finite
from ..data.private import LEDGER, private_path
from .checkpoints import WEIGHT_FILES

STATE_FILE = "rounds.safetensors"
BUFFER_FILE = "responses-rank{rank}.safetensors"
SUMMARY_FILE = "rounds.json"
# Settings that a round in the making depends on.
SHAPE = ("steps_per_round", "gradient_accumulation_steps", "per_device_train_batch_size", "num_generations")
# Of these files; raised when older code could not read them any more.
FORMAT = 1


class Snapshot:
    """Values of the trainable parameters and of the optimizer, to go back to.

    Costs one more copy of the trainable parameters and of their optimizer state.

    Args:
        tensors: values by name.
        plain: what the optimizer's state holds beside tensors, by name (bitsandbytes counts steps in integers).
    """

    def __init__(self, tensors: dict[str, Tensor], plain: dict[str, Any]):
        self.tensors = tensors
        self.plain = plain

    @classmethod
    def take(cls, parameters: Sequence[Tensor], optimizer: Any) -> Snapshot:
        """Copy the present values."""
        tensors = {f"parameter.{i}": p.detach() for i, p in enumerate(parameters)}
        state = _flat(optimizer.state_dict()["state"], "optimizer")
        tensors |= {name: value for name, value in state.items() if isinstance(value, Tensor)}
        plain = {name: value for name, value in state.items() if not isinstance(value, Tensor)}
        return cls({name: value.clone() for name, value in tensors.items()}, plain)

    @torch.no_grad()
    def restore(self, parameters: Sequence[Tensor], optimizer: Any) -> None:
        """Put the values back, bit for bit."""
        for i, parameter in enumerate(parameters):
            parameter.copy_(self.tensors[f"parameter.{i}"])
        # Cloned: the optimizer goes on to change what it was given, in place.
        saved = {name: value.clone() for name, value in self.tensors.items() if name.startswith("optimizer/")}
        state = _nested(saved | self.plain, "optimizer")
        optimizer.load_state_dict(
            {"state": {int(k): v for k, v in state.items()}, "param_groups": optimizer.state_dict()["param_groups"]}
        )


@dataclass
class Rounds:
    """State of a run at any point of a round.

    Attributes:
        shape (`dict`): what a round in the making depends on; it must not change on resuming.
        rank (`int`), device: of this process.
        incoming (`Tensor` float32 `[n]`, *optional*): losses of the selection rows under the model that the present
            round started from, or under the present model between rounds.
        snapshot (`Snapshot`, *optional*): the way back, within a round.
        rejected (`int`): rounds in a row that were rolled back.
        generation (`dict`): what is known of the round's responses.
        ledger (`list[dict]`): entries of the finished rounds.
    """

    shape: Mapping[str, Any] = field(default_factory=dict)
    rank: int = 0
    device: torch.device = torch.device("cpu")  # noqa: RUF009 (devices do not change)
    incoming: Tensor | None = None
    snapshot: Snapshot | None = None
    rejected: int = 0
    generation: dict[str, Any] = field(default_factory=dict)
    ledger: list[dict[str, Any]] = field(default_factory=list)

    def forget(self) -> None:
        """Drop what is left of a round that was broken off."""
        self.snapshot = self.incoming = None
        self.rejected = 0

    def close(self, decision: Decision, trained: Tensor, **facts: Any) -> dict[str, Any]:
        """End the round: write the ledger entry, and count."""
        entry = {"round": len(self.ledger), **facts, **self.generation, **asdict(decision)}
        self.ledger.append(entry)
        self.rejected = 0 if decision.kept else self.rejected + 1
        self.incoming = trained if decision.kept else self.incoming
        self.snapshot = None
        self.generation = {}
        return entry

    def save(self, folder: str | os.PathLike[str], buffer: Sequence[Mapping[str, Any]]) -> None:
        """Write the state into a checkpoint, each file atomically: the first process all, the others their responses.

        Args:
            folder: of the checkpoint.
            buffer: this process's responses that are still to be trained on, as TRL holds them; none between rounds.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        parts = {f"{n}.{k}": v for n, part in enumerate(buffer) for k, v in part.items() if isinstance(v, Tensor)}
        atomically(folder / BUFFER_FILE.format(rank=self.rank), lambda path: save_file(_on_cpu(parts), path))
        if self.rank > 0:
            return
        tensors: dict[str, Tensor] = {} if self.incoming is None else {"incoming": self.incoming}
        if self.snapshot is not None:
            tensors |= {f"snapshot.{name}": value for name, value in self.snapshot.tensors.items()}
        summary = {
            "format": FORMAT,
            "rejected": self.rejected,
            "generation": self.generation,
            "ledger": self.ledger,
            "in_round": self.snapshot is not None,
            "shape": dict(self.shape),
            "plain": {} if self.snapshot is None else self.snapshot.plain,
        }
        atomically(folder / STATE_FILE, lambda path: save_file(_on_cpu(tensors), path))
        atomically(folder / SUMMARY_FILE, lambda path: path.write_text(json.dumps(summary, indent=1)))

    def load(self, folder: str | os.PathLike[str]) -> list[dict[str, Tensor]] | None:
        """Restore what `save` wrote; returns the responses still to be trained on.

        Raises:
            FileNotFoundError: if the folder has no such state.
            ValueError: if it is damaged, or its rounds have another shape than this run's.
        """
        folder = Path(folder)
        files = (SUMMARY_FILE, STATE_FILE, BUFFER_FILE.format(rank=self.rank))
        missing = [name for name in files if not (folder / name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{folder} has no {missing[0]}: it is not a checkpoint of a self-refining run of as many processes."
            )
        try:
            summary = json.loads((folder / SUMMARY_FILE).read_text())
            tensors, parts = (
                {name: value.to(self.device) for name, value in load_file(folder / file).items()} for file in files[1:]
            )
        except (json.JSONDecodeError, SafetensorError) as error:
            raise ValueError(f"The round state in {folder} is damaged ({error}). Resume from another one.") from error
        if summary.get("format") != FORMAT:
            raise ValueError(
                f"The round state in {folder} has format {summary.get('format')!r}, this version reads {FORMAT}. "
                "Resume with the version of trl-bilevel that wrote it."
            )
        saved = summary.get("shape", {})
        changed = [f"{k}: {saved[k]!r} then, {v!r} now" for k, v in self.shape.items() if saved.get(k, v) != v]
        if changed:
            raise ValueError(
                f"The rounds in {folder} have another shape ({'; '.join(changed)}). Resume with the same settings and "
                "number of processes."
            )
        self.rejected, self.generation, self.ledger = summary["rejected"], summary["generation"], summary["ledger"]
        self.incoming = tensors["incoming"].cpu() if "incoming" in tensors else None
        kept = {name.removeprefix("snapshot."): v for name, v in tensors.items() if name.startswith("snapshot.")}
        self.snapshot = Snapshot(kept, summary["plain"]) if summary["in_round"] else None
        buffer: dict[int, dict[str, Tensor]] = {}
        for name, value in parts.items():
            number, key = name.split(".", 1)
            buffer.setdefault(int(number), {})[key] = value
        return [buffer[number] for number in sorted(buffer)] or None

    def write_ledger(self, folder: str | os.PathLike[str]) -> None:
        """Write all entries as JSON lines into a run's folder, atomically; the first process does."""
        if self.rank > 0:
            return
        file = private_path(Path(folder), LEDGER)
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(finite(entry)) + "\n" for entry in self.ledger)
        atomically(file, lambda path: path.write_text(lines))


class RoundCallback(TrainerCallback):
    """When rounds begin and end, in terms of the training loop's events.

    Args:
        rounds: of the run.
        start: told of the steps done when training begins.
        begin, end: what begins and what ends a round.
    """

    def __init__(
        self, rounds: Rounds, start: Callable[[int], None], begin: Callable[[], None], end: Callable[[], None]
    ):
        self.rounds = rounds
        self.start = start
        self.begin = begin
        self.end = end

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave nothing of an earlier run that was not resumed."""
        self.start(state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open a round at its first step."""
        if state.global_step % args.steps_per_round == 0 and self.rounds.snapshot is None:
            self.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close a round after its last step, before a checkpoint is written."""
        if state.global_step % args.steps_per_round == 0:
            # Logging an entry takes the mark away that the step itself is to be logged.
            should_log = control.should_log
            self.end()
            control.should_log = should_log
            control.should_training_stop |= self.rounds.rejected >= args.patience

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Decide a round that was stopped in the middle."""
        if self.rounds.snapshot is not None:
            self.end()


def checkpoint_files(processes: int) -> list[str]:
    """What a complete checkpoint of a self-refining run has."""
    random_states = ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in range(processes)]
    buffers = [BUFFER_FILE.format(rank=rank) for rank in range(processes)]
    return [*random_states, *WEIGHT_FILES, STATE_FILE, SUMMARY_FILE, *buffers]


def is_exhausted(folder: str, patience: int) -> bool:
    """True if the run that a checkpoint belongs to had ended: so many rounds in a row were rolled back."""
    file = Path(folder) / SUMMARY_FILE
    return file.is_file() and json.loads(file.read_text())["rejected"] >= patience


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
