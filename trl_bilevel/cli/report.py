"""`trl-bilevel report`: what came of a run, as one HTML file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..extras import what_to_install


def make_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="trl-bilevel report",
        epilog="example: trl-bilevel report out --baseline uniform_out",
        description="Write the report of a run: one HTML file that opens from disk, without a network.",
    )
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="output_dir of a run, finished or not")
    baseline = "a run with weight_estimator none, all else equal: did selection help?"
    parser.add_argument("--baseline", type=Path, metavar="RUN_DIR", help=baseline)
    parser.add_argument("--output", type=Path, help="file to write; default: RUN_DIR/_rows/report.html")
    parser.add_argument("--rows", type=Path, metavar="FILE", dest="rows_file", help="default: _rows/weighted.parquet")
    parser.add_argument("--png", action="store_true", help="write the charts as PNG too, for papers")
    return parser


def run(arguments: list[str]) -> None:
    """Read the run and write the report."""
    options = make_parser().parse_args(arguments)
    from ..report import write_report

    target = write_report(**vars(options))
    print(f"Report written to {target}. Open it in a browser.")
    if options.png:
        print(f"Charts written to {target.parent / 'report_png'}.")


def report_line(run: Any, **given: Any) -> str:
    """Write the report of a run that has just ended (see `write_report`); what to tell the user of it.

    A report that fails takes nothing from the run: its model and weights are saved by now.
    """
    try:
        from ..report import write_report

        return f"Report: {write_report(run, **given)}"
    except Exception as error:
        return f"No report: {what_to_install(error) or f'{type(error).__name__}: {error}'}"
