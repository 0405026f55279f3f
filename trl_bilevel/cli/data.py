"""Loading of data sets named on the command line: hub names, local files, mixtures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

FILE_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
SOURCE = "source"


def load_rows(name: str, *, split: str = "train", config: str | None = None, **kwargs: Any) -> Dataset:
    """Rows of a hub data set, of a local file (`.json`, `.jsonl`, `.csv`, `.parquet`), or of a folder saved to disk.

    Raises:
        FileNotFoundError: if the name looks like a local file that is not there.
        ValueError: if the rows cannot be loaded.
    """
    from datasets import load_dataset, load_from_disk

    path = Path(name)
    if path.suffix in FILE_FORMATS:
        if not path.is_file():
            raise FileNotFoundError(f"There is no data file {name}.")
        return load_dataset(FILE_FORMATS[path.suffix], data_files=str(path), split="train")
    if (path / "dataset_info.json").is_file():
        return load_from_disk(str(path))
    try:
        return load_dataset(name, name=config, split=split, **kwargs)
    except Exception as error:
        raise ValueError(
            f"Could not load the data set {name!r} (split {split!r}): {error}. Give a hub name, a file "
            f"({', '.join(FILE_FORMATS)}), or a folder written by `Dataset.save_to_disk`."
        ) from error


def load_mixture(parts: list[Any]) -> Dataset:
    """The rows of several data sets after one another, with a `source` column that names each row's data set.

    Args:
        parts: entries of `datasets` in the config file, as TRL's `DatasetConfig` (path, name, split, columns, ...).
    """
    from datasets import concatenate_datasets

    loaded = []
    for part in parts:
        if getattr(part, "fraction", None) not in (None, 1.0):
            raise ValueError(f"`fraction` of the data set {part.path!r} is not supported: sample the rows beforehand.")
        extra = {k: getattr(part, k) for k in ("data_dir", "data_files") if getattr(part, k, None)}
        rows = load_rows(part.path, split=part.split or "train", config=part.name, **extra)
        if part.columns:
            rows = rows.select_columns(part.columns)
        label = part.path if part.name is None else f"{part.path}/{part.name}"
        loaded.append(rows.add_column(SOURCE, [label] * len(rows)))
    return concatenate_datasets(loaded)
