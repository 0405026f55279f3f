"""Which of two models' responses a judge prefers, asked in both orders so that a bias for a position cancels."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Unpack

from .statistics import Estimate, Resampling, mean, rate

FIRST, SECOND, UNDECIDED = 0, 1, -1


class PairwiseJudge(Protocol):
    """What a judge has to offer: the signature that TRL's pairwise judges have had; perhaps a `note` that names it."""

    def judge(self, prompts: list[str], completions: list[list[str]]) -> list[int]:
        """The better completion of each pair, `[n]`: 0 the first, 1 the second, -1 undecided.

        A judge that also takes `shuffle_order`, as TRL's do, is called with `False`: both orders are asked anyway.
        """
        ...


@dataclass(frozen=True)
class WinRate:
    """Outcome of a comparison in which the judge saw every pair in both orders.

    Attributes:
        win_rate: mean score of the model; a row scores 1 if both orders chose it, 0.5 if the orders disagree or both
            are undecided, 0.75 or 0.25 if one order is undecided.
        wins, ties, losses: shares of rows that score above, at and below 0.5.
        consistent: share of rows where both orders chose the same response, or both none.
        first_position: share of the decided verdicts that chose the position shown first; 0.5 without bias. The
            interval takes verdicts for independent. None if none was decided.
        scores (`[n]`): the rows' scores.
    """

    win_rate: Estimate
    wins: Estimate
    ties: Estimate
    losses: Estimate
    consistent: Estimate
    first_position: Estimate | None
    scores: list[float]


def win_rate_with_swap(forward: Sequence[int], backward: Sequence[int], **resampling: Unpack[Resampling]) -> WinRate:
    """Win rate of a model from verdicts in both orders; a judge that always picks the same position gives 0.5.

    Args:
        forward, backward (`list[int]` `[n]`): 0 the first, 1 the second, -1 undecided; with the model's response
            first, and with the baseline's.
        resampling: `confidence`, `seed`, `resamples` of the intervals, see `Resampling`.

    Raises:
        ValueError: if the lengths differ, there is no row, or a verdict is none of the three.
    """
    if len(forward) != len(backward) or not forward:
        raise ValueError(f"Both orders need a verdict for each row, got {len(forward)} and {len(backward)}.")
    unknown = {*forward, *backward} - {FIRST, SECOND, UNDECIDED}
    if unknown:
        raise ValueError(f"Verdicts must be 0 (first), 1 (second) or -1 (undecided), got {sorted(unknown)}.")
    credit = {FIRST: 1.0, SECOND: 0.0, UNDECIDED: 0.5}
    pairs = [(credit[a], 1 - credit[b]) for a, b in zip(forward, backward, strict=True)]
    scores = [sum(pair) / 2 for pair in pairs]
    decided = [verdict for verdict in (*forward, *backward) if verdict != UNDECIDED]

    def share(found: Sequence[bool]) -> Estimate:
        return rate(sum(found), len(found), confidence=resampling.get("confidence", 0.95))

    return WinRate(
        win_rate=mean(scores, bounds=(0, 1), **resampling),
        wins=share([score > 0.5 for score in scores]),
        ties=share([score == 0.5 for score in scores]),
        losses=share([score < 0.5 for score in scores]),
        consistent=share([a == b for a, b in pairs]),
        first_position=share([verdict == FIRST for verdict in decided]) if decided else None,
        scores=scores,
    )


def ask_both_orders(
    judge: PairwiseJudge, prompts: Sequence[str], model: Sequence[str], baseline: Sequence[str]
) -> tuple[list[int], list[int]]:
    """A judge's verdicts with the model's response first, and with the baseline's response first."""
    shuffles = "shuffle_order" in inspect.signature(judge.judge).parameters
    keywords: dict[str, Any] = {"shuffle_order": False} if shuffles else {}
    out = []
    for first, second in ((model, baseline), (baseline, model)):
        pairs = [[a, b] for a, b in zip(first, second, strict=True)]
        verdicts = [int(verdict) for verdict in judge.judge(list(prompts), pairs, **keywords)]
        if len(verdicts) != len(pairs):
            raise ValueError(f"{type(judge).__name__}.judge gave {len(verdicts)} verdicts for {len(pairs)} pairs.")
        out.append(verdicts)
    return out[0], out[1]
