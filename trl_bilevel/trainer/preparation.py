"""The rows of a run: numbered before TRL prepares them, packed without losing their numbers, read for choosing."""

from __future__ import annotations

import copy
import dataclasses
import logging
import warnings
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset, IterableDataset
from torch import Tensor
from trl import SFTConfig

from ..data.checks import check_columns, check_dataset, check_filled, check_same_format, trusted_sets
from ..data.export import given_weights
from ..data.groups import Groups, make_groups
from ..data.identity import (
    DATA_WEIGHT,
    RESERVED_COLUMNS,
    SAMPLE_ID,
    SampleIdCollator,
    add_sample_ids,
    count_overlap,
    without_numbers,
)
from ..data.packing import SPLITTING, first_window, pack_rows
from ..data.rows import Collate, Rows, plain_rows
from ..data.scored import with_scored_tokens
from ..data.streams import columns, first_rows
from ..data.trusted import TrustedSets, set_weights
from . import checks
from .bilevel_sft_config import LEAST_STREAM_ROWS, BilevelSFTConfig

logger = logging.getLogger(__name__)

SKIP = "skip_prepare_dataset"
# A stream's row of a group that was not among the first rows.
NEW_GROUP = -2


@dataclasses.dataclass
class TrainingData:
    """What the caller gave, checked.

    Attributes:
        rows: as the caller has them.
        numbered: with a `sample_id`, if rows are tracked; of a stream, the number of the row's group.
        given (`Tensor` float32 `[rows]`, *optional*): weights of a column `data_weight`.
        trusted (`dict[str, Dataset]`), shares (`dict[str, float]`): the trusted sets, and what each counts.
        groups (`Groups`, *optional*): rows that share a weight; of a stream, of its first rows.
    """

    rows: Any
    numbered: Any
    given: Tensor | None
    trusted: dict[str, Dataset]
    shares: dict[str, float]
    groups: Groups | None

    @classmethod
    def of(cls, args: BilevelSFTConfig, train: Any, validation: Any, formatted: bool) -> TrainingData:
        """Check the caller's data.

        Args:
            formatted (`bool`): True if a formatting function makes text of the rows.

        Raises:
            ValueError, TypeError: naming the argument, the value and the remedy.
        """
        rows, given = take_weights(args, train)
        if isinstance(rows, IterableDataset) and Mode.of(args, given, True).tracks_rows:
            checks.check_stream(args)
        trusted = _checked(args, rows, validation, formatted)
        weights = args.validation_weights if isinstance(args.validation_weights, dict) else None
        shares = set_weights(weights, trusted) if trusted else {}
        groups = _groups(args, rows)
        if not Mode.of(args, given, False).tracks_rows:
            return cls(rows, rows, given, trusted, shares, None)
        if isinstance(rows, Dataset):
            return cls(rows, add_sample_ids(rows), given, trusted, shares, groups)
        numbered = rows if groups is None else _with_groups(rows, str(args.selector_group_column), groups)
        return cls(rows, numbered, given, trusted, shares, groups)

    @property
    def streams(self) -> bool:
        """True if the training rows come one after another, and cannot be counted."""
        return isinstance(self.rows, IterableDataset)

    def mode(self, args: BilevelSFTConfig) -> Mode:
        """How weights act under these settings."""
        return Mode.of(args, self.given, self.streams)


@dataclasses.dataclass(frozen=True)
class Mode:
    """How weights act in a run.

    Attributes:
        learns (`bool`): they are learned here.
        weighs (`bool`): rows have weights, learned or given.
        resamples (`bool`): rows are drawn by them.
        weighs_losses (`bool`): they multiply losses, or trusted rows are part of the objective.
        tracks_rows (`bool`): rows keep their numbers. False for plain SFT, which must not stumble over them.
    """

    learns: bool
    weighs: bool
    resamples: bool
    weighs_losses: bool
    tracks_rows: bool

    @classmethod
    def of(cls, args: BilevelSFTConfig, given: Tensor | None, streams: bool) -> Mode:
        """The mode of a run with these settings."""
        learns = args.weight_estimator != "none"
        weighs = learns or given is not None
        resamples = weighs and args.selector_weighting == "resample" and not streams
        trains_trusted = args.validation_loss_weight > 0
        return cls(learns, weighs, resamples, trains_trusted or (weighs and not resamples), weighs or trains_trusted)


