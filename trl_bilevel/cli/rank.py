"""`trl-bilevel rank ROWS --trusted ROWS`, or `accelerate launch -m trl_bilevel.cli.rank`: what each row is worth.

Writes the rows with `sample_id`, `data_weight` and `data_rank`, and a report beside them. No model is trained.
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .arguments import config_parser, loading, option, parse
from .report import report_line

EXAMPLE = (
    "example: trl-bilevel rank mixed.jsonl --trusted trusted.jsonl --model_name_or_path "
    "HuggingFaceTB/SmolLM2-135M-Instruct --output ranked.parquet"
)
# Rows that are shown at either end.
SHOWN = 5


@dataclass
class RankArguments:
    """Which rows to rank, by which trusted rows, and where the result goes. The help of each field says what it is."""

    rows: str | None = option(None, "Training rows: hub name, .json/.jsonl/.csv/.parquet file, or saved folder.")
    rows_config: str | None = option(None, "Configuration of the hub data set.")
    rows_split: str = option("train", "Split of the training rows.")
    trusted: list[str] | None = option(None, "Trusted rows, named alike; several sets make several objectives.")  # noqa: RUF009
    trusted_split: str = option("train", "Split of the trusted rows.")
    scorer: str | None = option(
        None, "Folder of a saved scorer, in place of trusted rows, model and how rows are read."
    )
    save_scorer: str | None = option(None, "Folder to keep the scorer in, for rows that come later.")
    output: str | None = option(None, "For the ranked rows: .parquet, .jsonl, .csv. Default: ROWS-ranked.parquet.")
    chat_template_kwargs: str | None = option(None, "Arguments of the chat template, as JSON.")
    report: bool = option(True, "Write the report.")


@dataclass
class ReadingArguments:
    """How rows are read and the model is run: arguments of `learn_weights`. The help of each field says what it is."""

    max_length: int = option(1024, "Tokens at which rows are cut.")
    seed: int = option(42, "Of the rows that the probe is made from, and of a pilot.")
    bf16: bool | None = option(None, "Compute in bfloat16. Default: on GPUs that can.")
    completion_only_loss: bool | None = option(None, "Score completions only. Default: if rows have them.")
    assistant_only_loss: bool = option(False, "Score what the assistant says only.")
    dataset_text_field: str = option("text", "Column of plain text.")
    gradient_checkpointing: bool | None = option(None, "Save memory in the pilot. Default: on GPUs.")
    trust_remote_code: bool = option(False, "Run code that comes with the model.")


def make_parser() -> Any:
    """The parser, as in TRL's scripts."""
    from ..weights.settings import WeightSettings

    parts = (RankArguments, ReadingArguments, WeightSettings)
    return config_parser("rank", EXAMPLE, *parts, first=" ROWS --trusted ROWS")


def main(args: RankArguments, reading: ReadingArguments, settings: Any, model_args: Any) -> None:
    """Rank the rows, write them and the report, and say what came of it."""
    from accelerate import PartialState
    from trl import get_quantization_config

    from ..data.assets import model_folder
    from ..data.files import json_object
    from ..data.loading import check_writable, load_rows, write_rows
    from ..weights.learn import learn_weights

    if not args.rows or bool(args.trusted) == bool(args.scorer):
        raise ValueError(
            "Give the rows to rank, and either trusted rows (`trl-bilevel rank ROWS --trusted ROWS`) or a saved "
            "scorer (`trl-bilevel rank ROWS --scorer FOLDER`)."
        )
    if args.scorer and (args.save_scorer or model_args.model_name_or_path):
        raise ValueError(f"`scorer={args.scorer!r}` has its own model: leave out `model_name_or_path`, `save_scorer`.")
    settings.resolve()
    if args.save_scorer and settings.weight_estimator != "probe":
        raise ValueError(
            f"`save_scorer` needs `weight_estimator='probe'`, got {settings.weight_estimator!r}: a pilot does not "
            "score rows as they come."
        )
    output = Path(args.output or f"{Path(args.rows).stem}-ranked.parquet")
    rows = load_rows(args.rows, split=args.rows_split, config=args.rows_config)
    check_writable(output, rows)
    if args.scorer:
        weights = _by_scorer(args.scorer, rows, reading.trust_remote_code, model_args)
        if PartialState().is_main_process:
            ranked = weights.to_dataset()
            write_rows(ranked, output)
            _tell(weights, ranked, output, [], weights.facts["model_name"])
        return
    assert args.trusted is not None
    trusted = {Path(name).stem: load_rows(name, split=args.trusted_split) for name in args.trusted}
    if len(trusted) < len(args.trusted):
        raise ValueError(f"`trusted` names sets alike: {args.trusted}. Give their files different names.")
    template = json_object(args.chat_template_kwargs, "chat_template_kwargs")
    name, notes = model_args.model_name_or_path, []
    if name is None:
        name = str(model_folder())
        notes.append("No model was named (`--model_name_or_path`): rows were ranked for SmolLM2-135M-Instruct.")
    quantization = get_quantization_config(model_args)
    weights = learn_weights(
        name,
        rows,
        trusted if len(trusted) > 1 else next(iter(trusted.values())),
        settings,
        **vars(reading),
        chat_template_kwargs=template or None,
        model_init_kwargs=loading(model_args) | ({"quantization_config": quantization} if quantization else {}),
        work_dir=output.with_name(f".{output.name}.choosing"),
    )
    if not PartialState().is_main_process:
        return
    ranked = weights.to_dataset()
    write_rows(ranked, output)
    if args.save_scorer:
        weights.scorer.save(args.save_scorer)
        notes.append(f"`trl-bilevel rank NEW_ROWS --scorer {shlex.quote(args.save_scorer)}` weighs further rows.")
    if args.report:
        notes.append(write_ranking(weights, ranked, output))
    _tell(weights, ranked, output, notes, model_args.model_name_or_path or "MODEL")


