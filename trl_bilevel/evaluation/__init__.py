"""Evaluation of trained models: held-out loss, pairwise preference, safety with its price; all with intervals."""

from .preference import PairwiseJudge, WinRate, win_rate_with_swap
from .refusal import RefusalJudge
from .statistics import Difference, Estimate, mean, paired_difference, rate, ratio

__all__ = [
    "Difference",
    "Estimate",
    "PairwiseJudge",
    "RefusalJudge",
    "WinRate",
    "mean",
    "paired_difference",
    "rate",
    "ratio",
    "win_rate_with_swap",
]
