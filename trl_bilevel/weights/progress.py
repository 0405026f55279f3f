"""Progress of choosing: one bar with the time left, in tokens that pass through the model."""

from collections.abc import Sequence

from tqdm.auto import tqdm


class Progress(tqdm):
    """A bar over all that choosing does; with `hidden`, nothing is drawn."""

    def __init__(self, hidden: bool):
        super().__init__(total=0, desc="Choosing weights", unit="token", unit_scale=True, disable=hidden)

    def plan(self, tokens: float, own: int, memory: int) -> None:
        """Set the length of the bar, and say what is to come: tokens to read, `own` in the rows, bytes of memory."""
        self.reset(round(tokens))
        if self.disable:
            return
        beside = f", and takes {memory / 1e6:,.0f} MB of memory for its adapters beside the model" if memory else ""
        self.write(
            f"Choosing weights reads about {tokens:,.0f} tokens, {tokens / own:.1f} times the rows' own{beside}."
        )

    def done(self, tokens: float) -> None:
        """So many tokens have passed, counted once for every whole forward."""
        self.update(min(round(tokens), self.total - self.n))


def tokens_of(lengths: Sequence[int], places: Sequence[int]) -> int:
    """Tokens of the rows at some places."""
    return sum(lengths[place] for place in places)
