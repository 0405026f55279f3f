"""What commands print: tables drawn by rich on a terminal; plain lines elsewhere, and where rich is not installed."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from typing import Any

# A text, or a text and the style that rich draws it in.
Cell = str | tuple[str, str]
Facts = Sequence[tuple[str, str]]
# Characters of a text that is cut to one line.
CUT = 60


def terminal(stderr: bool = False) -> Any:
    """A console of rich, or None: the output goes to a file or another program, or rich is not installed."""
    try:
        from rich.console import Console
    except ImportError:
        return None
    console = Console(stderr=stderr)
    return console if console.is_terminal else None


def say(text: str = "", style: str = "") -> None:
    """Print a sentence; it is never broken into lines, so that a command in it can be copied."""
    console = terminal() if style else None
    if console is None:
        print(text)
    else:
        console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[Cell]],
    *,
    right: Container[str] = (),
    cut: Container[str] = (),
) -> None:
    """Print a table.

    Args:
        title (`str`): above it.
        columns: names; without any, no header is printed.
        rows: a cell per column; of a cell's lines, the plain table makes one.
        right: columns that are aligned to the right.
        cut: columns of long texts, of which the start is shown.
    """
    lines, console = [list(row) for row in rows], terminal()
    if console is None:
        _print_plain(title, columns, lines, right, cut)
        return
    from rich.table import Table
    from rich.text import Text

    drawn = Table(
        title=Text(title), title_justify="left", show_header=any(columns), expand=any(c in cut for c in columns)
    )
    for name in columns:
        short = name in cut
        drawn.add_column(
            name,
            justify="right" if name in right else "left",
            overflow="ellipsis" if short else "fold",
            no_wrap=short,
            ratio=1 if short else None,
        )
    for line in lines:
        drawn.add_row(*(Text(cell) if isinstance(cell, str) else Text(*cell) for cell in line))
    console.print(drawn)


def _print_plain(
    title: str, columns: Sequence[str], rows: list[list[Cell]], right: Container[str], cut: Container[str]
) -> None:
    texts = [[" ".join((cell if isinstance(cell, str) else cell[0]).split("\n")) for cell in row] for row in rows]
    for row in texts:
        for place, name in enumerate(columns):
            if name in cut and len(row[place]) > CUT:
                row[place] = f"{row[place][: CUT - 3]}..."
    if any(columns):
        texts.insert(0, list(columns))
    widths = [max(len(row[place]) for row in texts) for place in range(len(columns))]
    print(f"\n{title}:")
    for row in texts:
        cells = zip(row, widths, columns, strict=True)
        print(
            "  ".join(
                text.rjust(width) if name in right else text.ljust(width) for text, width, name in cells
            ).rstrip()
        )


def show_summary(title: str, facts: Facts, notes: Sequence[str] = (), following: Sequence[str] = ()) -> None:
    """Print what a command says at its end: facts as a table or as lines; then notes, and commands to run next.

    Args:
        title (`str`): of the table.
        facts: names and values.
        notes: sentences.
        following: commands, each on a line of its own.
    """
    if terminal() is not None:
        table(title, ("", ""), [((name, "bold"), value) for name, value in facts])
    else:
        for name, value in facts:
            print(f"{name}: {value}")
    for note in notes:
        print(note)
    for command in following:
        print(f"Next: {command}")