def take_weights(args: BilevelSFTConfig, train: Any) -> tuple[Any, Tensor | None]:
    """The rows without the columns of an export, and their given weights; as they are if weights are learned.

    Returns:
        the rows; weights float32 `[rows]` (0 where missing), or None.
    """
    if args.weight_estimator != "none" or not isinstance(train, Dataset | IterableDataset):
        return train, None
    if DATA_WEIGHT not in columns(train):
        return train, None
    if isinstance(train, IterableDataset):
        raise ValueError(
            "Given weights (`data_weight` of `train_dataset`) are not supported with a stream: their mean is not "
            "known. Load the rows as a `Dataset`, which need not fit into memory."
        )
    if args.selector_group_column is not None:
        raise ValueError(
            "`selector_group_column` has no meaning with the given weights of a column `data_weight`. Leave it out, "
            "or remove the column and choose a `weight_estimator`."
        )
    return without_numbers(train), given_weights(train)


def _checked(args: BilevelSFTConfig, train: Any, validation: Any, formatted: bool) -> dict[str, Dataset]:
    check_dataset(train, "`train_dataset`", streams=True)
    names = columns(train)
    needed = args.weight_estimator != "none" or args.validation_loss_weight > 0
    taken = [name for name in RESERVED_COLUMNS if name in names]
    if taken and needed:
        raise ValueError(
            f"`train_dataset` has the column(s) {taken}, which BilevelSFTTrainer writes itself. Rename them, e.g. "
            f'`train_dataset.rename_column("{taken[0]}", "my_{taken[0]}")`; or, to train with the weights of an '
            "earlier choice (`data_weight`), set `weight_estimator='none'`."
        )
    readable = not formatted and not (args.dataset_kwargs or {}).get(SKIP)
    field = args.dataset_text_field
    if readable:
        check_columns(train, "`train_dataset`", field)
    if readable and needed and isinstance(train, Dataset):
        check_filled(train, "`train_dataset`", field)
    column = args.selector_group_column
    if column is not None and column not in names:
        raise ValueError(f"`selector_group_column={column!r}` is not a column of `train_dataset`, which has {names}.")
    if validation is None:
        if needed:
            raise ValueError(
                f"`validation_dataset` is required with `weight_estimator={args.weight_estimator!r}` and "
                f"`validation_loss_weight={args.validation_loss_weight}`: it says what good means. For plain SFT set "
                "`weight_estimator='none'` and `validation_loss_weight=0`."
            )
        return {}
    sets = trusted_sets(validation)
    for name, rows in sets.items() if readable else ():
        check_columns(rows, f"`validation_dataset` {name!r}", field)
        check_filled(rows, f"`validation_dataset` {name!r}", field)
    return sets


def _groups(args: BilevelSFTConfig, rows: Any) -> Groups | None:
    column = args.selector_group_column
    if column is None:
        return None
    if isinstance(rows, Dataset):
        return make_groups(rows.with_format(None)[column])
    return make_groups([row[column] for row in islice(iter(rows), args.stream_sample_rows)])


def _with_groups(stream: IterableDataset, column: str, groups: Groups) -> IterableDataset:
    known = {name: number for number, name in enumerate(groups.names)}

    def add(row: dict[str, Any]) -> dict[str, int]:
        return {SAMPLE_ID: known.get(str(row[column]), NEW_GROUP)}

    return stream.map(add)


def prepare_packed(args: BilevelSFTConfig, prepare: Callable[[SFTConfig], Dataset]) -> tuple[Dataset, Dataset]:
    """The training rows one by one, and packed.

    Args:
        prepare: prepares the rows with the settings that it is given, without packing them.

    Returns:
        `tuple` of `Dataset`: rows of at most `max_length` tokens; packed rows. What preparation drops is in neither.
    """
    if args.max_length is None:
        raise ValueError("`packing=True` needs `max_length`, the tokens of a packed row.")
    settings = copy.copy(args)
    if args.packing_strategy in SPLITTING:
        # No token is cut off before packing.
        settings.max_length = None
    rows = with_scored_tokens(prepare(settings))
    if len(rows) == 0:
        return rows, rows
    # The first process packs, the others read its cache.
    with PartialState().main_process_first():
        packed = pack_rows(rows, args.max_length, args.packing_strategy, args.dataset_num_proc)
        if args.shuffle_dataset:
            packed = packed.shuffle(seed=args.seed)
        return first_window(rows, args.max_length, args.dataset_num_proc), packed


