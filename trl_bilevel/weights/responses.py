"""The responses of a round: what each is worth, and the file that a person can read."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor

from ..core.implicit import implicit_weights, question_weights
from ..data.files import atomically
from ..data.identity import SAMPLE_ID
from ..data.private import RESPONSES, private_path
from ..data.rows import Collate
from .errors import NonFiniteScoreError
from .lookahead import Lookahead
from .pilot import in_batches
from .processes import Processes

logger = logging.getLogger(__name__)

# Weights of mean one that spread by less than this are as good as equal.
FLAT = 0.1


def score_responses(
    lookahead: Lookahead, collate: Collate, prompt_ids: Sequence[list[int]], completion_ids: Sequence[list[int]]
) -> Tensor:
    """Score of every response of this process, float32 `[n]` on the CPU, on the token ids that were sampled."""
    rows: list[dict[str, Any]] = [
        {"input_ids": [*prompt, *answer], "labels": [-100] * len(prompt) + list(answer), SAMPLE_ID: -1}
        for prompt, answer in zip(prompt_ids, completion_ids, strict=True)
    ]
    lengths = [len(row["input_ids"]) for row in rows]
    return in_batches(lengths, lambda places: lookahead.scores(collate([rows[place] for place in places])))


@dataclass(frozen=True)
class Responses:
    """The responses of a round, of all processes, the G responses to a question after one another.

    Attributes:
        prompts, texts (`list[str]`), tokens (`list[int]`): what was asked and answered.
        questions (`Tensor` int64 `[Q * G]`): row number of each one's question.
        cut (`Tensor` bool `[Q * G]`): ended by the length limit.
        left_out (`Tensor` bool `[Q * G]`): not trained on.
        scores (`Tensor` float32 `[Q * G]`): NaN where left out.
    """

    prompts: list[str]
    texts: list[str]
    tokens: list[int]
    questions: Tensor
    cut: Tensor
    left_out: Tensor
    scores: Tensor

    @classmethod
    def gathered(
        cls,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[list[int]],
        sample_ids: Sequence[int],
        scores: Tensor,
        *,
        ends: Collection[int | None],
        leaves_out_cut: bool,
    ) -> Responses:
        """Those of all processes, from this one's, as TRL hands them to a reward function.

        Args:
            sample_ids: question of each response.
            ends: tokens that end a response.
            leaves_out_cut (`bool`): responses that were cut are not trained on.
        """
        gather = Processes.now().all
        # A back end may give nothing at all.
        cut = gather(torch.tensor([bool(ids) and ids[-1] not in ends for ids in completion_ids]))
        left_out = cut & leaves_out_cut
        asked, texts = (gather_object([_text(part) for part in parts]) for parts in (prompts, completions))
        tokens = gather_object([len(ids) for ids in completion_ids])
        all_scores = gather(scores).masked_fill(left_out, torch.nan)
        return cls(asked, texts, tokens, gather(torch.tensor(sample_ids)), cut, left_out, all_scores)

    def weigh(self, explicit: Tensor, generations: int, temperature: float, number: int) -> Weighed:
        """The weights of the responses, and what is to be told of them.

        Args:
            explicit (`Tensor` float32 `[Q * G]`): explicit weight of each one's question.
            generations, temperature: G, and tau in nats per token.
            number (`int`): of the round, for messages.

        Raises:
            NonFiniteScoreError: if the score of a response is NaN or infinite.
        """
        if not bool(torch.isfinite(self.scores[~self.left_out]).all()):
            raise NonFiniteScoreError(
                f"Responses of round {number} have a NaN or infinite score. Lower `learning_rate` or "
                "`pilot_learning_rate`, or use bf16 in place of fp16."
            )
        weights = implicit_weights(self.scores, generations, temperature)
        spread, weight_spread = _spread_within(self.scores, generations), _spread_within(weights, generations)
        weights = weights * question_weights(explicit[::generations]).repeat_interleave(generations)
        known = self.scores[~self.left_out]
        if len(known) == 0:
            logger.warning(
                f"Round {number}: every response was cut at `max_completion_length` and left out "
                "(`mask_truncated_completions=True`). Raise it: nothing is learned from these responses."
            )
        elif weight_spread < FLAT:
            logger.warning(
                f"Round {number}: the responses' weights hardly differ (standard deviation {weight_spread:.3f} around "
                f"1), so the responses have next to no effect: their scores spread by {spread:.4f} nats per token, "
                f"and `implicit_weight_temperature` is {temperature:g}. Lower it, raise `pilot_learning_rate`, or "
                "train offline first."
            )
        facts = {
            "questions": len(weights) // generations,
            "responses": len(weights),
            "responses_cut": int(self.cut.sum()),
            "responses_empty": sum(not text.strip() for text in self.texts),
            "score_mean": float(known.mean()),
            "score_std": float(known.std(unbiased=False)),
            "score_std_within_group": spread,
            "weight_std_within_group": weight_spread,
        }
        columns: dict[str, list[Any]] = {
            "prompt": self.prompts,
            "response": self.texts,
            "tokens": self.tokens,
            "cut": self.cut.tolist(),
            SAMPLE_ID: self.questions.tolist(),
            "score": self.scores.tolist(),
            "weight": weights.tolist(),
            "question_weight": explicit.tolist(),
        }
        return Weighed(weights, facts, columns)


@dataclass(frozen=True)
class Weighed:
    """Weights of a round's responses (float32 `[Q * G]`), facts for the ledger, and columns of the responses' file.

    A weight is the implicit one times the question's explicit one; NaN for a response that is left out.
    """

    weights: Tensor
    facts: dict[str, Any]
    columns: dict[str, list[Any]]

    def write(self, folder: str | Path, number: int) -> None:
        """Write the responses of a round as parquet into a run's folder, atomically."""
        target = private_path(Path(folder), RESPONSES) / f"round-{number:04d}.parquet"
        target.parent.mkdir(parents=True, exist_ok=True)
        atomically(target, lambda path: Dataset.from_dict(self.columns).to_parquet(path))


def _text(part: Any) -> str:
    """A prompt or completion as text."""
    return part if isinstance(part, str) else "\n".join(str(message["content"]) for message in part)


def _spread_within(values: Tensor, group: int) -> float:
    """Mean over the groups of the standard deviation within a group; groups with a response left out do not count."""
    spread = values.view(-1, group).std(-1, unbiased=False)
    return float(spread[~torch.isnan(spread)].mean())
