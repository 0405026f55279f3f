"""What weights are kept for: groups of rows, or places of a table that the rows of a stream fall on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Groups:
    """The units of a group selector.

    Attributes:
        names (`list[str]`): one name per group.
        of_row (`Tensor` int64 `[N]`): the group of each of the caller's rows.
    """

    names: list[str]
    of_row: Tensor


@dataclass
class Table:
    """The units of a stream: places of a table of fixed size, which rows or groups fall on by the hash of their key.

    Attributes:
        size (`int`): number of units.
        grouped (`bool`): True if keys are those of groups.
        sample (`Tensor` int64 `[n]`): units of the rows of the stream's sample.
        names (`dict[int, str]`): names of the groups in the sample, by unit.
    """

    size: int
    grouped: bool
    sample: Tensor
    names: dict[int, str]


def make_groups(names: Sequence[Any]) -> Groups:
    """Groups from one value per row, in order of first appearance."""
    index: dict[str, int] = {}
    codes = [index.setdefault(str(name), len(index)) for name in names]
    return Groups(names=list(index), of_row=torch.tensor(codes, dtype=torch.int64))
