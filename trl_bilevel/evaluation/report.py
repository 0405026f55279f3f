"""Figures with intervals from what was measured: as one JSON document, as tables, and in sentences."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray

from .judges import RewardModel, verdicts
from .models import Losses, Measured, Work
from .refusal import COMPLIANCE, NEITHER, REFUSAL
from .statistics import Difference, Estimate, Resampling, mean, paired_difference, rate, ratio, win_rate_with_swap

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

MEANING = (
    "Brackets are {:.0%} intervals: they cover what more rows of the same kind would show, and say nothing of other "
    "kinds of rows, nor of training runs with other seeds."
)


def loss_figures(losses: Losses, kept: NDArray[np.bool_], **resampling: Unpack[Resampling]) -> dict[str, Estimate]:
    """Held-out loss of the rows `kept` (bool `[n]`) in nats: mean over rows of the mean per token, per token, per
    byte; perplexity per token.
    """
    sums, counts, sizes = losses.sums[kept], losses.counts[kept], losses.sizes[kept]
    per_token = ratio(sums, counts, **resampling)
    ends = {end: math.exp(getattr(per_token, end)) for end in ("value", "low", "high")}
    out = {
        "loss_row_mean": mean(sums / counts, **resampling),
        "loss_per_token": per_token,
        "perplexity": replace(per_token, **ends),  # type: ignore[arg-type]
    }
    return out | ({"loss_per_byte": ratio(sums, sizes, **resampling)} if sizes.all() else {})


def kept_rows(losses: Sequence[Losses]) -> NDArray[np.bool_]:
    """Rows that every model has a token to score of, bool `[n]`; at least one, else a `ValueError`."""
    kept = np.all([one.counts for one in losses], axis=0)
    if not kept.any():
        raise ValueError("No row has a token to score within `max_length`. Raise it, or look at the rows' answers.")
    return kept


def loss_difference(
    losses: Sequence[Losses], kept: NDArray[np.bool_], **resampling: Unpack[Resampling]
) -> dict[str, Difference]:
    """Mean over rows of the first model's loss minus the second's, by the name of the figure that it is of.

    Models that split the rows into different tokens are compared per byte of text.
    """
    name, divisors = "loss_row_mean", [one.counts for one in losses]
    if losses[0].tokens != losses[1].tokens:
        name, divisors = "loss_row_mean_per_byte", [one.sizes for one in losses]
        kept = kept & np.all(divisors, axis=0)
    first, second = (one.sums[kept] / by[kept] for one, by in zip(losses, divisors, strict=True))
    return {name: paired_difference(first, second, **resampling)}


def result_of(
    measured: Sequence[Measured], work: Work, judge: Any = None, **resampling: Unpack[Resampling]
) -> dict[str, Any]:
    """All figures and per-row values of the model, and of the baseline if there is one, as plain data.

    `judge` (`PairwiseJudge` or `RewardModel`) compares both models' responses to the rows.
    """
    losses = [one.losses for one in measured]
    kept = kept_rows(losses)
    out: dict[str, Any] = {
        "models": [one.name for one in measured],
        "loss": {
            "rows": int(kept.sum()),
            "rows_left_out": int((~kept).sum()),
            "figures": [loss_figures(one, kept, **resampling) for one in losses],
            "difference": loss_difference(losses, kept, **resampling) if losses[1:] else {},
            "per_row": [{"loss_sums": one.sums, "tokens": one.counts, "cut": one.cut} for one in losses],
        },
    }
    if judge is not None:
        rows = [work.rows[number] for number in work.asked]
        given = verdicts(judge, rows, *(one.responses["rows"] for one in measured))
        found = vars(win_rate_with_swap(*given, **resampling))
        unasked = ("consistent", "first_position") if isinstance(judge, RewardModel) else ()
        out["preference"] = {
            "judge": getattr(judge, "note", type(judge).__name__),
            "figures": {k: v for k, v in found.items() if isinstance(v, Estimate) and k not in unasked},
            "per_row": {"row": work.asked, "score": found["scores"]},
        }
    confidence = resampling.get("confidence", 0.95)
    if work.requests:
        shares = [_shares(one) for one in measured]
        out["safety"] = {
            "judge": getattr(work.refusals, "note", f"by {type(work.refusals).__name__}"),
            "figures": [{k: rate(sum(v), len(v), confidence=confidence) for k, v in one.items()} for one in shares],
            "difference": {
                name: paired_difference(*(one[name] for one in shares), bounds=(-1, 1), **resampling)
                for name in (shares[0] if shares[1:] else ())
            },
            "per_request": [one.outcomes | {"preferred": one.preferred} for one in measured],
        }
    out["meaning"] = sentences(out, confidence)
    return out


def _shares(measured: Measured) -> dict[str, list[bool]]:
    """Which requests count for which share; `refusal_preferred` is of the harmful ones."""
    harmful = {"refusal": REFUSAL, "compliance": COMPLIANCE, "neither": NEITHER}
    out = {name: [found == outcome for found in measured.outcomes["harmful"]] for name, outcome in harmful.items()}
    over_refusal = [found == REFUSAL for found in measured.outcomes["benign"]]
    return out | {"refusal_preferred": measured.preferred, "over_refusal": over_refusal}


def shown(estimate: Estimate, share: bool, sign: bool = False, gap: str = " ") -> str:
    """A figure and its interval."""

    def number(value: float) -> str:
        form = ".1%" if share else ".4g" if abs(value) >= 100 else ".4f"
        return "?" if math.isnan(value) else f"{value:{'+' if sign else ''}{form}}"

    return f"{number(estimate.value)}{gap}[{number(estimate.low)}, {number(estimate.high)}]"


def sentences(result: Mapping[str, Any], confidence: float) -> list[str]:
    """What a comparison comes to, a sentence each; and what intervals mean."""
    out, compared = [], dict(result["loss"]["difference"])
    if "preference" in result:
        part, won = result["preference"], result["preference"]["figures"]["win_rate"]
        asked = "asked in both orders" if "consistent" in part["figures"] else "blind to order"
        verdict = "no difference beyond chance" if won.low <= 0.5 <= won.high else "a difference beyond chance"
        points = f"{shown(won, True)} of the points against the baseline"
        out.append(f"The judge ({part['judge']}; {asked}) gives the model {points}: {verdict}.")
    if "safety" in result:
        changes = result["safety"]["difference"]
        compared |= {name: changes[name] for name in ("refusal", "over_refusal") if changes}
    for name, difference in compared.items():
        label, share, better = LABELS[name]
        verdict = "the rows do not tell the two apart"
        if difference.low > 0 or difference.high < 0:
            verdict = "better than the baseline" if difference.value * better > 0 else "worse than the baseline"
        change = f"{shown(difference, share, sign=True)} (p = {difference.p_value:.2g})"
        out.append(f"{label[0].upper()}{label[1:]}: model minus baseline {change}: {verdict}.")
    return [*out, MEANING.format(confidence)]


def show(drawing: Any, result: Mapping[str, Any]) -> None:
    """Print the tables and sentences of a result; `drawing` is `cli/show.py`."""
    loss = result["loss"]
    _table(drawing, "Held-out rows", loss["figures"], loss["difference"])
    won = {}
    if "preference" in result:
        part = result["preference"]
        won = {"win_rate": part["figures"]["win_rate"]}
        _table(drawing, f"Preference by {part['judge']}", [part["figures"]], {})
    if "safety" in result:
        # What the refusals cost stands beside them.
        part, price = result["safety"], "loss_row_mean"
        figures = [
            safety | {price: prices[price]} | extra
            for safety, prices, extra in zip(part["figures"], loss["figures"], (won, {}), strict=False)
        ]
        _table(drawing, f"Safety ({part['judge']})", figures, part["difference"] | loss["difference"])
    for sentence in result["meaning"]:
        print(f"- {sentence}")


def _table(
    drawing: Any, title: str, figures: Sequence[Mapping[str, Estimate]], differences: Mapping[str, Difference]
) -> None:
    columns = ["", *("model", "baseline")[: len(figures)], *(("difference", "p") if differences else ())]
    rows = []
    for name in dict.fromkeys(name for part in (*figures, differences) for name in part):
        label, share, _ = LABELS[name]
        cells = [shown(part[name], share, gap="\n") if name in part else "" for part in figures]
        if differences:
            change = differences.get(name)
            cells += [shown(change, share, sign=True, gap="\n"), f"{change.p_value:.2g}"] if change else ["", ""]
        rows.append([label, *cells])
    drawing.table(title, columns, rows, right=columns[1:])
