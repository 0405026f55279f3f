"""`trl-bilevel refine`, or `accelerate launch -m trl_bilevel.cli.refine`: online self-refining generation.

Every field of `SelfRefineConfig` (and so of TRL's `GRPOConfig`), of TRL's `ModelConfig` and of the script's own
arguments is an option, and a key of the YAML file. Training rows with a column `data_weight` keep these weights; a
model folder that holds an adapter goes on training it.
"""

from __future__ import annotations

import shlex
import sys
from typing import Any

from .arguments import RefineScriptArguments, config_parser, parse, trainer_arguments

EXAMPLE = (
    "example: trl-bilevel refine --model_name_or_path out --dataset_name out/_rows/weighted.parquet "
    "--validation_dataset_name trusted.jsonl --output_dir refined, where `out` is what `trl-bilevel sft` wrote"
)


def make_parser() -> Any:
    """The parser, as in TRL's scripts."""
    from ..trainer.self_refine_config import SelfRefineConfig

    return config_parser("refine", EXAMPLE, RefineScriptArguments, SelfRefineConfig)


def main(script_args: Any, training_args: Any, model_args: Any, dataset_args: Any) -> None:
    """Run the rounds, write the model, the ledger and the responses, and say what came of it."""
    from ..data.models import is_adapter, load_adapter
    from ..data.private import LEDGER, RESPONSES, find_private
    from ..trainer.self_refine_trainer import SelfRefineTrainer
    from .training import finish, run_training

    given = trainer_arguments(script_args, training_args, model_args, dataset_args)
    model = model_args.model_name_or_path
    if is_adapter(model):
        quantization = given.pop("quantization_config")
        kwargs = training_args.model_init_kwargs | ({"quantization_config": quantization} if quantization else {})
        model, training_args.model_init_kwargs = load_adapter(model, kwargs), None
        del given["peft_config"]
    trainer = SelfRefineTrainer(model, training_args, **given)
    run_training(trainer, script_args)
    folder = training_args.output_dir
    facts = [("Model", folder)]
    for entry in trainer.ledger:
        text = (
            "{responses} responses to {questions} questions; selection loss {incoming_loss:.4f} -> {trained_loss:.4f} "
            "(+- {standard_error:.4f}): {outcome}, {reason}"
        )
        outcome = "kept" if entry["kept"] else "rolled back"
        facts.append((f"Round {entry['round']}", text.format(**entry, outcome=outcome)))
    kept = sum(entry["kept"] for entry in trainer.ledger)
    facts.append(("Outcome", f"{kept} of {len(trainer.ledger)} rounds kept"))
    facts.append(("Books", f"{find_private(folder, LEDGER)}, {find_private(folder, RESPONSES)}/"))
    advice = "No round helped: lower the learning rate, or raise `num_generations` or `steps_per_round`."
    test = script_args.eval_dataset_name or "TEST.jsonl"
    words = ["trl-bilevel", "evaluate", folder, "--baseline", model_args.model_name_or_path, "--dataset", test]
    finish(trainer, "Refined in rounds", facts, [] if kept else [advice], [shlex.join(words)])


def run(arguments: list[str]) -> None:
    """Parse and train."""
    main(*parse(make_parser(), arguments))


if __name__ == "__main__":
    run(sys.argv[1:])
