"""Bilevel data selection for Hugging Face TRL (arXiv 2511.21056)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .report import write_report
    from .trainer.bilevel_sft_config import BilevelSFTConfig
    from .trainer.bilevel_sft_trainer import BilevelSFTTrainer
    from .trainer.self_refine_config import SelfRefineConfig
    from .trainer.self_refine_trainer import SelfRefineTrainer
    from .weights.errors import NonFiniteScoreError
    from .weights.learn import learn_weights
    from .weights.result import RowWeights
    from .weights.scorer import RowScorer
    from .weights.settings import WeightSettings

# Imported on first use, so that `import trl_bilevel` and `trl-bilevel --help` do not wait for torch.
_PUBLIC = {
    "BilevelSFTConfig": "trl_bilevel.trainer.bilevel_sft_config",
    "BilevelSFTTrainer": "trl_bilevel.trainer.bilevel_sft_trainer",
    "NonFiniteScoreError": "trl_bilevel.weights.errors",
    "RowScorer": "trl_bilevel.weights.scorer",
    "RowWeights": "trl_bilevel.weights.result",
    "SelfRefineConfig": "trl_bilevel.trainer.self_refine_config",
    "SelfRefineTrainer": "trl_bilevel.trainer.self_refine_trainer",
    "WeightSettings": "trl_bilevel.weights.settings",
    "learn_weights": "trl_bilevel.weights.learn",
    "write_report": "trl_bilevel.report",
}

__all__ = [
    "BilevelSFTConfig",
    "BilevelSFTTrainer",
    "NonFiniteScoreError",
    "RowScorer",
    "RowWeights",
    "SelfRefineConfig",
    "SelfRefineTrainer",
    "WeightSettings",
    "__version__",
    "learn_weights",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_PUBLIC[name]), name)