def _by_scorer(folder: str, rows: Any, trust_remote_code: bool, model_args: Any) -> Any:
    """Weights of rows by a saved scorer."""
    from trl import get_quantization_config

    from ..weights.scorer import RowScorer

    scorer = RowScorer.load(folder)
    quantization = get_quantization_config(model_args)
    kwargs = {"quantization_config": quantization} if quantization else {}
    scorer.use(**kwargs, trust_remote_code=trust_remote_code)
    return scorer.weigh(rows)


def write_ranking(weights: Any, ranked: Any, output: Path) -> str:
    """Write the record of a choice and its report into `NAME-report/`; what to tell the user of it."""
    from ..data.files import write_json
    from ..data.loading import write_rows
    from ..data.private import RECORD, WEIGHTED, private_path
    from ..weights.record import RUN_FILE, run_record, write_pilot, write_weights

    folder = output.with_name(f"{output.stem}-report")
    record, rows_file = folder / RECORD, output
    if output.suffix != ".parquet":
        # A report reads its rows from a parquet file.
        rows_file = private_path(folder, WEIGHTED)
        write_rows(ranked, rows_file)
    write_weights(record, weights.values)
    if weights.choice is not None:
        write_pilot(record, weights.choice, weights.decode)
    write_json(record / RUN_FILE, run_record(weights.facts, str(rows_file.resolve())))
    weights.save(folder)
    return report_line(folder, output=folder / "report.html")


def _tell(weights: Any, ranked: Any, output: Path, notes: list[str], model: str) -> None:
    import numpy as np

    from ..data.formats import question_and_answer
    from .show import show_summary, table, weight_facts

    values = weights.values.numpy()
    places = [int(place) for place in np.argsort(ranked["data_rank"][:]) if np.isfinite(values[place])]
    known, count = len(places), min(SHOWN, len(places) // 2)
    for title, ends in (("most", places[:count]), ("least", places[: -count - 1 : -1])):
        lines = [(f"{values[place]:.2f}", *question_and_answer(ranked[place])) for place in ends]
        table(f"Rows of {title} weight", ("weight", "question", "answer"), lines, cut=("question", "answer"))
    facts = [
        ("Ranked rows", str(output)),
        ("Rows", f"{len(values):,}" + (f", {len(values) - known:,} without a weight" if known < len(values) else "")),
        *weight_facts(values),
        ("Time", f"{weights.facts.get('seconds', 0):.0f} s"),
    ]
    file = shlex.quote(str(output))
    drawn = f"trl-bilevel export {file} --resample {known} --format"
    following = [
        f"trl-bilevel sft --model_name_or_path {shlex.quote(model)} --use_peft --dataset_name {file} "
        "--weight_estimator none --selector_weighting resample --output_dir out   # TRL",
        f"{drawn} llama-factory --output llama-factory.jsonl   # LLaMA-Factory",
        f"{drawn} axolotl --output axolotl.jsonl   # axolotl",
    ]
    show_summary("Ranked", facts, notes, following)


def run(arguments: list[str]) -> None:
    """Parse and rank."""
    main(*parse(make_parser(), arguments, "--rows"))


if __name__ == "__main__":
    run(sys.argv[1:])
