"""`trl-bilevel rank ROWS --trusted ROWS`: what each training row is worth, without training a model.

    trl-bilevel rank mixed.jsonl --trusted trusted.jsonl --model_name_or_path MODEL --output ranked.parquet
    accelerate launch -m trl_bilevel.cli.rank mixed.jsonl --trusted trusted.jsonl ...

Writes the rows with `sample_id`, `data_weight` and `data_rank`, and a report beside them. Every setting of
`learn_weights` is an option, and a key of the YAML file (`--config FILE`).
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from .arguments import option, parse

EXAMPLE = (
    "example: trl-bilevel rank mixed.jsonl --trusted trusted.jsonl --model_name_or_path "
    "HuggingFaceTB/SmolLM2-135M-Instruct --output ranked.parquet"
)
# Rows that are shown at either end, and characters of each text.
SHOWN, TEXT = 5, 160


@dataclass
class RankArguments:
    """Which rows to rank, by which trusted rows, and where the result goes. The help of each field says what it is."""

    rows: str | None = option(None, "Training rows: hub name, .json/.jsonl/.csv/.parquet file, or saved folder.")
    rows_config: str | None = option(None, "Configuration of the hub data set.")
    rows_split: str = option("train", "Split of the training rows.")
    trusted: list[str] | None = option(None, "Trusted rows, named alike; several sets make several objectives.")  # noqa: RUF009
    trusted_split: str = option("train", "Split of the trusted rows.")
    output: str | None = option(
        None, "File for the ranked rows: .parquet, .jsonl, .csv. Default: ROWS-ranked.parquet."
    )
    max_length: int = option(1024, "Tokens at which rows are cut.")
    seed: int = option(42, "Of the pilot, and of what is held back.")
    bf16: bool | None = option(None, "Compute in bfloat16. Default: on GPUs that can.")
    completion_only_loss: bool | None = option(None, "Score completions only. Default: if rows have them.")
    assistant_only_loss: bool = option(False, "Score what the assistant says only.")
    dataset_text_field: str = option("text", "Column of plain text.")
    chat_template_kwargs: str | None = option(None, "Arguments of the chat template, as JSON.")
    gradient_checkpointing: bool | None = option(None, "Save memory in the pilot. Default: on GPUs.")
    trust_remote_code: bool = option(False, "Run code that comes with the model.")
    report: bool = option(True, "Write the report.")


def make_parser() -> Any:
    """The parser, as in TRL's scripts."""
    from trl import ModelConfig, TrlParser

    from ..weights.settings import WeightSettings

    return TrlParser(
        (RankArguments, WeightSettings, ModelConfig),
        prog="trl-bilevel rank",
        usage="trl-bilevel rank ROWS --trusted ROWS [--config FILE.yaml] [OPTIONS]",
        epilog=EXAMPLE,
    )


def main(args: RankArguments, settings: Any, model_args: Any) -> None:
    """Rank the rows, write them and the report, and say what came of it."""
    from accelerate import PartialState
    from trl import get_quantization_config

    from ..data.loading import check_writable, load_rows, write_rows
    from ..weights.learn import learn_weights

    if not args.rows or not args.trusted:
        raise ValueError("Give the rows to rank and trusted rows: `trl-bilevel rank ROWS --trusted ROWS`.")
    output = Path(args.output or f"{Path(args.rows).stem}-ranked.parquet")
    rows = load_rows(args.rows, split=args.rows_split, config=args.rows_config)
    check_writable(output, rows)
    template = _template(args.chat_template_kwargs)
    name, notes = model_args.model_name_or_path, []
    if name is None:
        from ..data import assets

        name = str(assets.model_folder())
        notes.append("No model was named (`--model_name_or_path`): rows were ranked for SmolLM2-135M-Instruct.")
    loading = {
        "dtype": model_args.dtype,
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "quantization_config": get_quantization_config(model_args),
    }
    weights = learn_weights(
        name,
        rows,
        _trusted(args),
        settings,
        **{field.name: getattr(args, field.name) for field in fields(args) if field.name in _PASSED},
        chat_template_kwargs=template,
        model_init_kwargs={key: value for key, value in loading.items() if value is not None},
        trust_remote_code=args.trust_remote_code,
        work_dir=output.with_name(f".{output.name}.choosing"),
    )
    if not PartialState().is_main_process:
        return
    ranked = weights.to_dataset()
    write_rows(ranked, output)
    report = write_ranking(weights, output) if args.report else None
    _tell(weights, ranked, output, report, notes, model_args.model_name_or_path or "MODEL")


