"""What choosing has found out so far, on disk: a run that was killed goes on from there."""

import hashlib
import json
import logging
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..data.files import atomically

logger = logging.getLogger(__name__)

# Seconds between two notes of scores, at least.
PAUSE = 15.0
# Names of notes: of the pilot, and of the scores of each process.
NOTES = re.compile(r"pilot\.safetensors|(probe|pilot-scores)-\d+\.safetensors")


class Store:
    """Tensors by name in a folder, each written whole or not at all, and read only by a run of the same kind.

    Args:
        folder (`Path`, *optional*): None keeps nothing.
        key: what the tensors depend on (rows, trusted rows, model, settings), as plain values.
    """

    def __init__(self, folder: Path | None, key: Mapping[str, Any]):
        self.folder = folder
        self.key = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()
        self._written = time.monotonic()

    def read(self, name: str) -> dict[str, Tensor] | None:
        """What `write` wrote under this name; None if there is nothing, or it belongs to other rows or settings."""
        if self.folder is None or not (path := self.folder / f"{name}.safetensors").is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                same = (file.metadata() or {}).get("key") == self.key
            if same:
                return load_file(path)
        except (OSError, SafetensorError):
            same = False
        logger.warning(f"{path} belongs to other rows or settings, or is damaged: choosing starts from the beginning.")
        return None

    def write(self, name: str, tensors: dict[str, Tensor], pause: bool = False) -> None:
        """Write tensors under a name; with `pause`, not more often than every `PAUSE` seconds."""
        if self.folder is None or (pause and time.monotonic() - self._written < PAUSE):
            return
        path = self.folder / f"{name}.safetensors"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            atomically(path, lambda file: save_file(tensors, file, metadata={"key": self.key}))
        except OSError as error:
            logger.warning(f"{path} could not be written ({error}): choosing could not go on from there, if killed.")
            self.folder = None
        self._written = time.monotonic()

    def remove(self) -> None:
        """Choosing is done: its notes are not needed any more. What else is in the folder stays."""
        if self.folder is None:
            return
        for file in self.folder.glob("*.safetensors"):
            if NOTES.fullmatch(file.name):
                file.unlink(missing_ok=True)
        with suppress(OSError):
            self.folder.rmdir()
