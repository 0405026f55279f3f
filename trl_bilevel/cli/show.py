"""What commands print: tables drawn by rich on a terminal; plain lines elsewhere, and where rich is not installed."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from typing import Any

Facts = Sequence[tuple[str, str]]
Lines = Sequence[str]
# Characters of a text that is cut to one line.
CUT = 60


def terminal() -> Any:
    """A console of rich, or None: the output goes to a file or another program, or rich is not installed."""
    try:
        from rich.console import Console
    except ImportError:
        return None
    console = Console()
    return console if console.is_terminal else None


def table(
    title: str, columns: Lines, rows: Iterable[Sequence[str]], *, right: Container[str] = (), cut: Container[str] = ()
) -> None:
    """Print a table, its title above it, without a header if no column has a name.

    `right` columns are aligned to the right; of the long texts of `cut` ones, the start is shown.
    """
    console = terminal()
    if console is None:
        lines = [[_plain(cell, name in cut) for cell, name in zip(row, columns, strict=True)] for row in rows]
        lines = [list(columns), *lines] if any(columns) else lines
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        forms = [f"{'>' if name in right else '<'}{width}" for name, width in zip(columns, widths, strict=True)]
        print(f"\n{title}:")
        for line in lines:
            print("  ".join(format(text, form) for text, form in zip(line, forms, strict=True)).rstrip())
        return
    from rich.table import Table
    from rich.text import Text

    wide = any(name in cut for name in columns)
    drawn = Table(title=Text(title), title_justify="left", show_header=any(columns), expand=wide)
    for name in columns:
        shape: dict[str, Any] = {"overflow": "ellipsis", "no_wrap": True, "ratio": 1} if name in cut else {}
        drawn.add_column(name, **({"justify": "right" if name in right else "left", "overflow": "fold"} | shape))
    for row in rows:
        cells = zip(row, columns, strict=True)
        drawn.add_row(*(Text(" ".join(cell.split()) if name in cut else cell) for cell, name in cells))
    console.print(drawn)


def _plain(cell: str, cut: bool) -> str:
    text = " ".join(cell.split())
    return f"{text[: CUT - 3]}..." if cut and len(text) > CUT else text


def show_summary(title: str, facts: Facts, notes: Lines = (), following: Lines = ()) -> None:
    """Print what a command says at its end: facts as a table or as lines; then notes, and commands to run next."""
    lines = [*notes, *(f"Next: {command}" for command in following)]
    if terminal() is not None:
        table(title, ("", ""), facts)
    else:
        lines = [*(f"{name}: {value}" for name, value in facts), *lines]
    print("\n".join(lines))


def weight_facts(weights: Any) -> list[tuple[str, str]]:
    """For a summary: how unequal weights `[N]` are, of the rows that have one (not NaN)."""
    import numpy as np

    from ..core.statistics import effective_sample_size, rows_carrying

    carrying, known = rows_carrying(weights), max(1, np.isfinite(weights).sum())
    return [
        ("Effective sample size", f"{effective_sample_size(weights):.0%} of the rows"),
        ("80% of the weight", f"in {carrying / known:.0%} of the rows"),
    ]
