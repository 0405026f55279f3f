"""The result of an evaluation as one JSON document, as tables, and in sentences."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from .figures import Intervals, kept_rows, loss_difference, loss_figures, safety_differences, safety_figures
from .measurement import Measured, Work
from .preference import WinRate
from .statistics import Difference, Estimate

PACKAGES = ("trl-bilevel", "trl", "transformers", "torch", "peft", "datasets", "scipy", "numpy", "bitsandbytes")

# Of each figure: what it is called, whether it is a share, and which direction is better (0: neither).
LABELS: dict[str, tuple[str, bool, int]] = {
    "loss_row_mean": ("loss, mean over rows (nats per token)", False, -1),
    "loss_row_mean_per_byte": ("loss, mean over rows (nats per byte)", False, -1),
    "loss_per_token": ("loss per token (nats)", False, -1),
    "perplexity": ("perplexity per token", False, -1),
    "loss_per_byte": ("loss per byte (nats)", False, -1),
    "refusal": ("refuses harmful requests", True, 1),
    "compliance": ("complies with harmful requests", True, -1),
    "neither": ("neither (no text)", True, 0),
    "refusal_preferred": ("finds refusal likelier than compliance", True, 1),
    "over_refusal": ("refuses benign requests", True, -1),
    "win_rate": ("win rate against the baseline", True, 1),
    "wins": ("rows won", True, 1),
    "ties": ("rows tied", True, 0),
    "losses": ("rows lost", True, -1),
    "consistent": ("same verdict in both orders", True, 0),
    "first_position": ("verdicts for the first position", True, 0),
}


def result_of(
    measured: Sequence[Measured],
    work: Work,
    preference: WinRate | None,
    judge: Mapping[str, Any],
    intervals: Intervals,
) -> dict[str, Any]:
    """All figures and per-row values as plain data.

    Args:
        measured (`list[Measured]`): of the model, and of the baseline if there is one.
        work (`Work`): what was measured.
        preference (`WinRate`, *optional*): if both models' responses were judged.
        judge (`dict`): `preference`, `preference_stand_in`, `refusal`: what the judges are; `order_blind`: whether
            the order of the responses cannot play a role.
        intervals (`Intervals`): how intervals are made.
    """
    out: dict[str, Any] = {"models": [one.name for one in measured]}
    model, baseline = measured[0], measured[1] if len(measured) > 1 else None
    if model.losses is not None:
        kept = kept_rows(measured)
        section: dict[str, Any] = {
            "rows": int(kept.sum()),
            "rows_left_out": int((~kept).sum()),
            "figures": [loss_figures(one.losses, kept, intervals) for one in measured if one.losses],
        }
        if baseline is not None and baseline.losses is not None:
            name, difference = loss_difference(model.losses, baseline.losses, kept, intervals)
            section["difference"] = {name: difference}
        section["per_row"] = [
            {"loss_sums": one.losses.sums.tolist(), "tokens": one.losses.counts.tolist(), "cut": one.losses.cut}
            for one in measured
            if one.losses
        ]
        out["loss"] = section
    if preference is not None:
        names = ["win_rate", "wins", "ties", "losses"]
        if not judge["order_blind"]:
            names += ["consistent", "first_position"]
        out["preference"] = {
            "judge": judge["preference"],
            "stand_in": judge["preference_stand_in"],
            "figures": {name: getattr(preference, name) for name in names if getattr(preference, name) is not None},
            "per_row": {"row": work.asked, "score": preference.scores},
        }
    if model.safety is not None:
        section = {
            "judge": judge["refusal"],
            "figures": [safety_figures(one.safety, intervals) for one in measured if one.safety],
            "per_request": [
                {"harmful": one.safety.harmful, "preferred": one.safety.preferred, "benign": one.safety.benign}
                for one in measured
                if one.safety
            ],
        }
        if baseline is not None and baseline.safety is not None:
            section["difference"] = safety_differences(model.safety, baseline.safety, intervals)
        out["safety"] = section
    if any(one.harness for one in measured):
        out["lm_eval"] = [one.harness for one in measured]
    out["meaning"] = sentences(out, intervals.confidence)
    return out


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that the figures depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def shown(estimate: Estimate, share: bool, sign: bool = False, gap: str = " ") -> str:
    """A figure and its interval."""

    plus = "+" if sign else ""

    def number(value: float) -> str:
        form = ".1%" if share else ".4g" if abs(value) >= 100 else ".4f"
        return "?" if math.isnan(value) else f"{value:{plus}{form}}"

    return f"{number(estimate.value)}{gap}[{number(estimate.low)}, {number(estimate.high)}]"


def sentences(result: Mapping[str, Any], confidence: float) -> list[str]:
    """What the figures mean, a sentence each."""
    out = []
    two = len(result["models"]) > 1
    if "loss" in result:
        figures = result["loss"]["figures"][0]
        out.append(
            f"The model gives each token of the {result['loss']['rows']} held-out answers a perplexity of "
            f"{shown(figures['perplexity'], False)}."
        )
        for name, difference in result["loss"].get("difference", {}).items():
            out.append(_compared(name, difference))
    if "preference" in result:
        part = result["preference"]
        rate = part["figures"]["win_rate"]
        asked = "blind to order" if "consistent" not in part["figures"] else "asked in both orders"
        verdict = "no difference beyond chance" if rate.low <= 0.5 <= rate.high else "a difference beyond chance"
        out.append(
            f"The judge ({part['judge']}; {asked}) gives the model {shown(rate, True)} of the points "
            f"against the baseline: {verdict}."
        )
    if "safety" in result:
        figures = result["safety"]["figures"][0]
        out.append(
            f"The model refuses {shown(figures['refusal'], True)} of the harmful requests and "
            f"{shown(figures['over_refusal'], True)} of the benign ones ({result['safety']['judge']})."
        )
        if two:
            part = result["safety"]["difference"]
            out += [_compared(name, part[name]) for name in ("refusal", "over_refusal")]
    if out:
        out.append(
            f"Brackets are {confidence:.0%} intervals: they cover what more rows of the same kind would show, and say "
            "nothing of other kinds of rows, nor of training runs with other seeds."
        )
    return out


def _compared(name: str, difference: Difference) -> str:
    label, share, better = LABELS[name]
    verdict = "the rows do not tell the two apart"
    if difference.low > 0 or difference.high < 0:
        verdict = "better than the baseline" if difference.value * better > 0 else "worse than the baseline"
    return (
        f"{label[0].upper()}{label[1:]}: model minus baseline {shown(difference, share, sign=True)} "
        f"(p = {difference.p_value:.2g}): {verdict}."
    )


def show(drawing: Any, result: Mapping[str, Any]) -> None:
    """Print the tables and sentences.

    Args:
        drawing: prints: `table(title, columns, rows, right=...)` and `say(text, style)`.
        result: of `result_of`.
    """
    if "loss" in result:
        _table(drawing, "Held-out rows", result["loss"], result["models"])
    if "preference" in result:
        part = result["preference"]
        title = f"Preference by {part['judge']}"
        _table(drawing, title, {"figures": [part["figures"]]}, result["models"][:1])
    if "safety" in result:
        _table(drawing, f"Safety ({result['safety']['judge']})", _with_utility(result), result["models"])
    for name, part in zip(result["models"], result.get("lm_eval", []), strict=False):
        drawing.say(f"lm-eval, {name}:", "bold")
        for task, found in part["results"].items():
            drawing.say(f"  {task}: {', '.join(f'{k} {v}' for k, v in found.items() if k != 'alias')}")
    for sentence in result["meaning"]:
        drawing.say(f"- {sentence}")


def _with_utility(result: Mapping[str, Any]) -> dict[str, Any]:
    """The safety section with the held-out loss beside it: what the refusals cost."""
    section = result["safety"]
    name = next(iter(result["loss"].get("difference", {"loss_row_mean": None})))
    price = name if name in result["loss"]["figures"][0] else "loss_per_byte"
    figures = [
        safety | {price: loss[price]}
        for safety, loss in zip(section["figures"], result["loss"]["figures"], strict=True)
    ]
    out: dict[str, Any] = {"figures": figures}
    if "difference" in section:
        out["difference"] = section["difference"] | {price: result["loss"]["difference"][name]}
    if "preference" in result:
        figures[0]["win_rate"] = result["preference"]["figures"]["win_rate"]
    return out


def _table(drawing: Any, title: str, section: Mapping[str, Any], models: Sequence[str]) -> None:
    differences = section.get("difference", {})
    columns = ["", *("model", "baseline")[: len(models)], *(("difference", "p") if differences else ())]
    rows = []
    names = dict.fromkeys([name for figures in section["figures"] for name in figures])
    for name in [*names, *(name for name in differences if name not in names)]:
        label, share, _ = LABELS[name]
        cells = [shown(figures[name], share, gap="\n") if name in figures else "" for figures in section["figures"]]
        if differences:
            change = differences.get(name)
            cells += [shown(change, share, sign=True, gap="\n"), f"{change.p_value:.2g}"] if change else ["", ""]
        rows.append([label, *cells])
    drawing.table(title, columns, rows, right=columns[1:])
