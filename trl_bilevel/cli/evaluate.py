"""`trl-bilevel evaluate MODEL`: held-out loss, preference against a baseline, safety with its price; with intervals.

Models are hub names, folders of models, or folders of PEFT adapters.
"""

from __future__ import annotations

import json
import platform
import random
import re
import shlex
import sys
from argparse import SUPPRESS
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .._version import __version__
from ..evaluation.models import Settings
from .arguments import config_parser, loading, option, parse

EXAMPLE = "example: trl-bilevel evaluate out --baseline BASE --dataset test.jsonl --output result.json"

# Options of TRL's ModelConfig that make a new adapter.
OF_ADAPTERS = re.compile(r"use_peft|lora_.*|use_dora|use_rslora")
# The packages that the figures depend on.
PACKAGES = ("trl", "transformers", "torch", "peft", "datasets", "scipy", "numpy")
LEAST = {"max_rows": 1, "max_new_tokens": 1, "batch_size": 1, "resamples": 1, "max_length": 2, "temperature": 0}


@dataclass
class EvaluateArguments(Settings):
    """What to measure, and how. The help of each field says what it is."""

    baseline: str | None = option(None, "Model to compare with, named as MODEL.")
    dataset: str | None = option(None, "Held-out rows: hub name, .json/.jsonl/.csv/.parquet file, or saved folder.")
    dataset_config: str | None = option(None, "Configuration of the hub data set.")
    dataset_split: str = option("test", "Split of the held-out rows.")
    harmful: str | None = option(None, "Harmful requests: harmbench, a file, or a hub name.")
    harmful_split: str = option("train", "Split of the harmful requests.")
    benign: str | None = option(None, "Benign requests that look harmful: lookalikes (ours), a file, or a hub name.")
    benign_split: str = option("train", "Split of the benign requests.")
    judge: str | None = option(None, "Compares the models' responses: reward:NAME or PACKAGE.MODULE:OBJECT.")
    refusal_judge: str = option("keywords", "Tells refusals: keywords, or PACKAGE.MODULE:OBJECT.")
    max_rows: int | None = option(None, "Draw so many rows of each set. Default: all.")
    confidence: float = option(0.95, "Of the intervals.")
    resamples: int = option(9_999, "Of bootstrap and permutation test.")
    output: str | None = option(None, "JSON file for the result.")
    responses: str | None = option(None, "JSON-lines file for prompts and responses; nothing harmful is written.")
    json: bool = option(False, "Print the result as JSON in place of tables.")


def make_parser() -> Any:
    """The parser, as in TRL's scripts."""
    parser = config_parser("evaluate", EXAMPLE, EvaluateArguments, first=" MODEL")
    # As the weights were saved: nothing is trained here.
    parser.set_defaults(dtype="auto")
    for action in parser._actions:
        if OF_ADAPTERS.fullmatch(action.dest):
            action.help = SUPPRESS
    return parser


def check(args: EvaluateArguments, model_args: Any) -> None:
    """Refuse what cannot be meant, before anything is loaded."""
    from ..data.files import check_folder

    if model_args.model_name_or_path is None:
        raise ValueError("Give the model: `trl-bilevel evaluate MODEL ...` (hub name, folder, or adapter's folder).")
    if model_args.use_peft:
        raise ValueError("`use_peft` makes a new adapter, which evaluation has no use for: name the adapter's folder.")
    if not args.dataset:
        raise ValueError("Give held-out rows by `dataset`: there is nothing to measure.")
    if bool(args.harmful) != bool(args.benign):
        raise ValueError(
            "`harmful` and `benign` go together: a model that refuses everything refuses what is harmful, so refusals "
            "are only reported beside over-refusal. (`--harmful harmbench --benign lookalikes` are built in.)"
        )
    if args.judge and not args.baseline:
        raise ValueError("`judge` compares responses to the rows of `dataset` with a `baseline`'s: give both.")
    for name, least in LEAST.items():
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"`{name}` must be at least {least}, got {value}.")
    if not 0 < args.confidence < 1:
        raise ValueError(f"`confidence` must be between 0 and 1, got {args.confidence}.")
    for name in ("output", "responses"):
        if getattr(args, name):
            check_folder(getattr(args, name), name)


def drawn(items: Sequence[Any], args: EvaluateArguments) -> list[Any]:
    """All items, or `max_rows` drawn by the seed, in their order."""
    count = len(items) if args.max_rows is None else min(args.max_rows, len(items))
    return [items[n] for n in sorted(random.Random(args.seed).sample(range(len(items)), count))]


def main(args: EvaluateArguments, model_args: Any, command: Sequence[str] = ()) -> dict[str, Any]:
    """Measure, and return the result as plain data."""
    import torch
    from trl import get_quantization_config

    from ..data.files import atomically
    from ..data.loading import load_rows
    from ..evaluation.judges import find_judge
    from ..evaluation.models import Work, measure, shown_responses
    from ..evaluation.refusal import KeywordRefusals, load_object
    from ..evaluation.report import result_of
    from ..evaluation.rows import digest, read_rows, requests

    keywords = args.refusal_judge == "keywords"
    rows = load_rows(args.dataset or "", split=args.dataset_split, config=args.dataset_config)
    work = Work(
        rows=drawn(read_rows(rows), args),
        refusals=KeywordRefusals() if keywords else load_object(args.refusal_judge, "refusal_judge"),
        requests={
            kind: drawn(requests(kind, getattr(args, kind), getattr(args, f"{kind}_split")), args)
            for kind in (("harmful", "benign") if args.harmful else ())
        },
    )
    if args.judge or args.responses:
        work.asked = [number for number, row in enumerate(work.rows) if row.prompt]
    if args.judge and not work.asked:
        raise ValueError("`judge` needs rows with prompts; those of `dataset` are plain text.")
    judge = find_judge(args.judge, args) if args.judge else lambda: None
    if model_args.load_in_4bit and model_args.dtype == "auto":
        model_args.dtype = "bfloat16"
    load = loading(model_args) | {"quantization_config": get_quantization_config(model_args)}
    measured = [measure(name, work, args, load) for name in (model_args.model_name_or_path, args.baseline) if name]
    if args.responses:
        lines = [json.dumps(row) + "\n" for row in shown_responses(work, measured)]
        atomically(Path(args.responses), lambda path: path.write_text("".join(lines)))
    return {
        "command": shlex.join(["trl-bilevel", "evaluate", *command]),
        "settings": asdict(args) | {"dtype": model_args.dtype, "load_in_4bit": model_args.load_in_4bit},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "versions": {"python": platform.python_version(), "trl-bilevel": __version__}
        | {name: version(name) for name in PACKAGES},
        "data": {
            name: {"name": getattr(args, name), "rows": len(items), "sha256": digest(items)}
            for name, items in {"dataset": work.rows, **work.requests}.items()
        },
    } | result_of(measured, work, judge(), confidence=args.confidence, seed=args.seed, resamples=args.resamples)


def run(arguments: list[str]) -> None:
    """Parse, measure, show, save."""
    args, model_args = parse(make_parser(), arguments, "--model_name_or_path")
    check(args, model_args)
    from ..data.files import finite, write_json
    from ..evaluation.report import show
    from . import show as drawing

    # Judges of the user's own lie where the command is given, as with `python -m`.
    sys.path.insert(0, "")
    result = main(args, model_args, arguments)
    if args.output:
        write_json(Path(args.output), result)
    if args.json:
        print(json.dumps(finite(result), indent=1))
    else:
        show(drawing, result)
