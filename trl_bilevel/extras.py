"""What only the report and the command line need, as the extra `report`; our part of training does without."""

from __future__ import annotations

PACKAGES = ("jinja2", "markupsafe", "matplotlib", "rich", "shtab")


def what_to_install(error: Exception) -> str | None:
    """The sentence for a user who lacks one of `PACKAGES`; None if the error is another one."""
    package = ((isinstance(error, ImportError) and error.name) or "").partition(".")[0]
    if package not in PACKAGES:
        return None
    return f'This needs {package}, which is not installed: pip install "trl-bilevel[report]"'