def readable_rows(args: BilevelSFTConfig, rows: Dataset, collate: Collate, count: int) -> Rows:
    """Prepared rows with what their collator is given: all columns where they are kept."""
    extra = () if args.remove_unused_columns else rows.column_names
    return plain_rows(rows, collate, count, [name for name in extra if name not in ("input_ids", "labels", SAMPLE_ID)])


def padding_collator(collator: Any, padding_free: bool) -> SampleIdCollator:
    """A collator that gives each row a batch row: the trainer's own, unless that is padding-free."""
    inner: Any = collator.collator if isinstance(collator, SampleIdCollator) else collator
    return SampleIdCollator(dataclasses.replace(inner, padding_free=False) if padding_free else inner)


def told_of_dropped(rows: Rows) -> Rows:
    """The rows, after a warning if preparation has dropped some."""
    if len(rows) < rows.count:
        logger.warning(
            f"{rows.count - len(rows)} of {rows.count} training rows were dropped in preparation (nothing to learn "
            "from within `max_length`). They keep their row number and have no weight (NaN)."
        )
    return rows


def prepared_trusted(
    args: Any,
    given: Mapping[str, Dataset],
    shares: dict[str, float],
    rows: Rows | None,
    prepare: Callable[[Dataset, str], Dataset],
    completions_only: bool,
    collate: Collate,
) -> TrustedSets | None:
    """The trusted sets, prepared as the training rows are; None if there are none.

    Args:
        args: the config of either trainer.
        given, shares: the sets, and what each counts.
        rows (*optional*): the training rows, to warn of rows on both sides.
        prepare: tokenises a set, given its name.
        completions_only (`bool`): of the training rows, only completions are scored.
    """
    sets: dict[str, Rows] = {}
    for name, part in given.items():
        argument = f"`validation_dataset` {name!r}"
        check_same_format(part, argument, completions_only)
        prepared = with_scored_tokens(prepare(part, name))
        if len(prepared) == 0:
            raise ValueError(
                f"All {len(part)} rows of {argument} were dropped in preparation: no token to score within "
                f"`max_length={args.max_length}`. Raise `max_length`, or use `truncation_mode='keep_end'`."
            )
        if len(prepared) < len(part):
            logger.warning(f"{len(part) - len(prepared)} of {len(part)} rows of {argument} were dropped.")
        overlap = 0 if rows is None else count_overlap(rows.dataset, prepared)
        if overlap:
            warnings.warn(
                f"{overlap} of {len(prepared)} rows of {argument} are also training rows: their weights will be "
                "flattered, and the validation loss will not notice overfitting. Remove them from one side.",
                UserWarning,
                stacklevel=5,
            )
        sets[name] = readable_rows(args, prepared, collate, len(prepared))
    return TrustedSets(sets, shares) if sets else None


def stream_sample(
    args: BilevelSFTConfig, stream: IterableDataset, collate: Collate, batch_rows: int, groups: Groups | None
) -> tuple[Rows, Groups | None]:
    """The first prepared rows of a stream, numbered by their places: weights are chosen on them. And their groups.

    Raises:
        ValueError: if there are fewer than a batch (`batch_rows`), or too few to choose weights on.
    """
    rows, least = first_rows(stream, args.stream_sample_rows), max(LEAST_STREAM_ROWS, batch_rows)
    if len(rows) < least:
        raise ValueError(
            f"The stream `train_dataset` has {len(rows)} usable rows, fewer than {least}. Is it empty, or are its "
            "prompts longer than `max_length`? A small set need not be streamed: "
            "`Dataset.from_list(list(stream))`."
        )
    sample = Dataset.from_list([row | {SAMPLE_ID: place} for place, row in enumerate(rows)])
    if groups is not None:
        codes = torch.tensor([row[SAMPLE_ID] for row in rows])
        groups = Groups([*groups.names, "(other)"], torch.where(codes < 0, len(groups.names), codes))
    return readable_rows(args, sample, collate, len(rows)), groups