_PASSED = (
    *("max_length", "seed", "bf16", "completion_only_loss", "assistant_only_loss", "dataset_text_field"),
    "gradient_checkpointing",
)


def _template(given: str | None) -> dict[str, Any] | None:
    try:
        template = json.loads(given or "{}")
    except json.JSONDecodeError:
        template = None
    if not isinstance(template, dict):
        raise ValueError(f"`chat_template_kwargs` must be a JSON object, got {given!r}.")
    return template or None


def _trusted(args: RankArguments) -> Any:
    """The trusted rows; by file name if there are several sets."""
    from ..data.loading import load_rows

    assert args.trusted is not None
    sets = {Path(name).stem: load_rows(name, split=args.trusted_split) for name in args.trusted}
    if len(sets) < len(args.trusted):
        raise ValueError(f"`trusted` names sets alike: {args.trusted}. Give their files different names.")
    return sets if len(sets) > 1 else next(iter(sets.values()))


def write_ranking(weights: Any, output: Path) -> Path | None:
    """Write the record of a choice and its report into `NAME-report/` beside the ranked rows; returns the report.

    None if the extra `report` is not installed.
    """
    from ..data.files import write_json
    from ..data.private import RECORD, WEIGHTED, private_path
    from ..weights.record import RUN_FILE, run_record, write_pilot, write_weights

    folder = output.with_name(f"{output.stem}-report")
    rows_file = output
    if output.suffix != ".parquet":
        # A report reads its rows from a parquet file.
        rows_file = private_path(folder, WEIGHTED)
        rows_file.parent.mkdir(parents=True, exist_ok=True)
        weights.to_dataset().to_parquet(str(rows_file))
    record = folder / RECORD
    record.mkdir(parents=True, exist_ok=True)
    write_json(record / RUN_FILE, run_record(weights.facts, str(rows_file.resolve())))
    if weights.choice is not None:
        write_pilot(record, weights.choice, weights.decode)
    write_weights(record, weights.values)
    weights.save(folder)
    try:
        from ..report import write_report
    except ImportError as error:
        print(error, file=sys.stderr)
        return None
    return write_report(folder, output=folder / "report.html")


def _tell(weights: Any, ranked: Any, output: Path, report: Path | None, notes: Sequence[str], model: str) -> None:
    import numpy as np

    from ..core.statistics import effective_sample_size, rows_carrying
    from ..data.formats import question_and_answer
    from .show import show_summary, table

    values = weights.values.numpy()
    known = int((~np.isnan(values)).sum())
    order = sorted(range(known), key=np.array(ranked["data_rank"])[~np.isnan(values)].__getitem__)
    places = np.flatnonzero(~np.isnan(values))[order]
    count = min(SHOWN, known // 2)

    def told(place: int) -> str:
        question, answer = question_and_answer(ranked[int(place)])
        return f"{values[place]:.2f}  {_short(question)} -> {_short(answer)}"

    pairs = zip(places[:count], places[::-1][:count], strict=True)
    table("Rows at both ends", ("kept", "dropped"), [[told(best), told(worst)] for best, worst in pairs])
    carrying = rows_carrying(values)
    facts = [
        ("Ranked rows", str(output)),
        ("Rows", f"{len(values):,}" + (f", {len(values) - known:,} without a weight" if known < len(values) else "")),
        ("80% of the weight", f"in {carrying / max(1, known):.0%} of the rows ({carrying:,})"),
        ("Effective sample size", f"{effective_sample_size(values):.0%} of the rows"),
        ("Time", f"{weights.facts.get('seconds', 0):.0f} s"),
    ]
    if report is not None:
        facts.append(("Report", str(report)))
    file = shlex.quote(str(output))
    drawn = f"--resample {known} --output weighted.jsonl"
    following = [
        f"trl-bilevel sft --model_name_or_path {shlex.quote(model)} --use_peft --dataset_name {file} "
        "--weight_estimator none --selector_weighting resample --output_dir out   # TRL",
        f"trl-bilevel export {file} --format llama-factory {drawn}   # LLaMA-Factory",
        f"trl-bilevel export {file} --format axolotl {drawn}   # axolotl",
    ]
    show_summary("Ranked", facts, notes, following)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= TEXT else f"{line[: TEXT - 1].rstrip()}…"


def run(arguments: list[str]) -> None:
    """Parse and rank."""
    words = ["--rows", *arguments] if arguments and not arguments[0].startswith("-") else arguments
    main(*parse(make_parser(), words))


if __name__ == "__main__":
    run(sys.argv[1:])
