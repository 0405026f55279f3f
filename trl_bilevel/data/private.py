"""Files of a run that hold text of its rows, and are never uploaded with its model.

They lie in folders whose names start with an underscore. All that transformers uploads of a run's folder, at its end
and as it saves, leaves out `_*`. Checkpoints are uploaded whole if `hub_strategy` says so: no text may lie in them.
"""

from collections.abc import Iterable
from pathlib import Path

# The run's record for its report, with the text of some trusted rows.
RECORD = "_record"
# What a user reads.
ROWS = "_rows"
WEIGHTED, REPORT, PICTURES = "weighted.parquet", "report.html", "report_png"
LEDGER, RESPONSES = "ledger.jsonl", "responses"
IN_ROWS = (WEIGHTED, REPORT, PICTURES, LEDGER, RESPONSES)


def private_path(folder: str | Path, name: str) -> Path:
    """Where a run writes one of `IN_ROWS`: `_rows/NAME` in its folder."""
    return Path(folder) / ROWS / name


def find_private(folder: str | Path, name: str) -> Path:
    """Where one of `IN_ROWS` is: at its place, or directly in the run's folder, where earlier versions wrote it."""
    path = private_path(folder, name)
    earlier = Path(folder) / name
    return earlier if earlier.exists() and not path.exists() else path


def check_upload(folder: str | Path, written: Iterable[str | Path] = ()) -> None:
    """Refuse to upload a run's folder while text of rows lies, or is to be written, where it would be taken along.

    Args:
        folder: the run's `output_dir`.
        written: files with text of rows that the run is to write.

    Raises:
        ValueError: names the files.
    """
    base = Path(folder).resolve()
    lying = [base / name for name in IN_ROWS if (base / name).exists()]
    paths = [path for path in [*lying, *(Path(name).resolve() for name in written)] if path.is_relative_to(base)]
    shown = sorted({str(part) for path in paths if not str(part := path.relative_to(base)).startswith("_")})
    if shown:
        raise ValueError(
            f"`push_to_hub` would upload text of rows: {', '.join(shown)} in {str(folder)!r}. Keep it out of the "
            f"folder, or in its {ROWS}/, which is never uploaded. (`trl-bilevel export --push-to-hub` uploads rows.)"
        )
