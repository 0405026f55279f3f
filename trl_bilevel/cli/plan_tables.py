"""What `trl-bilevel plan` shows on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..planning.memory import GIB

if TYPE_CHECKING:
    from ..planning.memory import MemoryPlan
    from ..planning.shapes import ModelShape, RunShape

CARDS = (8, 12, 16, 24, 40, 48, 80, 141)


def show(report: dict[str, Any], plan: MemoryPlan, model: ModelShape, run: RunShape) -> None:
    """Tables of memory, of what saves it, and of work."""
    from rich.console import Console

    console = Console()
    console.print(_headline(report, model, run), highlight=False)
    console.print(_memory(plan, run))
    needed = plan.total_bytes / GIB
    if report["gpu_memory"] is None:
        cards = [card for card in CARDS if plan.fits(card)]
        where = f"a device of {cards[0]} GiB or more" if cards else "no single device"
        console.print(f"[bold]Needs {needed:.1f} GiB[/]: fits {where}. Give `--gpu_memory` to check one.")
    elif report["fits"]:
        console.print(f"[bold green]Fits[/]: {needed:.1f} of {report['gpu_memory']:g} GiB.")
    else:
        console.print(f"[bold red]Does not fit[/]: needs {needed:.1f} GiB, the device has {report['gpu_memory']:g}.")
    if plan.host_bytes:
        console.print(f"The paged optimizer keeps up to {plan.host_bytes / GIB:.2f} GiB in the host's memory.")
    if report["savings"]:
        console.print(_savings(report["savings"]))
    if report["fits"] is False:
        console.print(_way(report), highlight=False)
    console.print(_work(report["work"], run))
    for note in report["notes"]:
        console.print(f"Note: {note}", highlight=False)


def _headline(report: dict[str, Any], model: ModelShape, run: RunShape) -> str:
    how = f"{model.trainable / 1e6:.1f} M of them trained" if model.trainable < model.parameters else "all trained"
    base = f", base in {run.quantisation.replace('_', ' ')}" if run.quantisation else ""
    return (
        f"[bold]{report['model']['name']}[/]: {model.parameters / 1e9:.2f} billion parameters, {how}{base}. "
        f"{run.rows} rows of {run.tokens} tokens in a micro-batch, {run.accumulation} of them in a step, "
        f"{run.processes} process{'es' if run.processes > 1 else ''}, on {run.device}."
    )


def _memory(plan: MemoryPlan, run: RunShape) -> Any:
    from rich.table import Table

    table = Table(title=f"Memory at the peak ({plan.peak.name}), computed", show_footer=True)
    table.add_column("component", footer="total")
    table.add_column("GiB", justify="right", footer=f"{plan.total_bytes / GIB:.2f}")
    for name, size in plan.peak.parts.items():
        if size:
            table.add_row(name, f"{size / GIB:.2f}")
    if plan.reserve:
        table.add_row("CUDA context, fragmentation (assumed)", f"{plan.reserve / GIB:.2f}")
    return table


def _savings(savings: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table(title="What saves memory, each alone")
    for name in ("saves, GiB", "change", "settings", "price"):
        table.add_column(name, justify="right" if name.startswith("saves") else "left", overflow="fold")
    for saving in savings:
        saves = f"{saving['saves_bytes'] / GIB:.2f}"
        table.add_row(saves, saving["name"], _settings(saving["settings"]), saving["price"])
    return table


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


def _work(work: dict[str, Any], run: RunShape) -> Any:
    from rich.table import Table

    table = Table(title="Work over all processes, computed")
    table.add_column("what")
    table.add_column("FLOPs", justify="right")
    table.add_row("an optimizer step", _flops(work["step"]))
    if work["training"] is not None:
        table.add_row(f"training, {run.steps:,} steps", _flops(work["training"]))
    if run.pilots:
        table.add_row("pilot run", _flops(work["pilot"]))
        table.add_row("scoring of rows", _flops(work["scoring"]))
        if work["prediction"]:
            table.add_row(
                "reading of hidden states (weights of rows like it, of rows not scored)", _flops(work["prediction"])
            )
    if work["total"] is not None:
        ratio = work["total"] / work["plain"]
        table.add_row("the whole run", f"{_flops(work['total'])} ({ratio:.2f}x as many steps of plain SFT)")
    else:
        table.add_row("the whole run", "give --training_rows")
    return table


def _flops(flops: float) -> str:
    sizes = {"exa": 1e18, "peta": 1e15, "tera": 1e12, "giga": 1e9}
    prefix = next((name for name, size in sizes.items() if flops >= size), "giga")
    return f"{flops / sizes[prefix]:,.2f} {prefix}"
