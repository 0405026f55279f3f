"""The report of a run: one HTML file that opens without a network. `docs/report.md` says how to read it."""

from .build import write_report

__all__ = ["write_report"]
