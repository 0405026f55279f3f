"""Validation rows: which ones a step uses, and how they join the training rows in one batch."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .identity import SAMPLE_ID, SEGMENTS

# What padding means, per model input.
_PADDING = {"attention_mask": 0, "labels": -100, "token_type_ids": 0, "position_ids": 0, SEGMENTS: -1}


class TrustedSampler:
    """Endless passes over `size` validation rows in seeded random order, as a pure function of the step.

    There is no state to save: a resumed run asks for the same step and gets the same rows, on every process.

    Args:
        size (`int`): number of validation rows.
        batch_size (`int`): rows per step; at most `size` are drawn.
        seed (`int`): seed of the order.
    """

    def __init__(self, size: int, batch_size: int, seed: int):
        self.size = size
        self.batch_size = min(batch_size, size)
        self.seed = seed
        self._orders: dict[int, list[int]] = {}

    def _order(self, epoch: int) -> list[int]:
        if epoch not in self._orders:
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % (2**63))
            # Two passes at most are ever in use: a batch can straddle the end of one.
            self._orders = {k: v for k, v in self._orders.items() if k == epoch - 1}
            self._orders[epoch] = torch.randperm(self.size, generator=generator).tolist()
        return self._orders[epoch]

    def rows(self, step: int) -> list[int]:
        """Row numbers of the given step's batch."""
        start = step * self.batch_size
        return [self._order(k // self.size)[k % self.size] for k in range(start, start + self.batch_size)]


def concatenate_batches(first: Mapping[str, Any], second: Mapping[str, Any], pad_token_id: int) -> dict[str, Any]:
    """One batch with the rows of both: padded, or one after the other if the batches are padding-free.

    Args:
        first, second (`dict` of `Tensor`): collated batches with the same keys; `[B, S]` inputs may differ in `S` and
            are padded on the right; `[B]` tensors (ids) are appended.
        pad_token_id (`int`): fills `input_ids`.

    Raises:
        ValueError: if the batches do not hold the same tensors.
    """
    if set(first) != set(second):
        raise ValueError(
            f"Training and validation batches differ in their inputs: {sorted(first)} against {sorted(second)}."
        )
    second = {k: v.to(first[k].device) if isinstance(v, Tensor) else v for k, v in second.items()}
    if SEGMENTS in first:
        shifted = second[SEGMENTS] + len(first[SAMPLE_ID])
        second[SEGMENTS] = torch.where(second[SEGMENTS] < 0, second[SEGMENTS], shifted)
    if "cu_seq_lens_q" in first:
        return _chained(first, second)
    out: dict[str, Any] = {}
    for name, left in first.items():
        right = second[name]
        if left.dim() == 1:
            out[name] = torch.cat([left, right])
            continue
        length = max(left.shape[1], right.shape[1])
        value = pad_token_id if name == "input_ids" else _PADDING.get(name)
        if value is None:
            raise ValueError(f"Do not know how to pad the model input {name!r} of a concatenated batch.")
        out[name] = torch.cat([_pad(left, length, value), _pad(right, length, value)])
    return out


def _chained(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Padding-free batches, one after the other: one row of tokens, with the boundaries of its sequences."""
    out: dict[str, Any] = {}
    for name, left in first.items():
        right = second[name]
        if name.startswith("max_length"):
            out[name] = max(left, right)
        elif name.startswith("cu_seq_lens"):
            out[name] = torch.cat([left, right[1:] + left[-1]])
        else:
            right = right + left[:, -1:] + 1 if name == "seq_idx" else right
            out[name] = torch.cat([left, right], dim=-1)
    return out


def _pad(tensor: Tensor, length: int, value: int) -> Tensor:
    return torch.nn.functional.pad(tensor, (0, length - tensor.shape[1]), value=value)
