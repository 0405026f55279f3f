"""`trl-bilevel COMMAND ...`: dispatches to the commands without importing torch."""

from __future__ import annotations

import sys
from importlib import import_module

from .._version import __version__

COMMANDS = {
    "sft": ("trl_bilevel.cli.sft", "fine-tune on mixed data, with a weight learned for every row"),
    "refine": ("trl_bilevel.cli.refine", "let the model answer anew what was answered badly, in guarded rounds"),
    "evaluate": ("trl_bilevel.cli.evaluate", "held-out loss, preference and safety of a model, with intervals"),
    "report": ("trl_bilevel.cli.report", "write what came of a run as one HTML file"),
    "export": (
        "trl_bilevel.cli.export",
        "write weighted rows, or the best of them, for other tools or the hub",
    ),
    "sanity": ("trl_bilevel.cli.sanity", "damage some of your clean rows, and see whether the weights find them"),
    "prepare": (
        "trl_bilevel.cli.prepare",
        "make the data of the recipes from the hub, with a data card and a lock file",
    ),
    "plan": ("trl_bilevel.cli.plan", "does a run fit your GPU? memory and work, computed without loading the model"),
    "doctor": ("trl_bilevel.cli.doctor", "what will and will not work on this machine, and what to do about it"),
    "completion": ("trl_bilevel.cli.completion", "print a script that completes commands and options in bash and zsh"),
    "demo": (
        "trl_bilevel.cli.demo",
        "real model, real text, no hub, no GPU: uniform mixing against bilevel selection",
    ),
}

USAGE = (
    "usage: trl-bilevel COMMAND [OPTIONS]\n\n"
    "Bilevel data selection for Hugging Face TRL: a small trusted set teaches which training rows to learn from.\n\n"
    "commands:\n"
    + "".join(f"  {name:10} {text}\n" for name, (_, text) in COMMANDS.items())
    + "\n`trl-bilevel COMMAND --help` lists a command's options, with an example. Try `trl-bilevel demo` first.\n"
    "Exit codes: 0 done, 1 failed (TRL_BILEVEL_TRACEBACK=1 shows where), 2 wrong usage, 130 interrupted.\n"
)


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit code (0 done, 1 failed, 2 wrong usage, 130 interrupted)."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"trl-bilevel {__version__}")
        return 0
    if arguments[0] not in COMMANDS:
        known = f"Commands: {', '.join(COMMANDS)}; `trl-bilevel --help` says what they do."
        print(f"trl-bilevel: unknown command {arguments[0]!r}. {known}", file=sys.stderr)
        return 2
    module = import_module(COMMANDS[arguments[0]][0])
    try:
        return module.run(arguments[1:]) or 0
    except KeyboardInterrupt:
        print(f"trl-bilevel {arguments[0]}: interrupted.", file=sys.stderr)
        return 130
    except Exception as error:
        import os

        if os.environ.get("TRL_BILEVEL_TRACEBACK"):
            raise
        speaks = isinstance(error, ValueError | TypeError | OSError | RuntimeError)
        what = error if speaks else f"{type(error).__name__}: {error}"
        print(f"trl-bilevel {arguments[0]}: {what}\n(TRL_BILEVEL_TRACEBACK=1 shows where.)", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
