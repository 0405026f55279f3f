"""`trl-bilevel COMMAND ...`: dispatches to the commands without importing torch."""

from __future__ import annotations

import os
import sys
import traceback
from importlib import import_module
from pathlib import Path

from .._version import __version__
from ..extras import what_to_install

PACKAGE = Path(__file__).resolve().parents[1]
# Errors of these kinds that the package raises itself say what a user did, and what to do instead.
TOLD = (ValueError, TypeError, RuntimeError, ImportError)

# Of each command what it does; its module is called like it.
COMMANDS = {
    "rank": "what each training row is worth, for any trainer: rows with weights, and a report",
    "sft": "fine-tune on mixed data, with a weight learned for every row",
    "refine": "let the model answer anew what was answered badly, in guarded rounds",
    "evaluate": "held-out loss, preference and safety of a model, with intervals",
    "report": "write what came of a run as one HTML file",
    "export": "write weighted rows, or the best of them, for other tools or the hub",
    "sanity": "damage some of your clean rows, and see whether the weights find them",
    "plan": "does a run fit your GPU? memory and work, computed without loading the model",
    "doctor": "what will and will not work on this machine, and what to do about it",
    "completion": "print a script that completes commands and options in bash and zsh",
    "demo": "real model, real text, no hub, no GPU: uniform mixing against bilevel selection",
}

# Commands of earlier versions: what to do instead.
GONE = {"prepare": "run `python -m recipes.prepare` in a clone of the repository, whose recipes it belongs to"}

USAGE = (
    "usage: trl-bilevel COMMAND [OPTIONS]\n\n"
    "Bilevel data selection for Hugging Face TRL: a small trusted set teaches which training rows to learn from.\n\n"
    "commands:\n"
    + "".join(f"  {name:10} {text}\n" for name, text in COMMANDS.items())
    + "\n`trl-bilevel COMMAND --help` lists a command's options, with an example. Try `trl-bilevel demo` first.\n"
    "Exit codes: 0 done, 1 failed (TRL_BILEVEL_TRACEBACK=1 shows where), 2 wrong usage, 130 interrupted.\n"
)


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit code (0 done, 1 failed, 2 wrong usage, 130 interrupted)."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    command = arguments[0]
    if command == "--version":
        print(f"trl-bilevel {__version__}")
        return 0
    if command not in COMMANDS:
        known = f"Commands: {', '.join(COMMANDS)}; `trl-bilevel --help` says what they do."
        why = f"`{command}` is gone: {GONE[command]}" if command in GONE else f"unknown command {command!r}"
        print(f"trl-bilevel: {why}. {known}", file=sys.stderr)
        return 2
    try:
        return import_module(f"trl_bilevel.cli.{command}").run(arguments[1:]) or 0
    except KeyboardInterrupt:
        print(f"trl-bilevel {command}: interrupted.", file=sys.stderr)
        return 130
    except Exception as error:
        if os.environ.get("TRL_BILEVEL_TRACEBACK"):
            raise
        print(failure(command, error), file=sys.stderr)
        return 1


def failure(command: str, error: Exception) -> str:
    """What to print of an error: a sentence if it is the user's, else where it happened."""
    missing = what_to_install(error)
    if missing or is_users(error):
        return f"trl-bilevel {command}: {missing or error}\n(TRL_BILEVEL_TRACEBACK=1 shows where.)"
    where = "".join(traceback.format_exception(error))
    return f"{where}trl-bilevel {command}: stopped by an error that it did not expect, shown above."


def is_users(error: Exception) -> bool:
    """Whether an error tells the user of a mistake: one of the system (a file, the hub), or one by a `raise` of ours.

    The same kinds of errors from deep inside a library, or from our own code by accident, are crashes.
    """
    if isinstance(error, OSError):
        return True
    last = traceback.extract_tb(error.__traceback__)[-1]
    ours = Path(last.filename).resolve().is_relative_to(PACKAGE)
    return isinstance(error, TOLD) and ours and (last.line or "").startswith("raise ")


if __name__ == "__main__":
    sys.exit(main())
