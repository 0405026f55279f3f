"""A run against a run with uniform weights: did selection help?"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .run import Run

# Without a standard error, a smaller relative change of a loss is not called a difference.
RELATIVE_CHANGE = 0.01


@dataclass
class Comparison:
    """Losses at the end of both runs, in nats per token.

    Attributes:
        rows (`str`): which rows, in words.
        flattered (`bool`): True if these rows drove the weights.
        run, baseline (`float`): the losses.
        standard_error (`float`, *optional*): of their difference, paired over rows.
        warnings (`list[str]`): why the two may not be comparable.
    """

    rows: str
    flattered: bool
    run: float
    baseline: float
    standard_error: float | None = None
    warnings: list[str] = field(default_factory=list)

    @property
    def difference(self) -> float:
        """Loss of the run less that of the baseline: negative where selection helped."""
        return self.run - self.baseline

    @property
    def outcome(self) -> str:
        """`"helped"`, `"hurt"` or `"unclear"`: beyond two standard errors, or beyond a percent where there is none."""
        noise = RELATIVE_CHANGE * abs(self.baseline) if self.standard_error is None else 2 * self.standard_error
        if abs(self.difference) <= noise:
            return "unclear"
        return "helped" if self.difference < 0 else "hurt"


def compare(run: Run, baseline: Run) -> list[Comparison]:
    """What can be compared, that which chose nothing first; empty if nothing can."""
    out = []
    warnings = _differences(run, baseline)
    logged = [r.points("eval_loss") for r in (run, baseline)]
    single = [r.record.get("evaluation") or {} for r in (run, baseline)]
    if single[0].get("fingerprint") and single[0]["fingerprint"] == single[1].get("fingerprint"):
        losses = [entry["losses"] for entry in single]
        error = _standard_error({"": losses[0]}, {"": losses[1]}, {"": 1.0})
        mine, other = (float(np.mean(part)) for part in losses)
        shown = "" if len(losses[0]) == single[0]["rows"] else f" ({len(losses[0])} of {single[0]['rows']:,})"
        out.append(Comparison(f"eval rows{shown}, which chose nothing", False, mine, other, error, warnings))
    elif all(logged):
        mine, other = (points[-1][1] for points in logged)
        out.append(Comparison("eval rows, which chose nothing", False, mine, other, None, warnings))
    ends = [r.record.get("validation") or [] for r in (run, baseline)]
    prints = [r.record.get("data", {}).get("validation_fingerprint") for r in (run, baseline)]
    if all(ends) and prints[0] and prints[0] == prints[1]:
        first, second = ends[0][-1], ends[1][-1]
        error = _standard_error(first.get("rows", {}), second.get("rows", {}), _set_weights(run))
        rows = "trusted rows, which drove the weights"
        out.append(Comparison(rows, True, first["total"], second["total"], error, warnings))
    return out


def _set_weights(run: Run) -> dict[str, float]:
    return {name: entry["weight"] for name, entry in run.record["data"]["validation"].items()}


def _standard_error(
    first: dict[str, list[float]], second: dict[str, list[float]], weights: dict[str, float]
) -> float | None:
    """Of the weighted mean over sets of the mean paired difference; None if the rows are not the same ones."""
    variance = 0.0
    for name, losses in first.items():
        other = second.get(name, [])
        if len(losses) != len(other) or len(losses) < 2 or name not in weights:
            return None
        change = np.array(losses, dtype=float) - np.array(other, dtype=float)
        variance += weights[name] ** 2 * float(change.var(ddof=1)) / len(change)
    return variance**0.5 if first else None


def _differences(run: Run, baseline: Run) -> list[str]:
    """In what the runs differ beside the weights, as far as their records say."""
    mine, other = run.record, baseline.record
    if not mine or not other:
        return ["One of the runs has no record: whether rows, model and steps are the same is not known."]
    out = []
    if mine["data"]["fingerprint"] != other["data"]["fingerprint"]:
        out.append("The training rows differ.")
    if mine["model"] != other["model"]:
        out.append(f"The models differ: {mine['model']} and {other['model']}.")
    if mine["steps"]["done"] != other["steps"]["done"]:
        out.append(f"The numbers of steps differ: {mine['steps']['done']} and {other['steps']['done']}.")
    for name in ("learning_rate", "seed", "per_device_train_batch_size", "gradient_accumulation_steps"):
        if run.settings.get(name) != baseline.settings.get(name):
            out.append(f"{name} differs: {run.settings.get(name)} and {baseline.settings.get(name)}.")
    if other["weights"]["learned"] or other["weights"]["given"]:
        out.append("The baseline has weights, too: it is no uniform mixing.")
    return out
