"""The trusted rows: sets, their weights, and the batches that training on them takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .batches import TrustedSampler
from .identity import SAMPLE_ID, TRUSTED_ID
from .rows import Rows

# Share of each set that is held back where the scores of unseen trusted rows calibrate the weights.
HELD_BACK_SHARE = 0.25


@dataclass
class TrustedSets:
    """Trusted rows in one or several sets, and what each set counts: `L_val = sum_d omega_d L_d`, `L_d` per token.

    Attributes:
        sets (`dict[str, Rows]`): prepared rows.
        weights (`dict[str, float]`): omega, of sum one.
    """

    sets: dict[str, Rows]
    weights: dict[str, float]

    def __len__(self) -> int:
        """Rows of all sets."""
        return sum(map(len, self.sets.values()))

    def shares(self) -> Tensor:
        """What each row counts in the loss, float32 `[len(self)]`, in the order of `places()`."""
        return torch.cat([torch.full((len(r),), self.weights[name] / max(1, len(r))) for name, r in self.sets.items()])

    def places(self) -> list[tuple[str, int]]:
        """All rows, as (set, place in it)."""
        return [(name, place) for name, rows in self.sets.items() for place in range(len(rows))]

    def samplers(self, count: int, seed: int) -> dict[str, TrustedSampler]:
        """Draws `count` rows a step, split evenly over the sets (at least one of each)."""
        share = max(1, count // len(self.sets))
        return {name: TrustedSampler(len(rows), share, seed + n) for n, (name, rows) in enumerate(self.sets.items())}

    def batch(self, drawn: list[tuple[str, int]]) -> dict[str, Any]:
        """Some rows, of any sets, as one batch; their `sample_id` is `TRUSTED_ID`."""
        rows = [self.sets[name].dataset.with_format(None)[place] | {SAMPLE_ID: TRUSTED_ID} for name, place in drawn]
        return next(iter(self.sets.values())).collate(rows)

    def row_factors(self, drawn: list[tuple[str, int]], tokens: Tensor) -> Tensor:
        """What the summed loss of each drawn row is multiplied by, such that the sum over all of them is `L_val`.

        Args:
            drawn: (set, place) of each row.
            tokens (`Tensor` `[b]`): tokens of each row that the loss counts.
        """
        totals = {name: tokens[[n for n, (own, _) in enumerate(drawn) if own == name]].sum() for name in self.sets}
        return torch.stack([self.weights[name] / totals[name].clamp(min=1) for name, _ in drawn]).float()

    def split(self, seed: int, share: float = HELD_BACK_SHARE) -> tuple[TrustedSets, TrustedSets]:
        """Rows to train on, and rows held back: `share` of each set, at random, at least one of those with several."""
        parts: tuple[dict[str, Rows], dict[str, Rows]] = {}, {}
        for name, held in self.held_places(seed, share).items():
            rows = self.sets[name]
            for part, places in zip(parts, (sorted({*range(len(rows))} - {*held}), held), strict=True):
                if places:
                    part[name] = Rows(rows.dataset.select(places), rows.collate, len(places))
        return self._of(parts[0]), self._of(parts[1])

    def held_places(self, seed: int, share: float = HELD_BACK_SHARE) -> dict[str, list[int]]:
        """The places of the rows of each set that `split` holds back, ascending."""
        out = {}
        for index, (name, rows) in enumerate(self.sets.items()):
            generator = torch.Generator().manual_seed(seed + 104_729 + index)
            held = max(1, round(share * len(rows))) if len(rows) > 1 else 0
            out[name] = sorted(torch.randperm(len(rows), generator=generator).tolist()[:held])
        return out

    def which(self, places: Mapping[str, list[int]]) -> Tensor:
        """Which rows are at these places of their sets, bool `[len(self)]`, in the order of `places()`."""
        return torch.tensor([place in places.get(name, ()) for name, place in self.places()], dtype=torch.bool)

    def _of(self, sets: dict[str, Rows]) -> TrustedSets:
        return TrustedSets(sets, set_weights(self.weights, sets))


def set_weights(given: Mapping[str, float] | None, names: Mapping[str, Any]) -> dict[str, float]:
    """Weights of the named sets, of sum one: the given ones, or equal ones.

    Raises:
        ValueError: if they do not fit the names, or are all 0.
    """
    weights = dict.fromkeys(names, 1.0) if given is None else {k: v for k, v in given.items() if k in names}
    if set(weights) != set(names) or min(weights.values()) < 0 or sum(weights.values()) <= 0:
        raise ValueError(
            f"`validation_weights={dict(given or {})}` must give a weight of at least 0 to each of the validation "
            f"sets {sorted(names)}, and not 0 to all."
        )
    total = sum(weights.values())
    return {name: weights[name] / total for name in names}
