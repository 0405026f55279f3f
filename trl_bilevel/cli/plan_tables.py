"""What `trl-bilevel plan` shows on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..planning.memory import GIB
from .show import say, table

if TYPE_CHECKING:
    from ..planning.memory import MemoryPlan
    from ..planning.shapes import ModelShape, RunShape

CARDS = (8, 12, 16, 24, 40, 48, 80, 141)


def show(report: dict[str, Any], plan: MemoryPlan, model: ModelShape, run: RunShape) -> None:
    """Tables of memory, of what saves it, and of work."""
    say(_headline(report, model, run))
    parts = [(name, size) for name, size in plan.peak.parts.items() if size]
    parts += [("CUDA context, fragmentation (assumed)", plan.reserve)] if plan.reserve else []
    rows: list[Any] = [(name, f"{size / GIB:.2f}") for name, size in [*parts, ("total", plan.total_bytes)]]
    table(f"Memory at the peak ({plan.peak.name}), computed", ("component", "GiB"), rows, right=("GiB",))
    needed = plan.total_bytes / GIB
    if report["gpu_memory"] is None:
        cards = [card for card in CARDS if plan.fits(card)]
        where = f"a device of {cards[0]} GiB or more" if cards else "no single device"
        say(f"Needs {needed:.1f} GiB: fits {where}. Give `--gpu_memory` to check one.", "bold")
    elif report["fits"]:
        say(f"Fits: {needed:.1f} of {report['gpu_memory']:g} GiB.", "bold green")
    else:
        say(f"Does not fit: needs {needed:.1f} GiB, the device has {report['gpu_memory']:g}.", "bold red")
    if plan.host_bytes:
        say(f"The paged optimizer keeps up to {plan.host_bytes / GIB:.2f} GiB in the host's memory.")
    if report["savings"]:
        rows = [
            (f"{saving['saves_bytes'] / GIB:.2f}", saving["name"], _settings(saving["settings"]), saving["price"])
            for saving in report["savings"]
        ]
        columns = ("saves, GiB", "change", "settings", "price")
        table("What saves memory, each alone", columns, rows, right=columns[:1])
    if report["fits"] is False:
        say(_way(report))
    table("Work over all processes, computed", ("what", "FLOPs"), _work(report["work"], run), right=("FLOPs",))
    for note in report["notes"]:
        say(f"Note: {note}")


def _headline(report: dict[str, Any], model: ModelShape, run: RunShape) -> str:
    how = f"{model.trainable / 1e6:.1f} M of them trained" if model.trainable < model.parameters else "all trained"
    base = f", base in {run.quantisation.replace('_', ' ')}" if run.quantisation else ""
    return (
        f"{report['model']['name']}: {model.parameters / 1e9:.2f} billion parameters, {how}{base}. "
        f"{run.rows} rows of {run.tokens} tokens in a micro-batch, {run.accumulation} of them in a step, "
        f"{run.processes} process{'es' if run.processes > 1 else ''}, on {run.device}."
    )


def _settings(settings: dict[str, Any]) -> str:
    return "\n".join(
        f"{name}: {str(value).lower() if isinstance(value, bool) else value}" for name, value in settings.items()
    )


def _way(report: dict[str, Any]) -> str:
    if report["way_to_fit"] is None:
        return "No combination of these makes it fit: take a smaller model or a larger device."
    settings: dict[str, Any] = {}
    for saving in report["way_to_fit"]:
        settings |= saving["settings"]
    return "With these it fits:\n  " + _settings(settings).replace("\n", "\n  ")


def _work(work: dict[str, Any], run: RunShape) -> list[tuple[str, str]]:
    rows = [("an optimizer step", _flops(work["step"]))]
    if work["training"] is not None:
        rows.append((f"training, {run.steps:,} steps", _flops(work["training"])))
    if run.pilots:
        rows += [("pilot run", _flops(work["pilot"])), ("scoring of rows", _flops(work["scoring"]))]
        if work["prediction"]:
            what = "reading of hidden states (weights of rows like it, of rows not scored)"
            rows.append((what, _flops(work["prediction"])))
    if work["following"]:
        rows.append(("losses of trusted rows before and after, for the report", _flops(work["following"])))
    whole = "give --training_rows"
    if work["total"] is not None:
        ratio = work["total"] / work["plain"]
        whole = f"{_flops(work['total'])} ({ratio:.2f}x as many steps of plain SFT)"
    return [*rows, ("the whole run", whole)]


def _flops(flops: float) -> str:
    sizes = {"exa": 1e18, "peta": 1e15, "tera": 1e12, "giga": 1e9}
    prefix = next((name for name, size in sizes.items() if flops >= size), "giga")
    return f"{flops / sizes[prefix]:,.2f} {prefix}"
