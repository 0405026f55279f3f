"""`trl-bilevel evaluate MODEL`: held-out loss, preference against a baseline, safety with its price; with intervals.

    trl-bilevel evaluate MODEL --dataset test.jsonl [--baseline MODEL2 --judge reward:NAME]
    trl-bilevel evaluate MODEL --baseline MODEL2 --dataset test.jsonl --harmful harmbench --benign xstest

MODEL and MODEL2 are hub names, folders of models, or folders of PEFT adapters. Every option can be a key of a YAML
file (`--config FILE`).
"""

from __future__ import annotations

import json
import random
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .arguments import parse
from .options import show_help

if TYPE_CHECKING:
    from ..evaluation.models import Settings

EXAMPLE = "example: trl-bilevel evaluate out --baseline BASE --dataset test.jsonl --output result.json"

T = TypeVar("T")


@dataclass
class EvaluateArguments:
    """What to measure, and how.

    Parameters:
        baseline (`str`, *optional*): model to compare with.
        dataset (`str`, *optional*), dataset_config (`str`, *optional*), dataset_split (`str`): held-out rows.
        harmful (`str`, *optional*), harmful_split (`str`): harmful requests.
        benign (`str`, *optional*), benign_split (`str`): benign requests that look harmful.
        judge (`str`, *optional*): of the preference between the models' responses to the held-out rows.
        refusal_judge (`str`): of refusals.
        max_rows (`int`, *optional*): draw so many of each set.
        max_length (`int`), max_new_tokens (`int`), batch_size (`int`), temperature (`float`): of reading and
            answering.
        chat_template_kwargs (`str`, *optional*): JSON object.
        seed (`int`), confidence (`float`), resamples (`int`): of draws and intervals.
        lm_eval_tasks (`str`, *optional*), lm_eval_limit (`int`, *optional*), lm_eval_folder (`str`, *optional*):
            tasks of lm-evaluation-harness to run, too.
        output (`str`, *optional*): JSON file for the result.
        responses (`str`, *optional*): JSON-lines file for prompts and responses.
        json (`bool`): print the result as JSON.
    """

    baseline: str | None = field(default=None, metadata={"help": "Model to compare with, named as MODEL."})
    dataset: str | None = field(
        default=None, metadata={"help": "Held-out rows: hub name, .json/.jsonl/.csv/.parquet file, or saved folder."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the hub data set."})
    dataset_split: str = field(default="test", metadata={"help": "Split of the held-out rows."})
    harmful: str | None = field(
        default=None, metadata={"help": "Harmful requests: harmbench, advbench, a file, or a hub name."}
    )
    harmful_split: str = field(default="train", metadata={"help": "Split of the harmful requests."})
    benign: str | None = field(
        default=None,
        metadata={"help": "Benign requests that look harmful: lookalikes (ours), xstest, a file, or a hub name."},
    )
    benign_split: str = field(default="train", metadata={"help": "Split of the benign requests."})
    judge: str | None = field(
        default=None,
        metadata={
            "help": "Compares the models' responses: reward:NAME, PACKAGE.MODULE:OBJECT; as stand-ins embedding (to "
            "the reference) or loss:NAME."
        },
    )
    refusal_judge: str = field(
        default="keywords", metadata={"help": "Tells refusals: keywords, or PACKAGE.MODULE:OBJECT."}
    )
    max_rows: int | None = field(default=None, metadata={"help": "Draw so many rows of each set. Default: all."})
    max_length: int = field(default=2048, metadata={"help": "Tokens of a row that are read."})
    max_new_tokens: int = field(default=64, metadata={"help": "Tokens of a response."})
    batch_size: int = field(default=8, metadata={"help": "Rows at a time."})
    temperature: float = field(default=0.0, metadata={"help": "Of responses; 0: greedy."})
    chat_template_kwargs: str | None = field(
        default=None, metadata={"help": "Arguments of the chat template, as JSON: '{\"enable_thinking\": false}'."}
    )
    seed: int = field(default=0, metadata={"help": "Of draws, sampled responses and intervals."})
    confidence: float = field(default=0.95, metadata={"help": "Of the intervals."})
    resamples: int = field(default=9_999, metadata={"help": "Of bootstrap and permutation test."})
    lm_eval_tasks: str | None = field(
        default=None, metadata={"help": "Tasks of lm-evaluation-harness, separated by commas (needs lm-eval)."}
    )
    lm_eval_limit: int | None = field(default=None, metadata={"help": "Rows per such task. Default: all."})
    lm_eval_folder: str | None = field(default=None, metadata={"help": "Folder with task files of your own."})
    output: str | None = field(default=None, metadata={"help": "JSON file for the result."})
    responses: str | None = field(
        default=None,
        metadata={"help": "JSON-lines file for prompts and responses (of harmful requests, refusals and stubs only)."},
    )
    json: bool = field(default=False, metadata={"help": "Print the result as JSON in place of tables."})


def make_parser(prog: str = "trl-bilevel evaluate") -> Any:
    """The parser, as in TRL's scripts."""
    from trl import ModelConfig, TrlParser

    parser = TrlParser(
        (EvaluateArguments, ModelConfig),
        prog=prog,
        usage=f"{prog} MODEL [OPTIONS]",
        epilog=EXAMPLE,
    )
    # As the weights were saved: nothing is trained here.
    parser.set_defaults(dtype="auto")
    return parser


def check(args: EvaluateArguments, model_args: Any) -> None:
    """Refuse what cannot be meant, before anything is loaded."""
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
        value = getattr(args, name)
        if value and not Path(value).resolve().parent.is_dir():
            raise ValueError(f"The folder of `{name}` does not exist: {value!r}. Make it first.")


def settings_of(args: EvaluateArguments, model_args: Any) -> Settings:
    """How models are loaded and asked."""
    from trl import get_quantization_config

    from ..evaluation.models import Settings

    try:
        template = json.loads(args.chat_template_kwargs or "{}")
    except json.JSONDecodeError as error:
        raise ValueError(
            f"`chat_template_kwargs` must be a JSON object, got {args.chat_template_kwargs!r}."
        ) from error
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

    from ..evaluation.figures import Intervals
    from ..evaluation.harness import harness
    from ..evaluation.judges import SCORERS, check_judge, load_judge, verdicts
    from ..evaluation.measurement import Work, measure, shown_responses
    from ..evaluation.preference import win_rate_with_swap
    from ..evaluation.prompts import benign_prompts, harmful_prompts
    from ..evaluation.refusal import KeywordRefusals, load_object
    from ..evaluation.report import result_of, versions
    from ..evaluation.rows import digest, read_rows
    from .data import load_rows

    settings = settings_of(args, model_args)
    intervals = Intervals(args.confidence, args.seed, args.resamples)
    refusals: Any = (
        KeywordRefusals() if args.refusal_judge == "keywords" else load_object(args.refusal_judge, "refusal_judge")
    )
    tasks = args.lm_eval_tasks.split(",") if args.lm_eval_tasks else []
    sets: dict[str, list[Any]] = {
        "dataset": drawn(
            read_rows(load_rows(args.dataset, split=args.dataset_split, config=args.dataset_config)), args
        )
        if args.dataset
        else [],
        "harmful": drawn(harmful_prompts(args.harmful, args.harmful_split), args) if args.harmful else [],
        "benign": drawn(benign_prompts(args.benign, args.benign_split), args) if args.benign else [],
    }
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
        about |= {"preference": getattr(judge, "note", args.judge)}
        about |= {"preference_stand_in": bool(getattr(judge, "stand_in", False))}
        about |= {"order_blind": isinstance(judge, SCORERS)}
    if args.responses:
        from ..data.files import atomically

        lines = [json.dumps(row) + "\n" for row in shown_responses(work, measured)]
        atomically(Path(args.responses), lambda path: path.write_text("".join(lines)))
    head = {
        "command": shlex.join(["trl-bilevel", "evaluate", *command]),
        "settings": asdict(args) | {"dtype": model_args.dtype, "load_in_4bit": model_args.load_in_4bit},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "versions": versions(),
        "data": {
            name: {"name": getattr(args, name), "rows": len(rows), "sha256": digest([_plain(row) for row in rows])}
            for name, rows in sets.items()
            if rows
        },
    }
    return head | result_of(measured, work, preference, about, intervals)


def _plain(row: Any) -> Any:
    return vars(row) if hasattr(row, "prompt") else row


def run(arguments: list[str]) -> None:
    """Parse, measure, show, save."""
    words = list(arguments)
    show_help("evaluate", words, EXAMPLE, dtype="'auto'")
    if words and not words[0].startswith("-"):
        words = ["--model_name_or_path", *words]
    args, model_args = parse(make_parser(), words)
    check(args, model_args)
    from rich.console import Console

    from ..data.files import finite, write_json
    from ..evaluation.report import show

    # Judges of the user's own lie where the command is given, as with `python -m`.
    sys.path.insert(0, "")
    result = main(args, model_args, arguments)
    if args.output:
        write_json(Path(args.output), result)
    if args.json:
        print(json.dumps(finite(result), indent=1))
        return
    show(Console(), result)
    if args.output:
        print(f"Result saved to {args.output}.")


if __name__ == "__main__":
    run(sys.argv[1:])
