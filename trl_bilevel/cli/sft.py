"""`trl-bilevel sft`: bilevel supervised fine-tuning from a config file and the command line.

    trl-bilevel sft --config FILE.yaml [--learning_rate 1e-4 ...]
    accelerate launch -m trl_bilevel.cli.sft --config FILE.yaml

Every field of `BilevelSFTConfig` (and so of TRL's `SFTConfig`), of TRL's `ModelConfig` and of the script's own
arguments is an option, and a key of the YAML file. Unknown keys are errors.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any


@dataclass
class BilevelScriptArguments:
    """Which data to train on.

    Parameters:
        dataset_name (`str`, *optional*): training rows: hub name, .json/.jsonl/.csv/.parquet file or saved folder.
        dataset_config (`str`, *optional*): configuration of the hub data set.
        dataset_train_split (`str`): split to train on.
        validation_dataset_name (`str`, *optional*): trusted rows, named in the same ways.
        validation_dataset_config (`str`, *optional*), validation_dataset_split (`str`): as above.
        eval_dataset_name (`str`, *optional*), eval_dataset_split (`str`): rows for reporting only.
        weighted_dataset_path (`str`, *optional*): where the weighted rows go; default `OUTPUT_DIR/weighted.parquet`.
    """

    dataset_name: str | None = field(
        default=None, metadata={"help": "Training rows: hub name, .json/.jsonl/.csv/.parquet file, or saved folder."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the hub data set."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    validation_dataset_name: str | None = field(
        default=None, metadata={"help": "Trusted rows that say what good means, named in the same ways."}
    )
    validation_dataset_config: str | None = field(default=None, metadata={"help": "Configuration of that data set."})
    validation_dataset_split: str = field(default="train", metadata={"help": "Split of the trusted rows."})
    eval_dataset_name: str | None = field(default=None, metadata={"help": "Rows for reporting only."})
    eval_dataset_split: str = field(default="test", metadata={"help": "Split of the rows for reporting."})
    weighted_dataset_path: str | None = field(
        default=None, metadata={"help": "Where the weighted rows go. Default: OUTPUT_DIR/weighted.parquet."}
    )


def make_parser(prog: str = "trl-bilevel sft") -> Any:
    """The parser, as in TRL's scripts."""
    from trl import DatasetMixtureConfig, ModelConfig, TrlParser

    from ..trainer.bilevel_sft_config import BilevelSFTConfig

    return TrlParser((BilevelScriptArguments, BilevelSFTConfig, ModelConfig, DatasetMixtureConfig), prog=prog)


def main(script_args: Any, training_args: Any, model_args: Any, dataset_args: Any) -> None:
    """Train, and write the model, the selector and the weighted rows."""
    from trl import get_peft_config, get_quantization_config

    from ..trainer.bilevel_sft_trainer import BilevelSFTTrainer
    from .data import load_mixture, load_rows

    if dataset_args.datasets and script_args.dataset_name:
        raise ValueError("Give either `dataset_name` or `datasets`, not both.")
    if not dataset_args.datasets and not script_args.dataset_name:
        raise ValueError("Give the training rows: `dataset_name` (one data set), or `datasets` in the config file.")
    if model_args.model_name_or_path is None:
        raise ValueError("Give the model: `model_name_or_path` (a hub name or a folder).")
    if dataset_args.datasets:
        train = load_mixture(dataset_args.datasets)
    else:
        train = load_rows(
            script_args.dataset_name, split=script_args.dataset_train_split, config=script_args.dataset_config
        )
    validation = evaluation = None
    if script_args.validation_dataset_name:
        validation = load_rows(
            script_args.validation_dataset_name,
            split=script_args.validation_dataset_split,
            config=script_args.validation_dataset_config,
        )
    if script_args.eval_dataset_name:
        evaluation = load_rows(script_args.eval_dataset_name, split=script_args.eval_dataset_split)

    model_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    }
    training_args.model_init_kwargs = model_kwargs | (training_args.model_init_kwargs or {})
    trainer = BilevelSFTTrainer(
        model_args.model_name_or_path,
        training_args,
        train_dataset=train,
        validation_dataset=validation,
        eval_dataset=evaluation,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)
    lines = [f"Model saved to {training_args.output_dir}."]
    if trainer.validation is not None:
        lines.append(f"Validation loss: {trainer.validation_loss()['total']:.4f} nats per token.")
    if trainer.selects and trainer.is_world_process_zero():
        path = script_args.weighted_dataset_path or f"{training_args.output_dir}/weighted.parquet"
        trainer.weighted_dataset().to_parquet(path)
        ess = trainer.selection.metrics()["selector/ess"]
        lines.append(f"Weighted rows saved to {path}; effective sample size {ess:.0%} of the rows.")
        lines.append(f"Next: trl-bilevel export {path} --top-k 1000 --output best.jsonl")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    trainer.accelerator.print("\n".join(lines))
    trainer.end()


def run(arguments: list[str]) -> None:
    """Parse and train."""
    parser = make_parser()
    # `--config` is taken in two words by TRL's parser; the usual one-word form works too.
    arguments = [
        part for word in arguments for part in (word.split("=", 1) if word.startswith("--config=") else [word])
    ]
    main(*parser.parse_args_and_config(arguments, fail_with_unknown_args=True))


if __name__ == "__main__":
    run(sys.argv[1:])
