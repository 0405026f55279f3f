"""`trl-bilevel export`: the weighted rows of a run, all of them or the best, for other tools."""

from __future__ import annotations

import argparse
from pathlib import Path


def make_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="trl-bilevel export", description="Write a run's weighted rows, or the best of them, to a file."
    )
    parser.add_argument("weighted", type=Path, help="weighted.parquet of a run, or the run's folder")
    parser.add_argument("--output", type=Path, required=True, help=".parquet, .jsonl or .csv file to write")
    parser.add_argument("--top-k", type=int, help="keep the k rows of highest weight")
    parser.add_argument("--min-weight", type=float, help="keep rows of at least this weight (1 is the average)")
    return parser


def run(arguments: list[str]) -> None:
    """Filter and write."""
    options = make_parser().parse_args(arguments)
    import torch
    from datasets import Dataset

    from ..data.export import data_ranks
    from .data import check_writable, write_rows

    path = options.weighted / "weighted.parquet" if options.weighted.is_dir() else options.weighted
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no weighted data set {path}. `trl-bilevel sft` writes one at the end of a run."
        )
    check_writable(options.output)
    rows = Dataset.from_parquet(str(path))
    if "data_weight" not in rows.column_names:
        raise ValueError(
            f"{path} has no column data_weight: it is not what `trl-bilevel sft` writes as weighted.parquet."
        )
    if "data_rank" not in rows.column_names:
        # Of a stream: its rows could not be ranked while they came by.
        weights = torch.tensor([float("nan") if w is None else w for w in rows["data_weight"]])
        rows = rows.add_column("data_rank", data_ranks(weights).tolist())
    if options.top_k is not None and options.top_k < 1:
        raise ValueError(f"`--top-k` must be at least 1, got {options.top_k}.")
    kept = [
        index
        for index, (weight, rank) in enumerate(zip(rows["data_weight"], rows["data_rank"], strict=True))
        if weight is not None
        and weight == weight
        and (options.top_k is None or rank < options.top_k)
        and (options.min_weight is None or weight >= options.min_weight)
    ]
    write_rows(rows.select(kept), options.output)
    print(f"{len(kept)} of {len(rows)} rows written to {options.output}.")
