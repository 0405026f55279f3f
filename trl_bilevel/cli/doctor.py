"""`trl-bilevel doctor`: what will and will not work on this machine, why, and what to do about it.

    trl-bilevel doctor [--json] [--timeout 3]

Exit code 0 if a basic run works here, 1 if something that it needs is broken. Tokens are only reported as set or
unset.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

from .show import say, table

if TYPE_CHECKING:
    from .doctor_checks import Finding

COLOURS = {"ok": "green", "note": "cyan", "warning": "yellow", "broken": "bold red"}


def make_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="trl-bilevel doctor",
        epilog="example: trl-bilevel doctor --json",
        description="Checks versions, devices, optional libraries, hub, disk and launchers. Nothing is changed, no "
        "token is shown. Exit code 1 if something that a basic run needs is broken.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--timeout", type=float, default=3.0, help="seconds to wait for the hub")
    return parser


def run(arguments: list[str]) -> int:
    """Check and show; returns the exit code."""
    options = make_parser().parse_args(arguments)
    findings = list(examine(options.timeout))
    broken = [finding for finding in findings if finding.state == "broken"]
    if options.json:
        print(json.dumps({"ok": not broken, "findings": [asdict(finding) for finding in findings]}, indent=1))
    else:
        _show(findings)
    return 1 if broken else 0


def examine(timeout: float = 3.0) -> Iterator[Finding]:
    """All findings; a check that fails itself is one of them."""
    from . import doctor_checks as checks

    parts: dict[str, list[Callable[[], Iterator[Finding]]]] = {
        "versions": [checks.versions],
        "device": [checks.devices],
        "libraries": [checks.bitsandbytes, checks.vllm, checks.flash_attention, checks.triton],
        "hub": [lambda: checks.hub(timeout)],
        "disk": [checks.disk],
        "processes": [checks.processes],
    }
    for area, part in [(area, part) for area, some in parts.items() for part in some]:
        try:
            yield from part()
        except Exception as error:
            text = f"could not be checked: {type(error).__name__}"
            yield checks.Finding(area, getattr(part, "__name__", area), "warning", text, "Please report this.")


def _show(findings: list[Finding]) -> None:
    rows = [(found.what, (found.state, COLOURS[found.state]), found.found, found.remedy) for found in findings]
    table("Findings", ("what", "state", "found", "remedy"), rows)
    broken = sum(finding.state == "broken" for finding in findings)
    warned = sum(finding.state == "warning" for finding in findings)
    if broken:
        say(f"{broken} thing(s) that a basic run needs are broken. Start with their remedies.", "bold red")
    else:
        warnings = f", with {warned} warning(s)" if warned else ""
        say(f"A basic run works here{warnings}. Next: trl-bilevel demo", "bold green")
