"""Hidden states of rows, as the probe takes them: every process reads its part, and has all of them afterwards."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.probe import Mismatched
from ..data.mismatch import Mismatch, mismatched
from ..data.rows import Collate, Rows, batched, pad_rows
from ..data.trusted import TrustedSets
from .language_model import LanguageModel
from .pilot import BATCH_ROWS, BATCH_TOKENS, trusted_values
from .processes import Processes
from .progress import Progress, tokens_of

# Rows that exchange their answers.
NEAR_ROWS = 64


@dataclass
class Reading:
    """Reads rows and trusted rows.

    Attributes:
        model: within `left_as_it_was`.
        depth (`float`): share of the layers after which states are read.
    """

    model: LanguageModel
    rows: Rows
    trusted: TrustedSets
    depth: float
    processes: Processes
    progress: Progress

    def states(self, places: Tensor) -> Tensor:
        """Mean states float32 `[n, 2 d]` of rows. Cost: a forward without gradient through the lower layers."""
        chosen = places.tolist()
        lengths = [self.rows.lengths[place] for place in chosen]
        return self._read("Reading rows", lengths, lambda part: self.rows.batch([chosen[n] for n in part]))

    def mismatched(self, places: Tensor) -> Mismatched | None:
        """Mean states of the questions of rows with answers of other rows, if there are such pairs; costs as much.

        `places` are in random order, and the answers come from rows that are near in it.
        """
        chosen, made = places.tolist(), []
        for start in range(0, len(chosen), NEAR_ROWS):
            found = mismatched(self.rows.batch(chosen[start : start + NEAR_ROWS]))
            made += [Mismatch(each.row, each.question + start, each.answer + start) for each in found]
        if not made:
            return None
        lengths = [len(each.row["input_ids"]) for each in made]
        states = self._read("Reading pairs", lengths, lambda part: pad_rows([made[n].row for n in part]))
        return Mismatched(states, *(torch.tensor([each[n] for each in made]) for n in (1, 2)))

    def _read(self, stage: str, lengths: list[int], collated: Callable[[list[int]], Any]) -> Tensor:
        """Mean states of rows of these lengths, `[n, 2 d]`; `collated` makes a batch of some of them."""
        self.progress.set_description(stage)
        out = torch.zeros(len(lengths), 2 * self.model.base.config.get_text_config().hidden_size)
        for part in self.processes.own(batched(dict(enumerate(lengths)), BATCH_TOKENS, BATCH_ROWS)):
            out[part] = mean_states(self.model, collated(part), self.depth)
            self.progress.done(self.depth * tokens_of(lengths, part) * self.processes.count)
        return self.processes.sum(out)

    def trusted_states(self) -> Tensor:
        """Mean states float32 `[c, 2 d]` of the trusted rows; the same on every process."""
        return self.processes.first(trusted_values(self.trusted, self._mean_states))

    def _mean_states(self, batch: Mapping[str, Any]) -> Tensor:
        return mean_states(self.model, batch, self.depth)


def mean_states(model: LanguageModel, batch: Mapping[str, Any], depth: float) -> Tensor:
    """Mean hidden states of the scored tokens and of the prompt's, side by side, float32 `[b, 2 d]` on the CPU."""
    (states,) = model.states(batch, [depth])
    answer = (batch["labels"] != -100).to(states.device)
    prompt = batch["attention_mask"].to(states.device).bool() & ~answer
    return torch.cat([_mean(states, answer), _mean(states, prompt)], dim=1).cpu()


def _mean(states: Tensor, tokens: Tensor) -> Tensor:
    """Mean state of some tokens of each row, `[b, d]`; zero where there is none."""
    return (states * tokens.unsqueeze(-1)).sum(1) / tokens.sum(1, keepdim=True).clamp(min=1)


def of_columns(
    columns: Mapping[str, Sequence[Any]],
    prepare: Callable[[dict[str, Any]], Any],
    collate: Collate,
    values: Callable[[Any], Tensor],
) -> Tensor:
    """Values of a batch of rows that comes as columns, float32 `[rows]`; NaN for rows without a token to score.

    `prepare` tokenises a row, `collate` makes a batch of such rows, and `values` gives the values of one.
    """
    rows = [prepare(dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)]
    out = torch.full((len(rows),), torch.nan)
    usable = [n for n, row in enumerate(rows) if any(label != -100 for label in row["labels"][1:])]
    if usable:
        out[usable] = values(collate([dict(rows[n]) for n in usable]))
    return out
