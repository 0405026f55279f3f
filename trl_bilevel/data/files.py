"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def check_folder(path: str | Path, name: str) -> None:
    """Refuse a file to be written whose folder is not there.

    Args:
        path: of the file.
        name: of the option that gave it.

    Raises:
        ValueError: names the option and the path.
    """
    if not Path(path).resolve().parent.is_dir():
        raise ValueError(f"The folder of `{name}` does not exist: {str(path)!r}. Make it first.")


def atomically(path: Path, write: Any) -> None:
    """Write to a temporary file beside `path`, then move it into place."""
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    os.replace(temporary, path)
