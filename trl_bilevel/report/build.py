"""`write_report`: a run's folder, or a trainer, into one HTML file."""

import base64
import hashlib
from pathlib import Path
from typing import Any

from markupsafe import Markup

from .._version import __version__
from ..data.files import atomically
from ..data.private import PICTURES, REPORT, WEIGHTED, private_path
from ..extras import what_to_install
from .charts import Chart, charts
from .findings import compare, facts_of, notes
from .rows import SAMPLE, categories_of, rounds_of, row_table
from .run import Run, load_run
from .svg import save_png
from .text import FOLDER, TEMPLATES, clean, script_json

# Characters of a trusted row's question and answer, which explain scores.
TRUSTED_TEXT = 300


def write_report(
    run: Any,
    *,
    baseline: str | Path | None = None,
    output: str | Path | None = None,
    png: bool = False,
    rows_file: str | Path | None = None,
) -> Path:
    """Write the report of a run: one self-contained HTML file that needs no network.

    Args:
        run (`str`, `Path`, [`BilevelSFTTrainer`] or [`SelfRefineTrainer`]):
            The run's `output_dir`, or its trainer; of a trainer, the record and (if it weights rows, and no
            `rows_file` is given) `_rows/weighted.parquet` are written to its `output_dir` first. In a distributed run,
            call it on all processes: the first one writes.
        baseline (`str` or `Path`, *optional*):
            Folder of a run with uniform weights (`weight_estimator="none"`), all else equal, to compare with.
        output (`str` or `Path`, *optional*): file to write; default `_rows/report.html` in the run's folder,
            which `push_to_hub` leaves out.
        png (`bool`, defaults to `False`): also write the charts as PNG into `report_png` beside the report.
        rows_file (`str` or `Path`, *optional*):
            Parquet file of the weighted rows, if not `_rows/weighted.parquet`. Of a trainer, its record only notes a
            file of another format.

    Returns the path of the report.

    Raises:
        FileNotFoundError: if a folder or file is not there.
        ValueError: if a folder holds no run, or one that this version cannot read, or a file has the wrong ending.
        ImportError: if the extra `report` is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(what_to_install(error), name=error.name) from error
    trained = not isinstance(run, str | Path)
    folder = _save(run, rows_file) if trained else Path(run)
    target = Path(output) if output is not None else private_path(folder, REPORT)
    if trained and not run.args.should_save:
        return target
    if trained and rows_file is not None and Path(rows_file).suffix != ".parquet":
        rows_file = None
    found = load_run(folder, rows_file)
    other = None if baseline is None else load_run(baseline)
    if target.suffix not in (".html", ".htm"):
        raise ValueError(f"The report is an HTML file: give a name that ends in .html, got {str(target)!r}.")
    target.parent.mkdir(parents=True, exist_ok=True)
    page, drawn = render_page(found, other)
    atomically(target, lambda path: path.write_text(page, encoding="utf-8"))
    if png:
        pictures = target.parent / PICTURES
        pictures.mkdir(exist_ok=True)
        for chart in drawn:
            save_png(chart.draw, pictures / f"{chart.name}.png", chart.size)
    return target


def render_page(run: Run, baseline: Run | None = None) -> tuple[str, list[Chart]]:
    """The HTML of a report, and its charts."""
    style, script = ((FOLDER / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    other = None if baseline is None else clean(baseline.name, 80)
    categories = categories_of(run)
    facts = facts_of(run, categories, [] if baseline is None else compare(run, baseline), other)
    drawn = list(charts(run, categories, baseline))
    table = row_table(run, categories) if len(run.live) else None
    page = TEMPLATES.get_template("report.html.j2").render(
        run=run,
        baseline=other,
        verdict=next(notes("verdict", facts)),
        cards=list(notes("card", facts)),
        findings=sorted(notes("finding", facts), key=lambda finding: finding.tone != "warning"),
        charts=drawn,
        table=table,
        sample=SAMPLE,
        data=script_json({"rows": table, "trusted": _trusted(run), "why": _why(run)}) if table else None,
        rounds=rounds_of(run),
        style=Markup(style),
        script=Markup(script),
        policy=_policy(style, script),
        version=__version__,
    )
    return page, drawn


def _save(trainer: Any, rows_file: str | Path | None) -> Path:
    """Have the trainer's record and weighted rows on disk; returns its folder."""
    from datasets import Dataset

    if not hasattr(trainer, "callback_handler"):
        raise TypeError(
            f"`run` must be a run's folder or one of our trainers, got `{type(trainer).__name__}`: give `output_dir`."
        )
    folder = Path(trainer.args.output_dir)
    trainer.record.save(None if rows_file is None else str(Path(rows_file).resolve()))
    if trainer.weights is None or rows_file is not None or not trainer.args.should_save:
        return folder
    rows = trainer.weighted_dataset()
    # A stream is copied only if that is asked for.
    if isinstance(rows, Dataset):
        file = private_path(folder, WEIGHTED)
        file.parent.mkdir(parents=True, exist_ok=True)
        atomically(file, lambda path: rows.to_parquet(path))
    return folder


def _policy(style: str, script: str) -> str:
    """Content-Security-Policy: nothing but the report's own style and script, told by their hashes."""
    parts = {"style": style, "script": script}
    marks = {name: base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for name, part in parts.items()}
    allowed = "; ".join(f"{name}-src 'sha256-{mark}'" for name, mark in marks.items())
    return f"default-src 'none'; {allowed}; base-uri 'none'; form-action 'none'"


def _trusted(run: Run) -> list[dict[str, Any]]:
    """The trusted rows with a score, by score; with their texts, as far as the record has them."""
    out = []
    for row in sorted(run.trusted, key=lambda row: row["score"]):
        texts = {"question": row.get("prompt", ""), "answer": row["answer"]} if "answer" in row else {}
        told = {name: clean(text, TRUSTED_TEXT) for name, text in texts.items()}
        out.append({"score": round(row["score"], 5), "set": row.get("set", "")} | told)
    return out


def _why(run: Run) -> dict[str, Any]:
    """How weights came about, for the explanation of a row."""
    group = run.told("settings", "selector_group_column")
    return {
        "known": bool(run.record),
        "given": bool(run.told("weights", "given")),
        "group": clean(group) if group else None,
        "texts": run.rows_file is not None,
    }
