"""`trl-bilevel sft`, or `accelerate launch -m trl_bilevel.cli.sft`: bilevel supervised fine-tuning.

Every field of `BilevelSFTConfig` (and so of TRL's `SFTConfig`), of TRL's `ModelConfig` and of the script's own
arguments is an option, and a key of the YAML file.
"""

from __future__ import annotations

import shlex
import sys
from typing import Any

from .arguments import BilevelScriptArguments, config_parser, parse, trainer_arguments

EXAMPLE = (
    "example: trl-bilevel sft --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct --use_peft --dataset_name "
    "mixed.jsonl --validation_dataset_name trusted.jsonl --output_dir out"
)


def make_parser() -> Any:
    """The parser, as in TRL's scripts."""
    from ..trainer.bilevel_sft_config import BilevelSFTConfig

    return config_parser("sft", EXAMPLE, BilevelScriptArguments, BilevelSFTConfig)


def main(script_args: Any, training_args: Any, model_args: Any, dataset_args: Any) -> None:
    """Train, and write the model, the weights and the weighted rows."""
    from ..data.loading import check_writable, write_rows
    from ..data.private import WEIGHTED, private_path
    from ..trainer.bilevel_sft_trainer import BilevelSFTTrainer
    from .show import weight_facts
    from .training import finish, run_training

    path = script_args.weighted_dataset_path or str(private_path(training_args.output_dir, WEIGHTED))
    given = trainer_arguments(script_args, training_args, model_args, dataset_args)
    check_writable(path, None if training_args.weight_estimator == "none" else given["train_dataset"])
    trainer = BilevelSFTTrainer(model_args.model_name_or_path, training_args, **given)
    # A stream is copied only if that was asked for.
    learned = trainer.mode.learns
    writes = learned and bool(not trainer.data.streams or script_args.weighted_dataset_path)
    run_training(trainer, script_args, [path] if writes else [])
    facts, following = [("Model", training_args.output_dir)], []
    if trainer.trusted is not None:
        facts.append(("Validation loss", f"{trainer.validation_loss()['total']:.4f} nats per token"))
    if learned and trainer.is_world_process_zero():
        if trainer.weights is not None:
            facts += weight_facts(trainer.weights.sampled().numpy())
        if writes:
            write_rows(trainer.weighted_dataset(), path)
            facts.append(("Weighted rows", path))
            following.append(f"trl-bilevel export {shlex.quote(path)} --top-k 1000 --output best.jsonl")
    finish(trainer, "Fine-tuned on weighted rows", facts, [], following, path if writes else None)


def run(arguments: list[str]) -> None:
    """Parse and train."""
    main(*parse(make_parser(), arguments))


if __name__ == "__main__":
    run(sys.argv[1:])
