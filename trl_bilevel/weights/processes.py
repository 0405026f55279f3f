"""Several processes that choose together: each scores its part of the rows, all come to the same weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, gather, reduce
from torch import Tensor


@dataclass(frozen=True)
class Processes:
    """This process among the others: its number, how many there are, and the device for what is exchanged.

    The pilot is trained by each for itself, and rows are scored by turns: a row's score does not depend on how many
    processes there are.
    """

    rank: int
    count: int
    device: torch.device

    @classmethod
    def now(cls) -> Processes:
        """Those that `accelerate launch` or `torchrun` started; this one alone otherwise."""
        state = PartialState()
        return cls(state.process_index, state.num_processes, state.device)

    def own(self, items: list[list[int]]) -> list[list[int]]:
        """This process's share of a list."""
        return items[self.rank :: self.count]

    def sum(self, value: Tensor) -> Tensor:
        """The sum over the processes, on the CPU: of parts that are zero on all but one, exactly."""
        return value.cpu() if self.count == 1 else reduce(value.to(self.device), reduction="sum").cpu()

    def total(self, value: Tensor) -> Tensor:
        """The sum over the processes, on the value's device."""
        return value if self.count == 1 else reduce(value, reduction="sum")

    def all(self, value: Tensor) -> Tensor:
        """Values of all processes one after another, on the CPU: as many from each."""
        return value.cpu() if self.count == 1 else gather(value.to(self.device).contiguous()).cpu()

    def first(self, value: Tensor) -> Tensor:
        """What the first process has, on the CPU: fits may round otherwise on another processor."""
        return value.cpu() if self.count == 1 else broadcast(value.to(self.device).contiguous()).cpu()
