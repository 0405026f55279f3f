"""Progress of choosing: one bar with the time left, in tokens that pass through the model."""

from __future__ import annotations

from collections.abc import Sequence

from tqdm.auto import tqdm


class Progress(tqdm):
    """A bar over all that choosing does; with `hidden`, nothing is drawn."""

    def __init__(self, hidden: bool):
        super().__init__(total=0, desc="Choosing weights", unit="token", unit_scale=True, disable=hidden)

    def done(self, tokens: float) -> None:
        """So many tokens have passed, counted once for every whole forward."""
        self.update(min(round(tokens), self.total - self.n))


def tokens_of(lengths: Sequence[int], places: Sequence[int]) -> int:
    """Tokens of the rows at some places."""
    return sum(lengths[place] for place in places)
