"""What a command says at its end: facts, and the next command to run."""

from __future__ import annotations

from collections.abc import Sequence

Facts = Sequence[tuple[str, str]]


def show_summary(title: str, facts: Facts, notes: Sequence[str] = (), following: Sequence[str] = ()) -> None:
    """Print facts as a table on a terminal, as lines of text elsewhere; then notes, and commands to run next.

    Args:
        title (`str`): of the table.
        facts: names and values.
        notes: sentences.
        following: commands, each on a line of its own, never wrapped, to be copied.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if console.is_terminal:
        table = Table(title=title, show_header=False, title_justify="left")
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in facts:
            table.add_row(Text(name), Text(value))
        console.print(table)
    else:
        for name, value in facts:
            print(f"{name}: {value}")
    for note in notes:
        print(note)
    for command in following:
        print(f"Next: {command}")
