"""`trl-bilevel evaluate MODEL`: held-out loss, preference against a baseline, safety with its price; with intervals.

    trl-bilevel evaluate MODEL --dataset test.jsonl [--baseline MODEL2 --judge reward:NAME]
    trl-bilevel evaluate MODEL --baseline MODEL2 --dataset test.jsonl --harmful harmbench --benign xstest

MODEL and MODEL2 are hub names, folders of models, or folders of PEFT adapters. Every option can be a key of a YAML
file (`--config FILE`).
"""

from __future__ import annotations

import json
import random
import re
import shlex
import sys
from argparse import SUPPRESS
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .arguments import option, parse

if TYPE_CHECKING:
    from ..evaluation.models import Settings

EXAMPLE = "example: trl-bilevel evaluate out --baseline BASE --dataset test.jsonl --output result.json"

# Options of TRL's ModelConfig that make a new adapter.
OF_ADAPTERS = re.compile(r"use_peft|lora_.*|use_dora|use_rslora")

T = TypeVar("T")


@dataclass
class EvaluateArguments:
    """What to measure, and how. The help of each field says what it is."""

    baseline: str | None = option(None, "Model to compare with, named as MODEL.")
    dataset: str | None = option(None, "Held-out rows: hub name, .json/.jsonl/.csv/.parquet file, or saved folder.")
    dataset_config: str | None = option(None, "Configuration of the hub data set.")
    dataset_split: str = option("test", "Split of the held-out rows.")
    harmful: str | None = option(None, "Harmful requests: harmbench, advbench, a file, or a hub name.")
    harmful_split: str = option("train", "Split of the harmful requests.")
    benign: str | None = option(
        None, "Benign requests that look harmful: lookalikes (ours), xstest, a file, or a hub name."
    )
    benign_split: str = option("train", "Split of the benign requests.")
    judge: str | None = option(
        None,
        "Compares the models' responses: reward:NAME, PACKAGE.MODULE:OBJECT; as stand-ins embedding (to the "
        "reference) or loss:NAME.",
    )
    refusal_judge: str = option("keywords", "Tells refusals: keywords, or PACKAGE.MODULE:OBJECT.")
    max_rows: int | None = option(None, "Draw so many rows of each set. Default: all.")
    max_length: int = option(2048, "Tokens of a row that are read.")
    max_new_tokens: int = option(64, "Tokens of a response.")
    batch_size: int = option(8, "Rows at a time.")
    temperature: float = option(0.0, "Of responses; 0: greedy.")
    chat_template_kwargs: str | None = option(
        None, "Arguments of the chat template, as JSON: '{\"enable_thinking\": false}'."
    )
    seed: int = option(0, "Of draws, sampled responses and intervals.")
    confidence: float = option(0.95, "Of the intervals.")
    resamples: int = option(9_999, "Of bootstrap and permutation test.")
    lm_eval_tasks: str | None = option(None, "Tasks of lm-evaluation-harness, separated by commas (needs lm-eval).")
    lm_eval_limit: int | None = option(None, "Rows per such task. Default: all.")
    lm_eval_folder: str | None = option(None, "Folder with task files of your own.")
    output: str | None = option(None, "JSON file for the result.")
    responses: str | None = option(
        None, "JSON-lines file for prompts and responses (of harmful requests, refusals and stubs only)."
    )
    json: bool = option(False, "Print the result as JSON in place of tables.")


def make_parser() -> Any:
    """The parser, as in TRL's scripts."""
    from trl import ModelConfig, TrlParser

    parser = TrlParser(
        (EvaluateArguments, ModelConfig),
        prog="trl-bilevel evaluate",
        usage="trl-bilevel evaluate MODEL [--config FILE.yaml] [OPTIONS]",
        epilog=EXAMPLE,
    )
    # As the weights were saved: nothing is trained here.
    parser.set_defaults(dtype="auto")
    for action in parser._actions:
        if action.dest == "dtype":
            action.help = "Data type to load the model in; 'auto' is the one it was saved in."
        elif OF_ADAPTERS.fullmatch(action.dest):
            action.help = SUPPRESS
    return parser


