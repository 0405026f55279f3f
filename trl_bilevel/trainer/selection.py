"""The offline weights of a run: selector state, gate, alarms, statistics, files. No trainer in here."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..core import calibration
from ..core import selector as core
from ..core.amortised import TabulatedPredictor
from ..core.calibration import Calibration, ending_logits
from ..core.statistics import evenly_spaced, weight_quantiles
from ..data.files import atomically
from .units import Groups, Table

if TYPE_CHECKING:
    from .bilevel_sft_config import BilevelSFTConfig

logger = logging.getLogger(__name__)

STATE_FILE = "selector.safetensors"
SUMMARY_FILE = "selector.json"
ESTIMATOR_PREFIX = "estimator."
PREDICTOR_PREFIX = "predictor."
# Of the two files; raised when older code could not read them any more.
FORMAT = 1
# Statistics that need a look at many weights use at most this many rows, evenly spaced.
STATISTICS_ROWS = 65_536
# Groups whose share of the weight is logged: those of the largest ones.
LOGGED_GROUPS = 32
# How much of its standardised score a row's calibrated logit carries.
TILT = 0.01
# Share of a table's places taken from which on its keys share weights too often.
MAX_LOAD = 0.25


class Selection:
    """Holds and updates the weights of `row_count` training rows of which `kept` survived preparation.

    Args:
        config: the selector's settings.
        kept (`Tensor` bool `[row_count]`): rows that are trained on.
        groups (`Groups`, *optional*): for `selector_granularity="group"`.
        fingerprint (`str`), validation_fingerprint (`str`): of the training data and of the validation sets; stored,
            and compared on loading.
        device: where the state lives.
        table (`Table`, *optional*): the units of a stream, whose rows nobody can count; `kept` is then of its sample.
    """

    def __init__(
        self,
        config: BilevelSFTConfig,
        kept: Tensor,
        *,
        groups: Groups | None,
        fingerprint: str,
        validation_fingerprint: str = "",
        device: torch.device,
        table: Table | None = None,
    ):
        self.config = config
        self.kept = kept
        self.groups = groups
        self.table = table
        # Gives the weights of a stream's rows, once calibrated.
        self.predictor: TabulatedPredictor | None = None
        self.fingerprint = fingerprint
        self.validation_fingerprint = validation_fingerprint
        rows = None
        active = kept
        if groups is not None:
            groups.of_row = groups.of_row.to(device)
            rows = torch.bincount(groups.of_row[kept], minlength=len(groups.names))
            active = rows > 0
        if table is not None:
            active = torch.zeros(table.size, dtype=torch.bool)
            rows = torch.zeros(table.size, dtype=torch.int64) if table.grouped else None
        # The predicted weights of a stream's rows are kept as they are.
        predicts = table is not None and not table.grouped and config.selector_update == "calibrated"
        self.state = core.init_selector(
            active.to(device),
            rows=None if rows is None else rows.to(device),
            activation="softmax" if predicts else config.selector_activation,  # type: ignore[arg-type]
            adam=config.selector_update == "adam",
            joinable=table is not None,
        )
        self.calibrated = False
        # Share of the weights' variance that rows alike explain; None if weights are not smoothed.
        self.smoothing: float | None = None
        self._uniform = True
        self.gate: tuple[Tensor, Tensor] | None = None
        self._alarmed = False
        self._full = False
        self._recent: list[Tensor] = []

    def units(self, ids: Tensor) -> Tensor:
        """Units of the given rows (sample ids), int64 `[b]`."""
        return ids if self.groups is None else self.groups.of_row[ids]

    def weights(self, ids: Tensor) -> Tensor:
        """Weights of the given rows, float32 `[b]`, mean one over the rows trained on; the gate included."""
        units = self.units(ids.to(self.state.logits.device))
        if self.table is not None:
            return core.open_weights(self.state, units)
        weights = core.sample_weights(self.state, units)
        if self.gate is not None:
            threshold, scale = self.gate
            weights = torch.where(self.state.logits[units] < threshold, 0.0, weights * scale)
        return weights

    def all_weights(self) -> Tensor:
        """Weights of all of the caller's rows, float32 `[row_count]` on the CPU; NaN for rows that preparation
        dropped.
        """
        weights = self.weights(torch.arange(len(self.kept))).cpu()
        return torch.where(self.kept, weights, torch.nan)

    def seen_weights(self, units: Tensor) -> Tensor:
        """Weights float32 `[b]` of units of a stream's table on the CPU; NaN for those not seen."""
        units = units.to(self.state.logits.device)
        unseen = torch.isneginf(self.state.logits[units])
        return self.weights(units).masked_fill(unseen, torch.nan).cpu()

    def set_weights(self, weights: Tensor) -> None:
        """Take over weights `[row_count]` (at least 0) of the caller's rows, scaled to mean one over those kept."""
        live = ~torch.isneginf(self.state.logits)
        logits = weights.to(live.device)[live].clamp(min=1e-30).log()
        core.replace_logits(self.state, live, self._for_activation(logits - logits.max()))
        self.calibrated = True
        self._uniform = False
        self.refresh_gate()

    def update(self, ids: Tensor, scores: Tensor) -> None:
        """Take in the scores `[b]` of the rows `ids` `[b]` of one optimizer step (all processes)."""
        device = self.state.logits.device
        units, scores = self.units(ids.to(device)), scores.to(device)
        if self.table is not None:
            core.admit(self.state, units)
        self._recent.append(torch.stack([scores.mean(), scores.std(unbiased=False)]))
        config = self.config
        if config.selector_update == "adam":
            core.update_adam(
                self.state,
                units,
                scores,
                learning_rate=config.selector_learning_rate,
                entropy_coef=config.selector_entropy_coef,
                betas=(config.selector_betas[0], config.selector_betas[1]),
            )
        else:
            core.update_sparse_centred(
                self.state,
                units,
                scores,
                learning_rate=config.selector_learning_rate,
                entropy_coef=config.selector_entropy_coef,
            )
        self._uniform = False

    def calibrate(
        self,
        scores: Tensor,
        validation_scores: Tensor,
        validation_weights: Tensor,
        predict: Callable[[Tensor, Calibration], Tensor] | None = None,
        smooth: bool = False,
    ) -> None:
        """Set all weights at once from the scores of rows and of held-back validation rows.

        Args:
            scores (`Tensor` float32 `[row_count, F]`): NaN for rows without a score (dropped in preparation, or
                left to `predict`).
            validation_scores (`Tensor` float32 `[c, F]`).
            validation_weights (`Tensor` float32 `[c]`): share of each validation row in the validation loss.
            predict (callable, *optional*): gives the weights `[row_count]` of all rows from the sample ids and the
                calibration of those scored; asked if kept rows have no score.
            smooth (`bool`): ask it also if all have one.
        """
        known, found, z = self._scored(scores, validation_scores, validation_weights)
        logits = found.logits
        kept = self.kept.to(known.device)
        smooth = smooth and bool(logits.max() > logits.min())
        if predict is not None and (smooth or bool((kept & ~known).any())):
            weights = predict(known.nonzero().squeeze(1), found).to(known.device)
            everything = torch.zeros_like(weights)
            everything[known] = z
            known, logits, z = kept, weights[kept].log(), everything[kept]
        if not self._warn_if_equal(logits):
            # From the best row down: logits are cut at some distance from it.
            logits -= logits.max()
            # Calibrated weights have plateaus: a trace of the score keeps the rows in order.
            logits = self.config.calibration_sharpness * logits + TILT * z.clamp(-5, 5)
        if self.table is not None:
            core.admit(self.state, self.table.sample.to(known.device))
        units = self._units_of_rows(known)
        if units is not None:
            # A group's weight is the mean weight its rows would have alone.
            logits = self._group_means(units, logits.exp()).clamp(min=1e-6).log()
            z = self._group_means(units, z)
        logits = self._for_activation(logits)
        live = ~torch.isneginf(self.state.logits)
        core.replace_logits(self.state, live, logits)
        self.state.score_mean[live] = z
        self.calibrated = True
        self._uniform = False
        self.refresh_gate()
        self._watch_collapse(float(core.effective_sample_size(self.state) / self.state.totals[3]))

    def fit_predictor(
        self,
        scores: Tensor,
        validation_scores: Tensor,
        validation_weights: Tensor,
        fit: Callable[[Tensor, Calibration], TabulatedPredictor],
    ) -> None:
        """Have the weights of a stream's rows predicted from now on.

        Args:
            scores, validation_scores, validation_weights: as `calibrate` takes them, of the stream's sample.
            fit (callable): makes the predictor from the scored rows' places in the sample and their calibration.
        """
        known, found, _ = self._scored(scores, validation_scores, validation_weights)
        self._warn_if_equal(found.logits)
        self.predictor = fit(known.nonzero().squeeze(1), found).to(self.state.logits.device)
        self.calibrated = True
        self._uniform = False

    def record(self, units: Tensor, weights: Tensor) -> None:
        """Keep the predicted weights `[b]` of a stream's rows, for statistics and export."""
        device = self.state.logits.device
        core.assign_weights(self.state, units.to(device), weights.to(device))

    def _scored(
        self, scores: Tensor, validation_scores: Tensor, validation_weights: Tensor
    ) -> tuple[Tensor, Calibration, Tensor]:
        """Which rows have a score, their calibration (endings included) and their standardised scores."""
        scores = scores.to(self.state.logits.device)
        known = ~torch.isnan(scores).any(-1)
        row_scores = scores[known]
        first, trusted = row_scores[:, 0], validation_scores[:, 0]
        found = calibration.calibrate(first, trusted, validation_weights)
        if row_scores.shape[1] > 1:
            weights = found.logits.exp()
            ends = ending_logits(row_scores[:, 1], validation_scores[:, 1], weights, validation_weights)
            found = found._replace(logits=found.logits + ends)
        z = (first - first.mean()) / first.std(unbiased=False).clamp(min=1e-8)
        self._recent.append(torch.stack([first.mean(), first.std(unbiased=False)]))
        return known, found, z

    def _warn_if_equal(self, logits: Tensor) -> bool:
        equal = float(logits.max() - logits.min()) == 0
        if equal:
            logger.warning(
                "The scores do not differ, or trusted rows score no better than training rows: there is nothing to "
                "select by, and training goes on with equal weights. More validation rows or `pilot_steps` may help."
            )
        return equal

    def _units_of_rows(self, rows: Tensor) -> Tensor | None:
        """The groups of some rows (a mask); None if each row is a unit of its own."""
        if self.table is not None:
            return self.table.sample.to(rows.device)[rows]
        return None if self.groups is None else self.groups.of_row[rows]

    def _for_activation(self, log_weights: Tensor) -> Tensor:
        """Logits that give weights in proportion to `log_weights.exp()`, of at most about 1."""
        if self.state.activation == "softmax":
            return log_weights
        share = 0.5 * log_weights.exp()
        return share.log() - torch.log1p(-share)

    def _group_means(self, groups: Tensor, values: Tensor) -> Tensor:
        """Mean of row values over each group that has rows, float32 `[live groups]`."""
        assert self.state.rows is not None
        live = ~torch.isneginf(self.state.logits)
        sums = torch.zeros_like(self.state.score_mean).index_add_(0, groups, values)
        return sums[live] / self.state.rows[live]

    def refresh_gate(self) -> None:
        """Recompute the threshold of the hard gate (`filter_rate`) from at most `STATISTICS_ROWS` rows."""
        if self.config.filter_rate == 0 or self._uniform:
            return
        self.gate = None
        rows = self._statistics_rows
        weights, logits = self.weights(rows), self.state.logits[self.units(rows.to(self.state.logits.device))]
        threshold = torch.quantile(logits, self.config.filter_rate)
        passed = torch.where(logits < threshold, 0.0, weights)
        self.gate = (threshold, weights.mean() / passed.mean())

    @property
    def _statistics_rows(self) -> Tensor:
        """A sample of the rows trained on; of the units seen, for a stream."""
        if self.table is None:
            return self._kept_sample
        seen = (~torch.isneginf(self.state.logits)).nonzero().squeeze(1)
        return seen[torch.from_numpy(evenly_spaced(len(seen), STATISTICS_ROWS)).to(seen.device)]

    @cached_property
    def _kept_sample(self) -> Tensor:
        rows = self.kept.nonzero().squeeze(1) if not bool(self.kept.all()) else None
        count = len(self.kept) if rows is None else len(rows)
        index = torch.from_numpy(evenly_spaced(count, STATISTICS_ROWS))
        return index if rows is None else rows[index]

    def metrics(self) -> dict[str, float]:
        """Numbers to log, none before a stream's first scores. Costs O(65536) at most; called when logging."""
        if float(self.state.totals[3]) == 0:
            return {}
        ess = float(core.effective_sample_size(self.state) / self.state.totals[3])
        weights = self.sampled_weights()
        out = {"selector/ess": ess, "selector/entropy": float(core.weight_entropy(self.state))}
        levels = (0.05, 0.25, 0.5, 0.75, 0.95)
        for level, value in zip(levels, weight_quantiles(weights.cpu(), levels).tolist(), strict=True):
            out[f"selector/weight_q{round(100 * level):02d}"] = value
        if self._recent:
            mean, std = torch.stack(self._recent).mean(0).tolist()
            out |= {"selector/score_mean": mean, "selector/score_std": std}
            self._recent.clear()
        if self.groups is not None or (self.table is not None and self.table.grouped):
            shares = sorted(self.group_shares().items(), key=lambda item: -item[1])
            out |= {f"selector/share/{name}": share for name, share in shares[:LOGGED_GROUPS]}
        self._watch_collapse(ess)
        if self.table is not None:
            self._watch_load(self.table.size)
        return out

    def sampled_weights(self) -> Tensor:
        """Weights float32 `[n]` of the same `STATISTICS_ROWS` rows at most; of a stream, of what has been seen."""
        return self.weights(self._statistics_rows)

    def _watch_load(self, size: int) -> None:
        """Warn once when so many keys have been seen that many of them share a unit."""
        seen = int((~torch.isneginf(self.state.logits)).sum())
        if seen > MAX_LOAD * size and not self._full:
            self._full = True
            logger.warning(
                f"{seen} of the {size} places of the selector's table are taken: about one key in "
                f"{1 / MAX_LOAD:.0f} shares its weight with another one by now. Raise `selector_table_size`."
            )

    def _watch_collapse(self, ess: float) -> None:
        """Warn once when the effective sample size, as a share of the rows, falls below `ess_alarm`."""
        if ess >= self.config.ess_alarm or self._alarmed:
            return
        self._alarmed = True
        remedy = "Raise `selector_entropy_coef`, lower `selector_learning_rate`, or give more validation rows."
        if self.config.selector_update == "calibrated":
            remedy = (
                "Give more validation rows, and rows that are like good training rows in form (the same columns and "
                "chat format), or lower `calibration_sharpness`."
            )
        logger.warning(
            f"The weights have nearly collapsed: their effective sample size is {ess:.1%} of the rows (alarm at "
            f"{self.config.ess_alarm:.1%}). {remedy}"
        )

    def group_shares(self) -> dict[str, float]:
        """Share of the total weight per group; the shares sum to one.

        Of a stream: of the groups in its sample, and of all others together (`"other"`).
        """
        assert self.state.rows is not None
        if self.table is not None:
            mass = torch.nan_to_num(core.sample_weights(self.state, slice(None)) * self.state.rows)
            mass /= mass.sum()
            named = {name: float(mass[unit]) for unit, name in self.table.names.items()}
            return named | {"other": 1 - sum(named.values())}
        assert self.groups is not None
        index = torch.arange(len(self.groups.names), device=self.state.logits.device)
        mass = core.sample_weights(self.state, index) * self.state.rows
        return dict(zip(self.groups.names, (mass / mass.sum()).tolist(), strict=True))

    def settings(self) -> dict[str, Any]:
        """What must not change between saving and loading."""
        config = self.config
        names = ("weight_estimator", "selector_update", "selector_granularity", "selector_group_column")
        more = ("selector_activation", "selector_weighting", "filter_rate", "calibration_sharpness")
        return {name: getattr(config, name) for name in (*names, *more)} | {
            "validation_weights": config.validation_weights,
            "validation_fingerprint": self.validation_fingerprint,
            "rows": len(self.kept),
            "rows_kept": int(self.kept.sum()),
            "train_fingerprint": self.fingerprint,
            **({} if self.table is None else {"selector_key_column": config.selector_key_column}),
        }

    def save(self, folder: str | os.PathLike[str], estimator: Mapping[str, Tensor]) -> None:
        """Write `selector.safetensors` and `selector.json` into `folder`, each atomically."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = self.state.tensors() | {
            ESTIMATOR_PREFIX + k: v.detach().cpu().contiguous() for k, v in estimator.items()
        }
        if self.predictor is not None:
            tensors |= {PREDICTOR_PREFIX + k: v.cpu() for k, v in self.predictor.tensors().items()}
        summary = {
            "format": FORMAT,
            "settings": self.settings(),
            "calibrated": self.calibrated,
            "smoothing": self.smoothing,
            "uniform": self._uniform,
            "gate": None if self.gate is None else [float(x) for x in self.gate],
        }
        atomically(folder / STATE_FILE, lambda path: save_file(tensors, path))
        atomically(folder / SUMMARY_FILE, lambda path: path.write_text(json.dumps(summary, indent=2)))

    def load(self, folder: str | os.PathLike[str]) -> dict[str, Tensor]:
        """Restore what `save` wrote; returns the estimator's tensors.

        Raises:
            FileNotFoundError: if the folder has no selector state.
            ValueError: if the state is damaged, or belongs to other data or settings.
        """
        folder = Path(folder)
        if not (folder / SUMMARY_FILE).is_file() or not (folder / STATE_FILE).is_file():
            raise FileNotFoundError(
                f"{folder} has no selector state ({STATE_FILE}, {SUMMARY_FILE}): it is not a checkpoint of a bilevel "
                "run. Resuming would silently forget the learned weights."
            )
        try:
            summary = json.loads((folder / SUMMARY_FILE).read_text())
            tensors = load_file(folder / STATE_FILE)
        except (json.JSONDecodeError, SafetensorError) as error:
            raise ValueError(
                f"The selector state in {folder} is damaged ({error}). Resume from another one."
            ) from error
        if summary.get("format") != FORMAT:
            raise ValueError(
                f"The selector state in {folder} has format {summary.get('format')!r}, this version reads {FORMAT}. "
                "Resume with the version of trl-bilevel that wrote it."
            )
        own, saved = self.settings(), summary["settings"]
        changed = [f"{k}: {saved.get(k)!r} then, {own[k]!r} now" for k in own if own[k] != saved.get(k)]
        if changed and not self.config.ignore_selector_fingerprint:
            raise ValueError(
                f"The selector state in {folder} belongs to other training data or settings ({'; '.join(changed)}). "
                "Resume with the same data and settings, or set `ignore_selector_fingerprint=True` if you know that "
                "the rows still mean the same."
            )
        parts = {prefix: _take(tensors, prefix) for prefix in (ESTIMATOR_PREFIX, PREDICTOR_PREFIX)}
        self.state.load_tensors(tensors)
        if parts[PREDICTOR_PREFIX]:
            self.predictor = TabulatedPredictor(**parts[PREDICTOR_PREFIX]).to(self.state.logits.device)
        self.calibrated, self._uniform = summary["calibrated"], summary["uniform"]
        self.smoothing = summary.get("smoothing")
        device = self.state.logits.device
        gate = summary["gate"]
        self.gate = (
            None if gate is None else (torch.tensor(gate[0], device=device), torch.tensor(gate[1], device=device))
        )
        return parts[ESTIMATOR_PREFIX]


def _take(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Take the tensors whose names start with `prefix` out of `tensors`; without the prefix."""
    return {name[len(prefix) :]: tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}
