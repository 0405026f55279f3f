"""Files that are there whole or not at all, and values as JSON can hold them."""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np


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


def finite(value: Any, text: Callable[[Any], str] = str) -> Any:
    """A value as JSON can hold it, at any depth: NaN and infinity are None, dataclasses objects, arrays lists.

    Args:
        text: makes text of keys, of texts, and of all that JSON does not know; as they are by default.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, np.generic | np.ndarray):
        return finite(value.tolist(), text)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {text(key): finite(part, text) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part, text) for part in value]
    return text(value)


def write_json(path: Path, value: Any) -> None:
    """Write a value (see `finite`) as a JSON file, whole or not at all."""
    document = json.dumps(finite(value), indent=1, allow_nan=False) + "\n"
    atomically(path, lambda file: file.write_text(document, encoding="utf-8"))


def json_object(given: Any, name: str) -> dict[str, Any]:
    """What an option says: an object as JSON, or of a config file; empty if it is not given.

    Raises:
        ValueError: if it is something else; `name` is the option's.
    """
    try:
        found = json.loads(given) if isinstance(given, str) else given or {}
    except json.JSONDecodeError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"`{name}` must be a JSON object, got {given!r}.")
    return found


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds; empty if the file is not there, is damaged, or holds none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
