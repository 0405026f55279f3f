"""How the weights of single rows moved over a run whose weights are learned online."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from ..core.statistics import evenly_spaced
from ..data.files import atomically
from ..data.identity import SAMPLE_ID

TRACES_FILE = "traces.parquet"
# Times at which all rows are looked at, over a run; numbers that are kept at most, over all rows and times.
MOMENTS, NUMBERS = 13, 2**22


class Traces:
    """Weights and mean scores of rows at a few steps, on the CPU.

    Of more than `NUMBERS / (2 MOMENTS)` rows (about 160,000) some are followed, evenly spaced.
    """

    def __init__(self) -> None:
        self.rows = torch.empty(0, dtype=torch.long)
        self.taken: dict[int, tuple[Tensor, Tensor]] = {}

    def follow(self, side: Any, step: int, max_steps: int, last: bool = False) -> None:
        """Take the numbers of this step if it is a moment or the last: O(rows followed), a dozen times in a run.

        Args:
            side: the `BilevelSFTTrainer` that holds the weights.
            step, max_steps (`int`): of the run.
            last (`bool`): whether training ends here.
        """
        if not side.learns_online or side.streams or step in self.taken:
            return
        if not last and step not in moments(max_steps):
            return
        rows = torch.from_numpy(evenly_spaced(side.row_count, NUMBERS // (2 * MOMENTS)))
        if not torch.equal(rows, self.rows):
            # A run that is resumed with other rows (`ignore_selector_fingerprint`): the past is of none of these.
            self.rows, self.taken = rows, {}
        selection = side.selection
        weights = torch.where(selection.kept[self.rows], selection.weights(self.rows).cpu(), torch.nan)
        units = selection.units(self.rows.to(selection.state.logits.device))
        self.taken[step] = (weights, selection.state.score_mean[units].cpu())

    def read(self, folder: Path, step: int) -> None:
        """Go on with the file of the run that is resumed, up to its step; a file that cannot be read is left."""
        try:
            table = pq.read_table(folder / TRACES_FILE)
            rows = torch.from_numpy(table[SAMPLE_ID].to_numpy().copy())
            names = [name for name in table.column_names if name.startswith("weight ")]
            columns = {int(name.split(" ")[1]): (name, name.replace("weight", "score")) for name in names}
            taken = {
                at: tuple(torch.from_numpy(table[name].to_numpy().copy()) for name in pair)
                for at, pair in columns.items()
                if at <= step
            }
        except (OSError, ValueError, KeyError):
            return
        self.rows, self.taken = rows, taken  # type: ignore[assignment]

    def write(self, folder: Path) -> None:
        """Write `sample_id`, and `weight STEP` and `score STEP` for every step; nothing if there is none.

        Raises:
            OSError: if it cannot be written.
        """
        if not self.taken:
            return
        columns = {SAMPLE_ID: pa.array(self.rows.numpy())}
        for step, (weights, scores) in sorted(self.taken.items()):
            columns[f"weight {step}"] = pa.array(weights.numpy(), from_pandas=True)
            columns[f"score {step}"] = pa.array(scores.numpy(), from_pandas=True)
        atomically(folder / TRACES_FILE, lambda file: pq.write_table(pa.table(columns), file))


@cache
def moments(max_steps: int) -> frozenset[int]:
    """The steps at which rows are looked at: evenly spaced, first and last included."""
    return frozenset(torch.linspace(0, max_steps, MOMENTS).round().int().tolist())
