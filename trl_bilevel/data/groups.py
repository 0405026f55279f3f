"""Groups of rows that share a weight."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Groups:
    """Which rows share a weight.

    Attributes:
        names (`list[str]`): one name per group.
        of_row (`Tensor` int64 `[N]`): the group of each of the caller's rows.
    """

    names: list[str]
    of_row: Tensor

    def shares(self, weights: Tensor) -> dict[str, float]:
        """Share of the total weight that each group's rows hold; of sum one.

        Args:
            weights (`Tensor` float `[N]`): NaN for rows that do not count.
        """
        mass = torch.zeros(len(self.names), dtype=torch.float64)
        mass.index_add_(0, self.of_row, torch.nan_to_num(weights.double()))
        return dict(zip(self.names, (mass / mass.sum().clamp(min=1e-30)).tolist(), strict=True))


def make_groups(values: Sequence[Any]) -> Groups:
    """Groups from one value per row, in order of first appearance."""
    index: dict[str, int] = {}
    codes = [index.setdefault(str(value), len(index)) for value in values]
    return Groups(names=list(index), of_row=torch.tensor(codes, dtype=torch.int64))
