"""Orders of rows that depend on what the rows say, not on where they stand."""

import hashlib
from collections.abc import Callable, Iterator

import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import Sampler

from ..core.resampling import systematic_resample


def content_order(dataset: Dataset, seed: int, batch_size: int = 1000) -> Tensor:
    """Positions of the rows of a prepared dataset in a random order given by their content, int64 `[N]`.

    Permuting the dataset permutes the result's entries and nothing else: the same rows come in the same order. So
    whatever is learned in this order does not depend on the order of the caller's rows.

    Args:
        dataset (`Dataset`): with `input_ids` and `labels`.
        seed (`int`): another seed gives another order.
    """
    keys = [(digest, place) for place, digest in enumerate(content_digests(dataset, str(seed).encode(), batch_size))]
    return torch.tensor([place for _, place in sorted(keys)], dtype=torch.int64)


def content_digests(dataset: Dataset, salt: bytes = b"", batch_size: int = 1000) -> Iterator[bytes]:
    """A hash of 16 bytes of each row's `input_ids` and `labels`."""
    tokens = dataset.select_columns(["input_ids", "labels"]).with_format(None)
    for batch in tokens.iter(batch_size=batch_size):
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            yield hashlib.blake2b(repr((ids, labels)).encode(), digest_size=16, key=salt).digest()


def content_hash(dataset: Dataset) -> str:
    """A hash of all rows' `input_ids` and `labels`, in their order."""
    whole = hashlib.blake2b(digest_size=16)
    for digest in content_digests(dataset):
        whole.update(digest)
    return whole.hexdigest()


class WeightedSampler(Sampler[int]):
    """Epochs of as many rows as the dataset has, each drawn in proportion to its weight (`systematic_resample`).

    A pure function of seed, epoch, weights and row contents: the same on every process, and on a resumed run.

    Args:
        order (`Tensor` int64 `[N]`): the rows in content order.
        weights: gives the weights by dataset position, float `[N]`, when an epoch starts.
        epoch: gives the number of the epoch that starts.
        seed (`int`): seed of the draws.
    """

    def __init__(self, order: Tensor, weights: Callable[[], Tensor], epoch: Callable[[], int], seed: int):
        self.order = order
        self.weights = weights
        self.epoch = epoch
        self.seed = seed

    def __len__(self) -> int:
        """Rows per epoch."""
        return len(self.order)

    def __iter__(self) -> Iterator[int]:
        """Dataset positions of one epoch."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch()) % (2**63))
        drawn = systematic_resample(self.weights()[self.order], len(self.order), generator)
        yield from self.order[drawn].tolist()
