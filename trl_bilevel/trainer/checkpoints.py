"""Files of a run: the weights beside the model, and which checkpoint a run goes on from."""

from __future__ import annotations

import json
import logging
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import Trainer

from ..data.cards import add_selection_to_card
from ..weights.result import FACTS_FILE, WEIGHTS_FILE
from ..weights.state import TrainingWeights
from .record import RecordCallback

logger = logging.getLogger(__name__)

# Transformers writes it last, and deletes older checkpoints only after it.
LAST_FILE = "trainer_state.json"
WEIGHT_FILES = [WEIGHTS_FILE, FACTS_FILE]


class SavesWeights(Trainer):
    """The part of both trainers that looks after files; before TRL's trainer among the bases.

    Attributes:
        weights (`TrainingWeights`, *optional*), record (`RecordCallback`): of the run.
    """

    weights: TrainingWeights | None
    record: RecordCallback

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The parent's files, and the weights beside them; none that another run left there."""
        super().save_model(output_dir, _internal_call)
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        if self.weights is not None:
            self.weights.save(folder)
            return
        for name in WEIGHT_FILES:
            (folder / name).unlink(missing_ok=True)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The parent's card, with a section on the choice of rows: method, settings, data, results."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            add_selection_to_card(Path(self.args.output_dir), self.record.facts())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        dtypes = {name: p.dtype for name, p in self.model.named_parameters() if p.requires_grad}
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        # PEFT loads a QLoRA adapter in fp32, and training goes on exactly in bf16 only.
        for name, parameter in self.model.named_parameters():
            if name in dtypes:
                parameter.data = parameter.data.to(dtypes[name])


def resume_point(resume: str | bool | None, output_dir: str, required: Sequence[str]) -> str | bool | None:
    """What to hand to `Trainer.train`: `True` becomes the newest complete checkpoint in `output_dir`.

    A process that was killed while saving leaves a folder behind that lacks files. Transformers would take it as the
    newest checkpoint, and fail.

    Args:
        resume: as the user gave it. A path is passed on as it is.
        output_dir: of the run.
        required: files that a complete checkpoint has, besides `trainer_state.json`.

    Raises:
        ValueError: if `resume` is `True` and no checkpoint is complete.
    """
    if resume is not True:
        return resume
    found = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    for folder in sorted(found, key=lambda path: int(path.name.split("-")[1]), reverse=True):
        missing = [name for name in (*required, LAST_FILE) if not (folder / name).is_file()]
        broken = missing or [file.name for file in sorted(folder.rglob("*")) if not _is_whole(file)]
        if not broken:
            return str(folder)
        logger.warning(
            f"{folder} is incomplete ({', '.join(broken)} missing or cut off; killed while saving, or the disk was "
            "full?): it is left alone, and an older checkpoint is taken."
        )
    raise ValueError(
        f"`resume_from_checkpoint=True`, but {output_dir} has no complete checkpoint. Check `output_dir`, or start "
        "anew without `resume_from_checkpoint`."
    )


def _is_whole(file: Path) -> bool:
    """False for a file that was cut off, as far as its format shows; its values are not read."""
    if file.suffix == ".json":
        try:
            json.loads(file.read_text())
        except (OSError, ValueError):
            return False
    elif file.suffix == ".safetensors":
        try:
            with safe_open(file, "pt"):
                pass
        except (OSError, SafetensorError):
            return False
    elif file.suffix in (".pt", ".pth"):
        # `torch.save` writes a zip file, whose table of contents comes last.
        return zipfile.is_zipfile(file)
    return True
