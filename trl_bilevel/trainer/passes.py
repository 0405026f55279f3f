"""Passes over prepared training rows outside of training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pyarrow.compute as pc
from torch import Tensor
from tqdm.auto import tqdm

if TYPE_CHECKING:
    from .bilevel_sft_trainer import BilevelSFTTrainer


def row_batches(trainer: BilevelSFTTrainer, positions: Tensor, description: str) -> Iterator[dict[str, Any]]:
    """This process's share of rows of the prepared set, collated, similar lengths together so that little is padded.

    Args:
        positions (`Tensor` int64): in content order (`trainer.row_order()`), so that nothing depends on the caller's.
        description: of the progress bar.
    """
    args = trainer.args
    # In Arrow: as Python lists, the tokens of a large set do not fit.
    tokens = trainer.rows.select_columns("input_ids").with_format("arrow")
    lengths = [n for table in tokens.iter(10_000) for n in pc.list_value_length(table["input_ids"]).to_pylist()]
    mine = sorted(positions.tolist(), key=lengths.__getitem__)[args.process_index :: args.world_size]
    size = args.per_device_eval_batch_size
    if args.auto_find_batch_size:
        # Grows smaller when memory runs out.
        size = min(size, trainer._train_batch_size)
    starts = range(0, len(mine), size)
    for start in progress(trainer, starts, description):
        yield trainer.collate_rows(mine[start : start + size])


def progress(trainer: BilevelSFTTrainer, items: Any, description: str) -> Any:
    """A progress bar on the first process, unless bars are off."""
    hidden = trainer.args.disable_tqdm or not trainer.is_world_process_zero()
    return tqdm(items, desc=description, disable=hidden, leave=False)
