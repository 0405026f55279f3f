"""`trl-bilevel completion`: a script that completes commands and options in bash and zsh."""

from __future__ import annotations

import argparse
import shlex
from importlib import import_module

from .options import SOURCES, option_groups

SCRIPT = """_trl_bilevel() {{
  local words
  COMPREPLY=()
  case "$COMP_CWORD:${{COMP_WORDS[1]}}" in
    1:*) words={commands} ;;
{cases}
  esac
  case "$COMP_CWORD:${{COMP_WORDS[COMP_CWORD]}}" in
    1:*|*:-*) COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}")) ;;
  esac
}}
complete -o default -F _trl_bilevel trl-bilevel
"""
ZSH = "autoload -Uz compinit bashcompinit\ncompinit\nbashcompinit\n"
EXAMPLES = """to try it:       source <(trl-bilevel completion bash)
to keep it:      trl-bilevel completion bash > ~/.local/share/bash-completion/completions/trl-bilevel
in zsh (.zshrc): source <(trl-bilevel completion zsh)
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
    print((ZSH if shell == "zsh" else "") + script(), end="")


def script() -> str:
    """The script for bash: a list of words per command, no program is started by completing."""
    from .main import COMMANDS

    cases = [f"    *:{name}) words={shlex.quote(' '.join(options(name)))} ;;" for name in COMMANDS]
    words = shlex.quote(" ".join([*COMMANDS, "--help", "--version"]))
    return SCRIPT.format(commands=words, cases="\n".join(cases))


def options(command: str) -> list[str]:
    """Options of a command, as they are written."""
    from .main import COMMANDS

    if command in SOURCES:
        names = [option.name for group in option_groups(command).values() for option in group]
        return [*sorted(f"--{name}" for name in names), "--config", "--help"]
    parser = import_module(COMMANDS[command][0]).make_parser()
    return [word for action in parser._actions for word in action.option_strings if word.startswith("--")]
