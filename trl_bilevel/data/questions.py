"""Which questions a round of self-refining generation asks."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import Sampler

from .batches import TrustedSampler
from .checks import check_dataset
from .identity import SAMPLE_ID

STRATEGIES = ("lowest_weight", "random", "all")


def questions_of(train: Dataset | None, prompts: Dataset | None, strategy: str) -> Dataset:
    """The questions that can be asked, `prompt` and `sample_id` (row number): those of `prompts`, if it is given.

    Raises:
        ValueError, TypeError: naming the argument, the value and the remedy.
    """
    given: dict[str, tuple[Any, tuple[str, ...]]] = {"`train_dataset`": (train, ("prompt", "completion"))}
    if prompts is not None:
        given["`prompt_dataset`"] = prompts, ("prompt",)
    for name, (rows, columns) in given.items():
        check_dataset(rows, name)
        missing = [column for column in columns if column not in rows.column_names]
        if missing:
            raise ValueError(
                f"{name} has no column {missing[0]!r} (it has {rows.column_names}): a question must stand apart from "
                "its answer to be answered anew. Split conversations into `prompt` and `completion`."
            )
    if prompts is not None and strategy == "lowest_weight":
        raise ValueError(
            "`question_strategy='lowest_weight'` chooses by the weights of offline answers, and the questions of "
            "`prompt_dataset` have none. Use 'random' or 'all'."
        )
    asked = rows.select_columns(["prompt"])
    return asked.add_column(SAMPLE_ID, list(range(len(asked))))


def choose_questions(weights: Tensor, strategy: str, fraction: float, seed: int) -> Tensor:
    """Positions of the questions that may be asked, int64, ascending.

    Args:
        weights (`Tensor` float `[N]`): explicit weight of each question's offline answer; NaN: not to be asked.
        strategy (`str`): `"lowest_weight"`: the share `fraction` of lowest weight, whose answers training throws away;
            `"random"`: a random share `fraction`; `"all"`.
        fraction (`float`): in (0, 1].
        seed (`int`): of the random share.

    Raises:
        ValueError: if no question is left.
    """
    known = (~torch.isnan(weights)).nonzero().squeeze(1)
    if len(known) == 0:
        raise ValueError("No question is left to ask: every row was dropped in preparation.")
    if strategy == "all":
        return known
    # Ties, as with equal weights, are broken at random: not by where a row stands in the file.
    known = known[torch.randperm(len(known), generator=torch.Generator().manual_seed(seed))]
    if strategy == "lowest_weight":
        known = known[torch.argsort(weights[known], stable=True)]
    return known[: math.ceil(fraction * len(known))].sort().values


class QuestionSampler(Sampler[int]):
    """The questions of all rounds, in the pattern of TRL's generation batches.

    Each round asks `questions` of the pool, in passes of random order; each is repeated `generations` times in a row,
    and the whole round `repeats` times, since TRL's dataloader hands out the generation batch anew in every step that
    uses it. A pure function of seed and pool; `pool` gives the positions that may be asked, when the run starts.
    """

    def __init__(
        self, pool: Callable[[], Tensor], *, questions: int, generations: int, repeats: int, rounds: int, seed: int
    ):
        self.pool, self.rounds, self.seed = pool, rounds, seed
        self.questions, self.generations, self.repeats = questions, generations, repeats

    def __len__(self) -> int:
        """Positions handed out over all rounds."""
        return self.rounds * self.repeats * self.questions * self.generations

    def round(self, number: int) -> Tensor:
        """Positions of the questions of a round, int64 `[questions]`; some twice if the pool is smaller."""
        pool = self.pool()
        order, start = TrustedSampler(len(pool), 1, self.seed), number * self.questions
        return pool[torch.tensor([order.rows(start + place)[0] for place in range(self.questions)])]

    def __iter__(self) -> Iterator[int]:
        """Positions, round by round."""
        for number in range(self.rounds):
            block = self.round(number).repeat_interleave(self.generations).tolist()
            for _ in range(self.repeats):
                yield from block
