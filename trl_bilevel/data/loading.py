"""Rows by name: hub data sets, local files and folders, mixtures of them; and rows written to files."""

from pathlib import Path
from typing import Any

from .files import atomically

FILE_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
# Columns of a CSV file that are text whatever stands in them; what stands for no number in columns of numbers.
TEXTS = ("prompt", "completion", "text")
NO_NUMBER = ("", "NA", "N/A", "NaN", "nan", "None", "null")
# Rows that `datasets` reads at a time: the first of them tell what kind a column is.
FIRST_ROWS = 10_000
WRITERS = {".parquet": "to_parquet", ".jsonl": "to_json", ".csv": "to_csv"}
SOURCE = "source"


def load_rows(name: str, *, split: str = "train", config: str | None = None, **kwargs: Any) -> Any:
    """Rows of a hub data set, of a local file (`.json`, `.jsonl`, `.csv`, `.parquet`), or of a folder saved to disk.

    With `streaming=True` a stream of them, which is read as it is used.

    Raises:
        FileNotFoundError: if the name looks like a local file that is not there.
        ValueError: if the rows cannot be loaded.
    """
    from datasets import ReadInstruction, load_dataset, load_from_disk

    path = Path(name)
    if path.suffix in FILE_FORMATS:
        if not path.is_file():
            raise FileNotFoundError(f"There is no data file {name}.")
        local = _local_split(name, split)
        try:
            if path.suffix == ".csv":
                kwargs = _csv_settings(path) | kwargs
            return load_dataset(FILE_FORMATS[path.suffix], data_files=str(path), split=local, **kwargs)
        except Exception as error:
            raise ValueError(
                f"Could not read the data file {name} (split {split!r}): {type(error).__name__}: {error}. Is it "
                "empty, or not in this format? (.jsonl: one JSON object per line.)"
            ) from error
    if (path / "dataset_info.json").is_file():
        rows = load_from_disk(str(path))
        (part,) = ReadInstruction.from_spec(_local_split(name, split)).to_absolute({"train": len(rows)})
        rows = rows.select(range(len(rows))[part.from_ : part.to])
        return rows.to_iterable_dataset() if kwargs.get("streaming") else rows
    try:
        return load_dataset(name, name=config, split=split, **kwargs)
    except Exception as error:
        raise ValueError(
            f"Could not load the data set {name!r} (split {split!r}): {error}. Give a hub name, a file "
            f"({', '.join(FILE_FORMATS)}), or a folder written by `Dataset.save_to_disk`."
        ) from error


def _csv_settings(path: Path) -> dict[str, Any]:
    """How pandas is to read a CSV file: answers as "None", "NA" or "" stay text; an empty weight is a missing one.

    A column is numbers if the first rows say so and it is none of `TEXTS`; in the others nothing is missing.
    """
    import pandas as pd

    from .identity import DATA_WEIGHT

    first = pd.read_csv(path, nrows=FIRST_ROWS, keep_default_na=False, na_values=[""])
    numbers = [name for name in first if pd.api.types.is_numeric_dtype(first[name]) and first[name].notna().any()]
    return {
        "keep_default_na": False,
        "na_values": {name: list(NO_NUMBER) for name in [DATA_WEIGHT, *numbers] if name not in TEXTS},
        "converters": {name: str for name in TEXTS if name in first},
    }


def _local_split(name: str, split: str) -> str:
    """`split` of a local file or folder, which has one part only: `"train"`, or a slice of it (`"train[:100]"`)."""
    part, bracket, rest = split.partition("[")
    if part not in ("train", "test"):
        raise ValueError(f"The local data {name} has no split {part!r}: leave the split out, or give 'train[:100]'.")
    return f"train{bracket}{rest}"


def load_mixture(parts: list[Any], streaming: bool = False) -> Any:
    """The rows of several data sets after one another, with a `source` column that names each row's data set.

    Streams take turns row by row, until all of them have ended.

    Args:
        parts: entries of `datasets` in the config file, as TRL's `DatasetConfig` (path, name, split, columns, ...).
    """
    from datasets import concatenate_datasets, interleave_datasets

    loaded = []
    for part in parts:
        if getattr(part, "fraction", None) not in (None, 1.0):
            raise ValueError(f"`fraction` of the data set {part.path!r} is not supported: sample the rows beforehand.")
        extra = {k: getattr(part, k) for k in ("data_dir", "data_files") if getattr(part, k, None)}
        rows = load_rows(part.path, split=part.split or "train", config=part.name, streaming=streaming, **extra)
        if part.columns:
            rows = rows.select_columns(part.columns)
        label = part.path if part.name is None else f"{part.path}/{part.name}"
        if streaming:
            loaded.append(rows.map(_add_source, fn_kwargs={"label": label}))
        else:
            loaded.append(rows.add_column(SOURCE, [label] * len(rows)))
    if streaming:
        return interleave_datasets(loaded, stopping_strategy="all_exhausted_without_replacement")
    return concatenate_datasets(loaded)


def _add_source(row: dict[str, Any], label: str) -> dict[str, str]:
    return {SOURCE: label}


def write_rows(rows: Any, path: str | Path) -> None:
    """Write a `Dataset` to a file in the format that its name says, whole or not at all; its folder is made.

    Raises:
        ValueError: if the name ends in none of `WRITERS`, or a CSV file cannot hold the rows.
    """
    suffix = check_writable(path, rows)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    atomically(Path(path), lambda file: getattr(rows, WRITERS[suffix])(str(file)))


def check_writable(path: str | Path, rows: Any = None) -> str:
    """The ending of a file that rows are to be written to; with `rows`, the file must be able to hold their columns.

    Columns of a stream may not be known.
    """
    from datasets import ClassLabel, Value

    suffix = Path(path).suffix
    if suffix not in WRITERS:
        raise ValueError(f"Rows can be written to files that end in {', '.join(WRITERS)}, got {str(path)!r}.")
    features = {} if rows is None else rows.features or {}
    nested = [name for name, kind in features.items() if not isinstance(kind, Value | ClassLabel)]
    if suffix == ".csv" and nested:
        raise ValueError(f"A CSV file cannot hold the columns {nested}, which are lists: use .jsonl or .parquet.")
    return suffix
