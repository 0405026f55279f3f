"""Evaluation of trained models: held-out loss, pairwise preference, safety with its price; all with intervals."""

from .refusal import PairwiseJudge, RefusalJudge
from .statistics import Difference, Estimate, WinRate, mean, paired_difference, rate, ratio, win_rate_with_swap

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