def check(args: EvaluateArguments, model_args: Any) -> None:
    """Refuse what cannot be meant, before anything is loaded."""
    from ..data.files import check_folder

    if model_args.model_name_or_path is None:
        raise ValueError("Give the model: `trl-bilevel evaluate MODEL ...` (hub name, folder, or adapter's folder).")
    if model_args.use_peft:
        raise ValueError("`use_peft` makes a new adapter, which evaluation has no use for: name the adapter's folder.")
    if not (args.dataset or args.lm_eval_tasks):
        raise ValueError("Give held-out rows by `dataset`, or tasks by `lm_eval_tasks`: there is nothing to measure.")
    if bool(args.harmful) != bool(args.benign) or (args.harmful and not args.dataset):
        raise ValueError(
            "`harmful`, `benign` and `dataset` go together: a model that refuses everything refuses what is harmful, "
            "so refusals are only reported beside over-refusal and utility. (`--harmful harmbench --benign "
            "lookalikes` are built in.)"
        )
    if args.judge and not (args.baseline and args.dataset):
        raise ValueError("`judge` compares responses to the rows of `dataset` with a `baseline`'s: give both.")
    for name in ("max_rows", "max_new_tokens", "batch_size", "resamples", "lm_eval_limit"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    if args.max_length < 2:
        raise ValueError(f"`max_length` must be at least 2, got {args.max_length}.")
    if not 0 < args.confidence < 1:
        raise ValueError(f"`confidence` must be between 0 and 1, got {args.confidence}.")
    if args.temperature < 0:
        raise ValueError(f"`temperature` must be at least 0, got {args.temperature}.")
    for name in ("output", "responses"):
        if getattr(args, name):
            check_folder(getattr(args, name), name)


def settings_of(args: EvaluateArguments, model_args: Any) -> Settings:
    """How models are loaded and asked."""
    from trl import get_quantization_config

    from ..evaluation.models import Settings

    try:
        template = json.loads(args.chat_template_kwargs or "{}")
    except json.JSONDecodeError:
        template = None
    if not isinstance(template, dict):
        raise ValueError(f"`chat_template_kwargs` must be a JSON object, got {args.chat_template_kwargs!r}.")
    if model_args.load_in_4bit and model_args.dtype == "auto":
        model_args.dtype = "bfloat16"
    load = {
        "dtype": model_args.dtype,
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "quantization_config": get_quantization_config(model_args),
    }
    return Settings(
        load={name: value for name, value in load.items() if value is not None},
        template=template,
        batch_size=args.batch_size,
        max_length=args.max_length,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        seed=args.seed,
        progress=True,
    )


def drawn(items: Sequence[T], args: EvaluateArguments) -> list[T]:
    """All items, or `max_rows` drawn by the seed, in their order."""
    if args.max_rows is None or args.max_rows >= len(items):
        return list(items)
    return [items[n] for n in sorted(random.Random(args.seed).sample(range(len(items)), args.max_rows))]


def main(args: EvaluateArguments, model_args: Any, command: Sequence[str] = ()) -> dict[str, Any]:
    """Measure, and return the result as plain data."""
    import torch

    from ..data.files import atomically
    from ..data.loading import load_rows
    from ..evaluation.figures import Intervals
    from ..evaluation.harness import harness
    from ..evaluation.judges import SCORERS, check_judge, load_judge, verdicts
    from ..evaluation.measurement import Work, measure, shown_responses
    from ..evaluation.preference import win_rate_with_swap
    from ..evaluation.prompts import benign_prompts, harmful_prompts
    from ..evaluation.refusal import KeywordRefusals, load_object
    from ..evaluation.report import result_of, versions
    from ..evaluation.rows import digest, read_rows

    settings = settings_of(args, model_args)
    intervals = Intervals(args.confidence, args.seed, args.resamples)
    refusals: Any = (
        KeywordRefusals() if args.refusal_judge == "keywords" else load_object(args.refusal_judge, "refusal_judge")
    )
    tasks = args.lm_eval_tasks.split(",") if args.lm_eval_tasks else []
    sets: dict[str, list[Any]] = {"dataset": [], "harmful": [], "benign": []}
    if args.dataset:
        rows = load_rows(args.dataset, split=args.dataset_split, config=args.dataset_config)
        sets["dataset"] = drawn(read_rows(rows), args)
    if args.harmful and args.benign:
        sets["harmful"] = drawn(harmful_prompts(args.harmful, args.harmful_split), args)
        sets["benign"] = drawn(benign_prompts(args.benign, args.benign_split), args)
    work = Work(
        rows=sets["dataset"],
        harmful=sets["harmful"],
        benign=sets["benign"],
        refusals=refusals,
        respond=bool(args.judge or args.responses),
        harness=harness(tasks, settings, limit=args.lm_eval_limit, folder=args.lm_eval_folder) if tasks else None,
    )
    if args.judge and not work.asked:
        raise ValueError("`judge` needs rows with prompts; those of `dataset` are plain text.")
    if args.judge:
        check_judge(args.judge)
    names = [model_args.model_name_or_path, *([args.baseline] if args.baseline else [])]
    measured = [measure(name, work, settings) for name in names]
    about: dict[str, Any] = {"refusal": getattr(refusals, "note", f"by {args.refusal_judge}")}
    preference = None
    if args.judge:
        judge: Any = load_judge(args.judge, settings)
        asked = [work.rows[number] for number in work.asked]
        both = verdicts(judge, asked, measured[0].responses, measured[1].responses)
        preference = win_rate_with_swap(*both, **intervals.bootstrap)
        about["preference"] = getattr(judge, "note", args.judge)
        about["preference_stand_in"] = bool(getattr(judge, "stand_in", False))
        about["order_blind"] = isinstance(judge, SCORERS)
    if args.responses:
        lines = [json.dumps(row) + "\n" for row in shown_responses(work, measured)]
        atomically(Path(args.responses), lambda path: path.write_text("".join(lines)))
    head = {
        "command": shlex.join(["trl-bilevel", "evaluate", *command]),
        "settings": asdict(args) | {"dtype": model_args.dtype, "load_in_4bit": model_args.load_in_4bit},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "versions": versions(),
        "data": {
            name: {"name": getattr(args, name), "rows": len(items), "sha256": digest([_plain(item) for item in items])}
            for name, items in sets.items()
            if items
        },
    }
    return head | result_of(measured, work, preference, about, intervals)


def _plain(row: Any) -> Any:
    return vars(row) if hasattr(row, "prompt") else row


def run(arguments: list[str]) -> None:
    """Parse, measure, show, save."""
    words = list(arguments)
    if words and not words[0].startswith("-"):
        words = ["--model_name_or_path", *words]
    args, model_args = parse(make_parser(), words)
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
        return
    show(drawing, result)
    if args.output:
        print(f"Result saved to {args.output}.")
