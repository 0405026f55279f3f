"""The summary: did selection help, how many rows carry the weight, what to look at. Its words are in `words.toml`."""

import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..core.statistics import effective_sample_size, paired_standard_error, rows_carrying
from .rows import Category
from .run import WEIGHTED_FILE, Run
from .text import FOLDER, SENTENCES, fill

WORDS = tomllib.loads((FOLDER / "words.toml").read_text(encoding="utf-8"))
CARRIED = 0.8
# Above this effective sample size, nothing has been selected; below the other, few rows carry the training.
NEARLY_UNIFORM, NEARLY_COLLAPSED = 0.98, 0.1
# Trusted rows that calibration should have held back; a category's share of the weight that is worth a word.
FEW_TRUSTED, STARVED = 8, 0.5
COSTLY = 0.3
# Without a standard error, a smaller relative change of a loss is not called a difference.
RELATIVE_CHANGE = 0.01
# What a run and its baseline should have in common.
SETTINGS = ("learning_rate", "seed", "per_device_train_batch_size", "gradient_accumulation_steps")
SAME = {"model": ("model",), "number of steps": ("steps", "done")} | {name: ("settings", name) for name in SETTINGS}


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
    # A run without weights does not know the fingerprint of its rows.
    marked = run.told("data", "fingerprint") and baseline.told("data", "fingerprint")
    mark = "fingerprint" if marked else "rows"
    out = ["The training rows differ."] if run.told("data", mark) != baseline.told("data", mark) else []
    for what, names in SAME.items():
        mine, other = run.told(*names), baseline.told(*names)
        if None not in (mine, other) and mine != other:
            out.append(f"The {what} differs: {mine} and {other}.")
    if baseline.told("weights", "learned") or baseline.told("weights", "given"):
        out.append("The baseline has weights, too: it is no uniform mixing.")
    return out


@dataclass
class Note:
    """What the summary says."""

    title: str
    text: str
    tone: str = "note"  # `"good"`, `"bad"` or `"neutral"` of the verdict, `"warning"` or `"note"` of a finding
    value: str = ""  # the number that a card shows
    target: str = ""  # the section of the report that shows what was found


def notes(kind: str, facts: dict[str, Any]) -> Iterator[Note]:
    """The notes of a kind (`"verdict"`, `"card"` or `"finding"`) that hold."""
    for entry in WORDS[kind]:
        words = {name: text for name, text in entry.items() if name not in ("when", "each")}
        holds = SENTENCES.compile_expression(entry.get("when", "true"), undefined_to_none=False)
        for each in facts[entry["each"]] if "each" in entry else [None]:
            known = facts | {"each": each}
            if holds(known):
                yield Note(**{name: fill(text, known) for name, text in words.items()})


def facts_of(
    run: Run,
    categories: Sequence[Category] = (),
    comparisons: Sequence[Comparison] = (),
    baseline: str | None = None,
) -> dict[str, Any]:
    """What the notes of a run rest on; `baseline` is the name of the run that it is compared with."""
    live, trusted, ledger = run.live, run.trusted_scores, run.ledger
    ess = effective_sample_size(live)
    scored = run.scores is not None and len(trusted) > 0
    scores = run.scores[~np.isnan(run.scores)] if run.scores is not None else live[:0]
    evals, total = run.points("eval_loss"), run.told("seconds", "total")
    best = min(evals, key=lambda point: point[1], default=(0, np.inf))
    chosen = run.told("seconds", "selection", otherwise=0.0) / (total or np.inf)
    kept = [entry for entry in ledger if entry.get("kept")]
    selection = [entry for entry in ledger if isinstance(entry.get("incoming_loss"), int | float)]
    spread = [entry.get("weight_std_within_group") for entry in ledger]
    cut = (e for e in ledger if (e.get("responses_cut") or 0) > 0.3 * (e.get("responses") or np.inf))
    return {
        "run": run,
        "comparisons": comparisons,
        "baseline": baseline,
        "rows_file": Path(run.told("rows_file", otherwise=WEIGHTED_FILE)).name,
        "wrong": list(run.wrong.items()),
        "last_step": max((entry["step"] for entry in run.history), default=0),
        "rows": len(live),
        "ess": ess,
        "uniform": len(live) > 0 and ess > NEARLY_UNIFORM,
        "collapsed": len(live) > 0 and ess < NEARLY_COLLAPSED,
        "carried": CARRIED,
        "carrying": rows_carrying(live, CARRIED),
        "dropped": 0 if run.weights is None or not len(live) else int(np.isnan(run.weights).sum()),
        "zero": int((live == 0).sum()),
        "few_trusted": scored and len(trusted) < FEW_TRUSTED,
        "above": (scores >= np.median(trusted)).mean() if scored and len(scores) else 0.0,
        "below": (scores < trusted.min()).mean() if scored and len(scores) else 0.0,
        "starved": [
            {"column": category.column, "share": share}
            for category in categories
            for share in category.shares
            if share.of_rows >= 0.05 and share.of_weight < STARVED * share.of_rows
        ],
        "evals": evals,
        "best": best,
        "rose": len(evals) > 2 and evals[-1][1] > 1.02 * best[1],
        "losses": run.validation_points(),
        "total": total,
        "chosen": chosen,
        "costly": chosen > COSTLY and not run.ranked,
        "selection": selection,
        "decided": [entry for entry in selection if entry.get("kept")],
        "kept": kept,
        # No kept round lowered the loss by more than two standard errors.
        "small": all(abs(e.get("difference") or 0.0) <= 2 * (e.get("standard_error") or 0.0) for e in kept),
        "cut": next(cut, None),
        "alike": bool(spread) and all(isinstance(std, int | float) and std < 0.1 for std in spread),
    }
