"""What the training commands take beside TRL's and our configs."""

from __future__ import annotations

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
        weighted_dataset_path (`str`, *optional*): where the weighted rows go; default `OUTPUT_DIR/weighted.parquet`,
            and nowhere for a stream.
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
        default=None,
        metadata={"help": "Where the weighted rows go. Default: OUTPUT_DIR/weighted.parquet, nowhere for a stream."},
    )


@dataclass
class RefineScriptArguments(BilevelScriptArguments):
    """Which data a self-refining run uses.

    Parameters:
        selection_dataset_name (`str`, *optional*), selection_dataset_split (`str`): trusted rows that choose between
            the candidates of a round; split off the validation rows by default.
        prompt_dataset_name (`str`, *optional*), prompt_dataset_split (`str`): questions to ask in place of those of
            the training rows.
    """

    selection_dataset_name: str | None = field(
        default=None, metadata={"help": "Trusted rows that choose between candidates. Default: split off."}
    )
    selection_dataset_split: str = field(default="train", metadata={"help": "Split of these rows."})
    prompt_dataset_name: str | None = field(
        default=None, metadata={"help": "Questions to ask in place of those of the training rows."}
    )
    prompt_dataset_split: str = field(default="train", metadata={"help": "Split of the questions."})


def resume_argument(training_args: Any) -> str | bool | None:
    """`resume_from_checkpoint` as a trainer takes it: on the command line, `True` is text."""
    given = training_args.resume_from_checkpoint
    if isinstance(given, str) and given.lower() in ("true", "false"):
        return given.lower() == "true"
    return given


def parse(parser: Any, arguments: list[str]) -> tuple[Any, ...]:
    """Parse, with unknown options and keys as errors.

    `--config` is taken in two words by TRL's parser; the usual one-word form works too.
    """
    words = [part for word in arguments for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    return parser.parse_args_and_config(words, fail_with_unknown_args=True)
