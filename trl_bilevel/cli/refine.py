"""`trl-bilevel refine`: online self-refining generation from a config file and the command line.

    trl-bilevel refine --config FILE.yaml [--num_rounds 4 ...]
    accelerate launch -m trl_bilevel.cli.refine --config FILE.yaml

Every field of `SelfRefineConfig` (and so of TRL's `GRPOConfig`), of TRL's `ModelConfig` and of the script's own
arguments is an option, and a key of the YAML file. Unknown keys are errors. Training rows with a column `data_weight`
(what `trl-bilevel sft` writes to `weighted.parquet`) keep these weights; a model folder that holds an adapter goes on
training it.
"""

from __future__ import annotations

import shlex
import sys
from typing import Any

from .arguments import RefineScriptArguments, parse, resume_argument
from .options import show_help

EXAMPLE = (
    "example: trl-bilevel refine --model_name_or_path out --dataset_name out/weighted.parquet "
    "--validation_dataset_name trusted.jsonl --output_dir refined, where `out` is what `trl-bilevel sft` wrote. Every "
    "option can be a key of a YAML file (--config FILE); the command line wins."
)


def make_parser(prog: str = "trl-bilevel refine") -> Any:
    """The parser, as in TRL's scripts."""
    from trl import DatasetMixtureConfig, ModelConfig, TrlParser

    from ..trainer.self_refine_config import SelfRefineConfig

    parts = (RefineScriptArguments, SelfRefineConfig, ModelConfig, DatasetMixtureConfig)
    return TrlParser(parts, prog=prog, epilog=EXAMPLE)


def main(script_args: Any, training_args: Any, model_args: Any, dataset_args: Any) -> None:
    """Run the rounds, write the model, the ledger and the responses, and say what came of it."""
    from trl import get_peft_config, get_quantization_config

    from ..trainer.self_refine_trainer import SelfRefineTrainer
    from .data import is_adapter, load_adapter, load_named, load_sets, set_model_arguments
    from .progress import shown_progress, time_spent
    from .report import report_lines
    from .summary import show_summary

    train, validation, evaluation = load_sets(script_args, dataset_args)
    quantization = get_quantization_config(model_args)
    model, peft_config = model_args.model_name_or_path, get_peft_config(model_args)
    set_model_arguments(training_args, model_args)
    if is_adapter(model):
        model, peft_config, quantization = load_adapter(training_args, model, quantization), None, None
    trainer = SelfRefineTrainer(
        model,
        training_args,
        train,
        validation,
        evaluation,
        selection_dataset=load_named(script_args, "selection"),
        prompt_dataset=load_named(script_args, "prompt"),
        quantization_config=quantization,
        peft_config=peft_config,
    )
    with shown_progress(trainer):
        trainer.train(resume_from_checkpoint=resume_argument(training_args))
    trainer.save_model(training_args.output_dir)
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    folder = training_args.output_dir
    facts = [("Model", folder)]
    for entry in trainer.ledger:
        facts.append(
            (
                f"Round {entry['round']}",
                f"{entry['responses']} responses to {entry['questions']} questions; selection loss "
                f"{entry['incoming_loss']:.4f} -> {entry['trained_loss']:.4f} (+- {entry['standard_error']:.4f}): "
                f"{'kept' if entry['kept'] else 'rolled back'}, {entry['reason']}",
            )
        )
    kept = sum(entry["kept"] for entry in trainer.ledger)
    facts += [("Outcome", f"{kept} of {len(trainer.ledger)} rounds kept"), *time_spent(trainer)]
    facts.append(("Books", f"{folder}/ledger.jsonl, {folder}/responses/"))
    notes = []
    if kept == 0:
        notes.append("No round helped: lower the learning rate, or raise `num_generations` or `steps_per_round`.")
    # Last: the report holds text of the rows, and is not pushed with the model.
    notes += report_lines(trainer)
    if trainer.is_world_process_zero():
        test = script_args.eval_dataset_name or "TEST.jsonl"
        words = ["trl-bilevel", "evaluate", folder, "--baseline", model_args.model_name_or_path, "--dataset", test]
        show_summary("Refined in rounds", facts, notes, [shlex.join(words)])
    trainer.end()


def run(arguments: list[str]) -> None:
    """Parse and train."""
    show_help("refine", arguments, EXAMPLE)
    main(*parse(make_parser(), arguments))


if __name__ == "__main__":
    run(sys.argv[1:])
