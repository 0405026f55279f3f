"""Checks of the caller's rows, before anything is computed. A refusal names the argument, the value and the remedy."""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

from .identity import count_overlap
from .streams import columns

# Texts of a row, by format: the columns that say what is asked and answered.
FORMATS = (("prompt", "completion"), ("messages",), ("conversations",))
LISTED = 20


def check_dataset(rows: Any, name: str, streams: bool = False) -> None:
    """Refuse what is no data set with rows in it.

    Args:
        rows: what the caller gave.
        name (`str`): of the argument, in backticks.
        streams (`bool`): whether an `IterableDataset` will do.
    """
    if rows is None:
        raise ValueError(f"{name} is required.")
    if isinstance(rows, DatasetDict | IterableDatasetDict):
        raise TypeError(f'{name} is a `{type(rows).__name__}` of {list(rows)}: pick one, e.g. `rows["train"]`.')
    if not isinstance(rows, Dataset | IterableDataset if streams else Dataset):
        also = " or `datasets.IterableDataset`" if streams else ""
        raise TypeError(
            f"{name} must be a `datasets.Dataset`{also}, got `{type(rows).__name__}`. A list of rows becomes one by "
            "`Dataset.from_list(rows)`; of a stream take a part: `Dataset.from_list(list(stream.take(20_000)))`."
        )
    if isinstance(rows, Dataset) and len(rows) == 0:
        raise ValueError(f"{name} is empty.")


def trusted_sets(validation: Any) -> dict[str, Dataset]:
    """The trusted sets by name, checked."""
    sets = dict(validation) if isinstance(validation, Mapping) else {"validation": validation}
    if not sets:
        raise ValueError("`validation_dataset` is an empty dict: give at least one dataset.")
    for name, rows in sets.items():
        check_dataset(rows, f"`validation_dataset` {name!r}")
    return sets


def check_columns(rows: Dataset | IterableDataset, name: str, text_field: str = "text") -> None:
    """Refuse rows in none of the formats that are known."""
    found = columns(rows)
    if any(set(format) <= set(found) for format in (("input_ids",), *FORMATS, (text_field,))):
        return
    raise ValueError(
        f"{name} has the columns {found}, in which no text format is recognised. Rename them: `messages`, or `prompt` "
        f"and `completion`, or `{text_field}` (`dataset_text_field`); or give a `formatting_func`."
    )


def check_filled(rows: Dataset, name: str, text_field: str = "text") -> None:
    """Refuse rows in which a text is missing, or a conversation has no turn: TRL would fail on them without a name."""
    used = next((format for format in (*FORMATS, (text_field,)) if set(format) <= set(rows.column_names)), ())
    for column in sorted(used):
        bad: list[int] = []
        seen = 0
        for table in rows.select_columns(column).with_format("arrow").iter(10_000):
            values = table[column].combine_chunks()
            missing = pc.is_null(values)
            if pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
                missing = pc.or_(missing, pc.equal(pc.fill_null(pc.list_value_length(values), 0), 0))
            bad += [seen + place for place in pc.indices_nonzero(missing).to_pylist()]
            seen += len(values)
        if bad:
            more = f" and {len(bad) - LISTED} more" if len(bad) > LISTED else ""
            raise ValueError(
                f"`{column}` of {name} is missing or has no turn in {len(bad)} of {len(rows)} rows: "
                f"{bad[:LISTED]}{more}. Leave them out: `rows.filter(lambda row: row[{column!r}])`."
            )


def check_same_format(trusted: Dataset, name: str, completions_only: bool) -> None:
    """Refuse trusted rows of which other tokens would be scored than of training rows.

    Args:
        completions_only (`bool`): of the training rows, only the completions are scored.
    """
    names = set(trusted.column_names)
    if {"labels"} & names or {"completion_mask"} & names or {"prompt", "completion"} <= names or not completions_only:
        return
    raise ValueError(
        f"{name} has the columns {trusted.column_names}, while the training rows are prompts and completions whose "
        "completions alone are scored: all of its tokens would count, prompts too. Split its rows into `prompt` and "
        "`completion`, or set `completion_only_loss=False`."
    )


def warn_of_overlap(rows: Dataset, should: str, sides: Iterable[tuple[str, Dataset]]) -> None:
    """Warn of rows that stand where they must not. All sets are tokenised.

    Args:
        should (`str`): what `rows` are for.
        sides: what other rows do, and these rows.
    """
    for does, others in sides:
        overlap = count_overlap(others, rows)
        if overlap:
            warnings.warn(
                f"{overlap} of the {len(rows)} rows that should {should} are also among those that {does}: the choice "
                "of model, or the report, will be flattered. Remove duplicates from `validation_dataset`, "
                "`selection_dataset` and `eval_dataset`.",
                UserWarning,
                stacklevel=4,
            )
