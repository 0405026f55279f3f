"""`python -m recipes.prepare`: the data of the recipes, from the hub, with a data card and a lock file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from datasets import disable_progress_bars

from recipes import prepare

# Options that say where data goes and comes from; the others are settings of the sets.
PLACES = ("recipe", "output", "revision", "lock")
SAFETY_ONLY = ("construction", "unsafe_answers", "refused_share")


def make_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.prepare",
        epilog="example: python -m recipes.prepare quality --output data/quality --train-rows 10000",
        description="Makes the training, validation and test rows of recipes/ from public sets on the hub. Beside "
        "them it writes a data card (README.md) and prepare.lock.json, from which the same rows can be made again.",
    )
    parser.add_argument("recipe", choices=("quality", "safety"), help="for recipes/quality or recipes/safety")
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    parser.add_argument("--train-rows", type=int, help="default: all usable rows; 56000 with --construction seal")
    parser.add_argument("--validation-rows", type=int, help="trusted rows (default: 1000)")
    parser.add_argument("--test-rows", type=int, help="rows for reporting (default: 500)")
    parser.add_argument("--max-characters", type=int, help="leave out longer rows (default: 6000)")
    parser.add_argument("--seed", type=int, help="of the draws (default: 0)")
    parser.add_argument("--construction", help="safety: 'seal' (default) or 'beavertails'")
    parser.add_argument("--unsafe-answers", help="safety: 'stub' (default), or 'published': as the source has them")
    parser.add_argument("--refused-share", type=float, help="safety, seal: red team requests refused (default: 0.25)")
    text = "branch, tag or commit of a source (default: main, resolved to its commit now); may be repeated"
    parser.add_argument("--revision", action="append", default=[], metavar="REPOSITORY=REVISION", help=text)
    parser.add_argument("--lock", type=Path, help="make the rows of this lock file again, and check that they are")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Read, draw, write; returns the exit code."""
    options = make_parser().parse_args(arguments)
    disable_progress_bars()
    try:
        lock = prepare.read_lock(options.lock) if options.lock else None
        prepared = prepare.prepare_recipe(options.recipe, **settings_of(options, lock))
        prepare.write_prepared(prepared, options.output, lock)
    except (ValueError, OSError) as error:
        print(f"recipes.prepare: {error}", file=sys.stderr)
        return 1
    for record in prepared.records:
        print(f"{record.source.repository} at {record.revision}: {record.read} rows read, {record.used} used.")
    for name, rows in prepared.sets.items():
        print(f"{len(rows)} rows in {options.output / name}.parquet")
    print(f"Licences and counts: {options.output}/README.md. To repeat: --lock {options.output}/{prepare.LOCK_FILE}")
    return 0


def settings_of(options: argparse.Namespace, lock: dict[str, Any] | None) -> dict[str, Any]:
    """Arguments for the maker of the sets: those of a lock file, or those given."""
    given = {name: value for name, value in vars(options).items() if value is not None and name not in PLACES}
    if lock is not None:
        if given or options.revision:
            raise ValueError("`--lock` fixes all settings and revisions: leave the other options out.")
        if lock["recipe"] != options.recipe:
            raise ValueError(f"The lock file is of `prepare {lock['recipe']}`, not of `prepare {options.recipe}`.")
        return lock["settings"] | {"revisions": lock["revisions"]}
    wrong = [name for name in SAFETY_ONLY if name in given and options.recipe == "quality"]
    if wrong:
        raise ValueError(f"`--{wrong[0].replace('_', '-')}` is for `prepare safety` only.")
    bad = [pair for pair in options.revision if not all(pair.partition("="))]
    if bad:
        raise ValueError(f"`--revision` takes REPOSITORY=REVISION (Open-Orca/OpenOrca=main), got {bad[0]!r}.")
    return given | {"revisions": dict(pair.split("=", 1) for pair in options.revision)}


if __name__ == "__main__":
    sys.exit(main())
