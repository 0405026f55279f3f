"""The weights that a training goes by: chosen before its first step or given, with statistics and checkpoint files."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.statistics import effective_sample_size, evenly_spaced
from ..data.files import finite
from ..data.groups import Groups
from .choose import Choice
from .result import equal_weights, read_files, write_files

logger = logging.getLogger(__name__)

# Statistics that need a look at many weights use at most this many rows, evenly spaced.
STATISTICS_ROWS = 65_536
# Groups whose share of the weight is logged: those of the largest ones.
LOGGED_GROUPS = 32
# Below this effective sample size, as a share of the rows, few rows carry the training: a warning.
NEARLY_COLLAPSED = 0.02
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


class TrainingWeights:
    """Weights of the caller's rows, of mean one over those that are trained on.

    Args:
        kept (`Tensor` bool `[N]`): rows that are trained on.
        identity (`dict`): what must not change between saving and loading: fingerprints and settings.
        any_identity (`bool`): load a state although its identity is another one.
    """

    def __init__(
        self, kept: Tensor, identity: Mapping[str, Any], groups: Groups | None = None, any_identity: bool = False
    ):
        self.kept = kept
        self.identity = dict(identity)
        self.groups = groups
        self.any_identity = any_identity
        self.values = equal_weights(kept)
        self.scores = torch.full((len(kept),), torch.nan)
        self.facts: dict[str, Any] = {}
        # True once they are chosen, given or loaded.
        self.known = False
        self._sample = kept.nonzero().squeeze(1)[torch.as_tensor(evenly_spaced(int(kept.sum()), STATISTICS_ROWS))]

    def take(self, choice: Choice) -> None:
        """Go by what choosing found out."""
        self.values, self.scores, self.facts = choice.weights, choice.scores[:, 0].contiguous(), dict(choice.facts)
        self.known = True
        size = effective_sample_size(self.sampled())
        if size < NEARLY_COLLAPSED:
            logger.warning(
                f"The weights have nearly collapsed: their effective sample size is {size:.1%} of the rows. Give more "
                "trusted rows, and rows that are like good training rows in form (the same columns and chat format), "
                "or lower `calibration_sharpness`."
            )

    def give(self, weights: Tensor) -> None:
        """Go by given weights `[N]` (at least 0), scaled to mean one over the rows trained on."""
        values = weights.double()
        self.values = torch.where(self.kept, values / values[self.kept].mean(), torch.nan).float()
        self.known = True

    def of(self, ids: Tensor) -> Tensor:
        """Weights float32 `[b]` of the given rows, on the CPU."""
        return self.values[ids.cpu()]

    def of_batch(self, batch: Mapping[str, Any], ids: Tensor) -> Tensor:
        """Weights float32 `[b]` of the training rows of a collated batch."""
        return self.of(ids)

    def loss_scale(self, tokens: Tensor) -> float:
        """What the weighted sum of losses is multiplied by, beside one over the tokens of a step.

        The objective is `sum w l / sum w t` over the rows (`l` a row's summed loss, `t` its `tokens` that the loss
        counts, `[N]`), as if row `i` were visited `w_i` times. A step divides by the tokens of its rows, so what is
        left is `sum t / sum w t`. It is taken over all rows: over those of one step, it would take the weight away
        from a row that comes alone.
        """
        weighed = (torch.nan_to_num(self.values.double()) * tokens).sum()
        return float(tokens[self.kept].sum() / weighed.clamp(min=1e-30))

    def sampled(self) -> Tensor:
        """Weights float32 `[n]` of at most `STATISTICS_ROWS` rows, always the same ones."""
        return self.values[self._sample]

    def metrics(self) -> dict[str, float]:
        """Numbers to log: effective sample size, quantiles, shares of the groups."""
        if not self.known:
            return {}
        weights = self.sampled()
        out = {"selector/ess": effective_sample_size(weights)}
        for level, value in zip(QUANTILES, np.quantile(weights.double().numpy(), QUANTILES).tolist(), strict=True):
            out[f"selector/weight_q{round(100 * level):02d}"] = value
        out |= {f"selector/{name}": self.facts[name] for name in ("score_mean", "score_std") if name in self.facts}
        if self.groups is not None:
            shares = sorted(self.groups.shares(self.values).items(), key=lambda item: -item[1])
            out |= {f"selector/share/{name}": share for name, share in shares[:LOGGED_GROUPS]}
        return out

    def tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint needs."""
        return {"values": self.values, "scores": self.scores}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `tensors` gave; refuse those of another number of rows."""
        if tensors["values"].shape != self.values.shape:
            raise ValueError(
                f"The saved weights are of {len(tensors['values'])} rows, this run has {len(self.values)}. Resume "
                "with the same training data."
            )
        self.values, self.scores = tensors["values"], tensors["scores"]

    def save(self, folder: str | Path) -> None:
        """Write `weights.safetensors` and `weights.json` into a folder, each whole or not at all."""
        told = {"identity": self.identity, "known": self.known, "facts": self.facts}
        write_files(Path(folder), self.tensors(), told)

    def load(self, folder: str | Path) -> None:
        """Restore what `save` wrote.

        Raises:
            FileNotFoundError: if the folder has no weights.
            ValueError: if they are damaged, or belong to other data or settings.
        """
        other = ": it is not a checkpoint of a run with weighted rows. Resuming would silently forget the weights"
        told, tensors = read_files(Path(folder), missing=other)
        # Settings one by one, so that the message names those that differ.
        saved, own = (part | part.get("settings", {}) for part in (told["identity"], finite(self.identity)))
        changed = [
            f"{name}: {saved.get(name)!r} then, {value!r} now"
            for name, value in own.items()
            if name != "settings" and value != saved.get(name)
        ]
        if changed and not self.any_identity:
            raise ValueError(
                f"The weights in {folder} belong to other training data or settings ({'; '.join(changed)}). Resume "
                "with the same data and settings, or set `ignore_selector_fingerprint=True` if you know that the rows "
                "still mean the same."
            )
        self.load_tensors(tensors)
        self.known, self.facts = told["known"], told["facts"]
