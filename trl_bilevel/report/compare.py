"""A run against a run with uniform weights: did selection help?"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..core.statistics import paired_standard_error
from .run import Run

# Without a standard error, a smaller relative change of a loss is not called a difference.
RELATIVE_CHANGE = 0.01


@dataclass
class Comparison:
    """Losses at the end of both runs, in nats per token; `warnings` say why they may not be comparable."""

    # Which rows, in words, and whether they drove the weights.
    rows: str
    flattered: bool
    run: float
    baseline: float
    # Of the difference, paired over rows.
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
    single = [r.told("evaluation", otherwise={}) for r in (run, baseline)]
    if single[0].get("fingerprint") and single[0]["fingerprint"] == single[1].get("fingerprint"):
        losses = [entry["losses"] for entry in single]
        mine, other = (float(np.mean(part)) for part in losses)
        shown = "" if len(losses[0]) == single[0]["rows"] else f" ({len(losses[0])} of {single[0]['rows']:,})"
        error = paired_standard_error(*losses)
        out.append(Comparison(f"eval rows{shown}, which chose nothing", False, mine, other, error, warnings))
    elif all(logged):
        mine, other = (points[-1][1] for points in logged)
        out.append(Comparison("eval rows, which chose nothing", False, mine, other, None, warnings))
    ends = [r.told("validation") for r in (run, baseline)]
    prints = [r.told("data", "validation_fingerprint") for r in (run, baseline)]
    if all(ends) and prints[0] and prints[0] == prints[1]:
        first, second = ends[0][-1], ends[1][-1]
        error = _weighted_error(run, first.get("rows", {}), second.get("rows", {}))
        rows = "trusted rows, which drove the weights"
        out.append(Comparison(rows, True, first["total"], second["total"], error, warnings))
    return out


def _weighted_error(run: Run, first: dict[str, list[float]], second: dict[str, list[float]]) -> float | None:
    """Standard error of the weighted mean over sets of paired differences; None if the rows are not the same ones."""
    variance = 0.0
    for name, losses in first.items():
        error = paired_standard_error(losses, second.get(name, []))
        weight = run.told("data", "validation", name, "weight")
        if error is None or weight is None:
            return None
        variance += (weight * error) ** 2
    return variance**0.5 if first else None


def _differences(run: Run, baseline: Run) -> list[str]:
    """In what the runs differ beside the weights, as far as their records say."""
    if not run.record or not baseline.record:
        return ["One of the runs has no record: whether rows, model and steps are the same is not known."]

    def both(*names: str) -> tuple[Any, Any]:
        return run.told(*names), baseline.told(*names)

    pairs = {"The models differ": both("model"), "The numbers of steps differ": both("steps", "done")}
    for name in ("learning_rate", "seed", "per_device_train_batch_size", "gradient_accumulation_steps"):
        pairs[f"{name} differs"] = both("settings", name)
    # A run without weights does not know the fingerprint of its rows.
    prints = both("data", "fingerprint")
    prints = prints if all(prints) else both("data", "rows")
    out = ["The training rows differ."] if prints[0] != prints[1] else []
    out += [
        f"{what}: {mine} and {other}."
        for what, (mine, other) in pairs.items()
        if None not in (mine, other) and mine != other
    ]
    if baseline.told("weights", "learned") or baseline.told("weights", "given"):
        out.append("The baseline has weights, too: it is no uniform mixing.")
    return out
