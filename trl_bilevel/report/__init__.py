"""The report of a run: one HTML file that opens without a network. `docs/report.md` says how to read it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .build import write_report

__all__ = ["write_report"]


def __getattr__(name: str) -> Any:
    """`write_report` on first use: other parts of this package do without the extra `report`."""
    if name != "write_report":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ..extras import what_to_install

    try:
        import matplotlib  # noqa: F401

        from .build import write_report
    except ImportError as error:
        if what_to_install(error) is None:
            raise
        raise ImportError(what_to_install(error), name=error.name) from error
    return write_report
