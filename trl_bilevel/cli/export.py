"""`trl-bilevel export`: the weighted rows of a run, all of them or the best, for other tools."""

from __future__ import annotations

import argparse
import json
from importlib import resources
from pathlib import Path
from typing import Any

from ..data.private import RECORD, ROWS, WEIGHTED, find_private


def make_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="trl-bilevel export",
        description="Write a run's weighted rows, or the best of them, to a file, or upload them.",
        epilog=resources.files("trl_bilevel.data").joinpath("text/export_help.txt").read_text(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("weighted", type=Path, help="weighted.parquet of a run (or .jsonl, .csv), or the run's folder")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--output", type=Path, help="file to write")
    target.add_argument("--push-to-hub", metavar="REPO", help="upload the rows with a data card: USER/NAME")
    formats = ("rows", "llama-factory", "axolotl")
    parser.add_argument("--format", choices=formats, default="rows", help="what reads the file (default: rows)")
    parser.add_argument("--top-k", type=int, help="keep the k rows of highest weight")
    parser.add_argument("--min-weight", type=float, help="keep rows of at least this weight (1 is the average)")
    text = "draw N rows in proportion to their weights, for tools without them"
    parser.add_argument("--resample", type=int, metavar="N", help=text)
    parser.add_argument("--seed", type=int, default=0, help="of --resample (default: 0)")
    parser.add_argument("--name", help="of the data set in the other tool's config (default: the file's name)")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--json", action="store_true", help="print what was done as JSON")
    return parser


def run(arguments: list[str]) -> None:
    """Filter, write, upload."""
    options = make_parser().parse_args(arguments)
    _check(options)
    from datasets import disable_progress_bars

    from ..data.export import write_for
    from ..data.loading import write_rows

    if options.json:
        disable_progress_bars()
    rows, weights = _weighted(_rows_path(options.weighted))
    chosen, files, address = _chosen(rows, weights, options), [options.output], None
    if options.push_to_hub:
        files, address = [], _push(chosen, weights, options)
    elif options.format == "rows":
        write_rows(chosen, options.output)
    else:
        files = write_for(options.format, chosen, options.output, options.name or options.output.stem)
    if options.json:
        facts = {"rows": len(chosen), "of": len(rows), "files": [str(file) for file in files], "hub": address}
        print(json.dumps(facts))
        return
    done = f"uploaded to {address}" if address else f"written to {files[0]}"
    print(f"{len(chosen)} of {len(rows)} rows {done}.")
    for file in files[1:]:
        print(f"Its entry for {options.format}: {file}.")


def _check(options: argparse.Namespace) -> None:
    from ..data.files import check_folder
    from ..data.loading import check_writable

    for name, count in (("top-k", options.top_k), ("resample", options.resample)):
        if count is not None and count < 1:
            raise ValueError(f"`--{name}` must be at least 1, got {count}.")
    if options.output is not None:
        check_folder(options.output, "--output")
        if options.format == "rows":
            check_writable(options.output)
    elif options.format != "rows":
        raise ValueError(f"The hub takes rows as they are: leave out `--format {options.format}`.")
    elif options.push_to_hub.count("/") != 1:
        raise ValueError(f"`--push-to-hub` takes USER/NAME, got {options.push_to_hub!r}.")


def _rows_path(given: Path) -> Path:
    """The file of rows; of a folder, that which its last run wrote: one that an earlier run left there is refused."""
    path = find_private(given, WEIGHTED) if given.is_dir() else given
    if not path.is_file():
        raise FileNotFoundError(f"There is no weighted data set {path}. `trl-bilevel sft` and `rank` write one.")
    if given == path or not (given / RECORD / "run.json").is_file():
        return path
    from ..report.run import load_run, mismatch

    run = load_run(given)
    noted = run.record.get("rows_file")
    # Of a stream, the record holds the weights of a sample only: that this run wrote the file must do.
    known = run.record.get("data", {}).get("streamed") and noted and Path(noted).name == path.name
    wrong = None if known else mismatch(run, path)
    if wrong is not None:
        own = f" This run wrote its rows to {noted}." if noted and Path(noted) != path.resolve() else ""
        raise ValueError(
            f"{path} {wrong}: the last run in {str(given)!r} did not write it.{own} Name the file in place of the "
            "folder to export it all the same."
        )
    return path


def _weighted(path: Path) -> tuple[Any, Any]:
    """The rows with `data_weight` and `data_rank`, and their weights float32 `[N]` as a tensor: NaN where missing."""
    import torch

    from ..core.statistics import data_ranks
    from ..data.identity import DATA_RANK, DATA_WEIGHT
    from ..data.loading import load_rows

    rows = load_rows(str(path))
    if DATA_WEIGHT not in rows.column_names:
        raise ValueError(f"{path} has no column data_weight: `trl-bilevel sft` and `rank` write files that have.")
    weights = torch.tensor([float("nan") if weight is None else weight for weight in rows[DATA_WEIGHT]])
    if DATA_RANK not in rows.column_names:
        # A stream's rows could not be ranked while they came by.
        rows = rows.add_column(DATA_RANK, data_ranks(weights).tolist())
    return rows, weights


def _chosen(rows: Any, weights: Any, options: argparse.Namespace) -> Any:
    """The rows asked for, or as many as wanted drawn from them in proportion to their weights."""
    import torch

    from ..core.resampling import systematic_resample

    keep = known = ~weights.isnan()
    if options.top_k is not None:
        keep = keep & (torch.tensor(rows["data_rank"][:]) < options.top_k)
    if options.min_weight is not None:
        keep = keep & (weights >= options.min_weight)
    kept = keep.nonzero().squeeze(1)
    if not len(kept):
        highest = f"the highest weight is {weights[known].max():.4g}" if known.any() else "none of them has a weight"
        raise ValueError(f"No row is left to write of {len(rows)}: {highest}. Lower `--min-weight`, raise `--top-k`.")
    if options.resample is None:
        return rows.select(kept.tolist())
    generator = torch.Generator().manual_seed(options.seed)
    drawn = kept[systematic_resample(weights[kept], options.resample, generator)]
    # The weights have done their work: they must not count a second time.
    return rows.select(drawn.tolist()).remove_columns(["data_weight", "data_rank"])


def _push(chosen: Any, weights: Any, options: argparse.Namespace) -> str:
    from huggingface_hub import DatasetCard

    from ..core.statistics import effective_sample_size
    from ..data.cards import data_card
    from ..data.files import read_json

    folder = options.weighted if options.weighted.is_dir() else options.weighted.parent
    record = read_json((folder.parent if folder.name == ROWS else folder) / RECORD / "run.json")
    count = int((~weights.isnan()).sum())
    results = [("effective sample size", f"{effective_sample_size(weights):.0%} of {count:,} rows")]
    note = "" if len(chosen) == len(weights) else f"They are a choice from {len(weights):,}."
    if options.resample is not None:
        note = (
            f"They were drawn in proportion to learned weights from {len(weights):,} rows, so some occur several "
            "times: train on them as they are."
        )
    repo = options.push_to_hub
    card = DatasetCard(data_card(repo, chosen, record, results, note))
    chosen.push_to_hub(repo, split="train", private=True if options.private else None)
    card.push_to_hub(repo)
    return f"https://huggingface.co/datasets/{repo}"
