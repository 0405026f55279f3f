"""Progress of choosing: one bar with the time left, in tokens that pass through the model."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any


class Progress:
    """A bar over all that choosing does, on the first process.

    Args:
        hidden (`bool`): draw nothing.
    """

    def __init__(self, hidden: bool):
        from tqdm.auto import tqdm

        self._bar: Any = tqdm(total=0, desc="Choosing weights", unit="token", unit_scale=True, disable=hidden)

    def plan(self, tokens: float) -> None:
        """More work is to come: so many tokens, counted once for every whole forward."""
        self._bar.total += round(tokens)
        self._bar.refresh()

    def say(self, text: str) -> None:
        """Print a sentence above the bar, where there is one."""
        if not self._bar.disable:
            self._bar.write(text)

    def stage(self, name: str) -> None:
        """Say what is being done."""
        self._bar.set_description(name)

    def done(self, tokens: float) -> None:
        """So much of it is done."""
        self._bar.update(min(round(tokens), self._bar.total - self._bar.n))

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()


def tokens_of(lengths: Sequence[int], places: Sequence[int]) -> int:
    """Tokens of the rows at some places."""
    return sum(lengths[place] for place in places)
