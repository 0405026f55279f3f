"""`trl-bilevel completion`: a script that completes commands and options in bash and zsh, made by shtab."""

from __future__ import annotations

import argparse
from importlib import import_module
from typing import Any

from .arguments import grouped

EXAMPLES = """It takes some seconds to make: keep the script in a file, and make it anew after an update.

bash:  trl-bilevel completion bash > ~/.local/share/bash-completion/completions/trl-bilevel
zsh:   trl-bilevel completion zsh > ~/.zfunc/_trl-bilevel, with `fpath=(~/.zfunc $fpath)` before `compinit` in .zshrc
"""


def make_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="trl-bilevel completion",
        description="Prints a script that completes commands and options.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", choices=("bash", "zsh"))
    return parser


def run(arguments: list[str]) -> None:
    """Print the script."""
    shell = make_parser().parse_args(arguments).shell
    import shtab

    print(shtab.complete(whole_parser(), shell=shell), end="")


def whole_parser() -> argparse.ArgumentParser:
    """All commands with their options in one parser."""
    import shtab

    from .main import COMMANDS

    parser = argparse.ArgumentParser(prog="trl-bilevel")
    parser.add_argument("--version", action="store_true", help="print the version")
    commands = parser.add_subparsers()
    for name, text in COMMANDS.items():
        made: Any = import_module(f"trl_bilevel.cli.{name}").make_parser()
        own = grouped(made) if hasattr(made, "dataclass_types") else made
        actions: list[Any] = own._actions
        for action in actions:
            # Most values are names of files; those that are not, nobody can complete.
            if action.nargs != 0 and not action.choices:
                action.complete = shtab.FILE
        commands.add_parser(name, help=text, parents=[own], add_help=False)
    return parser
