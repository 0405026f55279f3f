"""What the commands with configs take beside TRL's and ours: data, help, and how their command lines are parsed."""

from __future__ import annotations

import argparse
import copy
import inspect
import re
from dataclasses import dataclass, field, is_dataclass
from typing import Any

METAVARS: dict[Any, str] = {int: "INT", float: "NUMBER", str: "TEXT"}


def option(default: Any, text: str, **metadata: Any) -> Any:
    """A field that is an option: its default, and what its help says."""
    return field(default=default, metadata={"help": text, **metadata})


@dataclass
class BilevelScriptArguments:
    """Which data to train on, and where the weighted rows go. The help of each field says what it is."""

    dataset_name: str | None = option(
        None, "Training rows: hub name, .json/.jsonl/.csv/.parquet file, or saved folder."
    )
    dataset_config: str | None = option(None, "Configuration of the hub data set.")
    dataset_train_split: str = option("train", "Split to train on.")
    validation_dataset_name: str | None = option(None, "Trusted rows that say what good means, named alike.")
    validation_dataset_config: str | None = option(None, "Configuration of that data set.")
    validation_dataset_split: str = option("train", "Split of the trusted rows.")
    eval_dataset_name: str | None = option(None, "Rows for reporting only.")
    eval_dataset_split: str = option("test", "Split of the rows for reporting.")
    weighted_dataset_path: str | None = option(
        None, "Where the weighted rows go. Default: OUTPUT_DIR/_rows/weighted.parquet; nowhere for a stream."
    )


@dataclass
class RefineScriptArguments(BilevelScriptArguments):
    """Which data a self-refining run uses. The help of each field says what it is."""

    selection_dataset_name: str | None = option(None, "Trusted rows that decide on a round. Default: split off.")
    selection_dataset_split: str = option("train", "Split of these rows.")
    prompt_dataset_name: str | None = option(None, "Questions to ask in place of those of the training rows.")
    prompt_dataset_split: str = option("train", "Split of the questions.")


def config_parser(command: str, example: str, *parts: type, first: str = "") -> Any:
    """TRL's parser of our dataclasses, then of its options of the model, and of mixtures of data sets.

    `first` is what may stand before all options, for the usage; such a command takes no mixtures.
    """
    from trl import DatasetMixtureConfig, ModelConfig, TrlParser

    kinds = (*parts, ModelConfig) if first else (*parts, ModelConfig, DatasetMixtureConfig)
    usage = f"trl-bilevel {command}{first} [--config FILE.yaml] [OPTIONS]"
    return TrlParser(kinds, prog=f"trl-bilevel {command}", usage=usage, epilog=example)


def parse(parser: Any, arguments: list[str], first: str = "") -> tuple[Any, ...]:
    """Parse, or print the help and leave. Whatever the configs refuse, and an unknown option or key, is a ValueError.

    `first` is the option whose value may stand first, without it.
    """
    import yaml

    from ..trainer.bilevel_sft_config import RENAMED
    from ..weights.settings import gone

    if {"-h", "--help"} & set(arguments):
        grouped(parser).parse_args(["--help"])
    if first and arguments and not arguments[0].startswith("-"):
        arguments = [first, *arguments]
    # TRL's parser takes `--config` in two words only.
    words = [part for word in arguments for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    try:
        return parser.parse_args_and_config(words, fail_with_unknown_args=True)
    except (ValueError, TypeError, yaml.YAMLError) as error:
        old = next((name for name in re.findall(r"--(\w+)", str(error)) if name in RENAMED), None)
        raise ValueError(gone(old, RENAMED[old]) if old else str(error)) from error


def grouped(parser: Any) -> argparse.ArgumentParser:
    """A parser for help and completion: the options by the class that declares them, ours first, each spelled once.

    A `TrlParser` lists them in no order, as `--max_steps` and as `--max-steps`.
    """
    from .main import COMMANDS

    text = COMMANDS[parser.prog.split()[-1]]
    shown = argparse.ArgumentParser(
        prog=parser.prog,
        usage=parser.usage,
        description=f"{text[0].upper()}{text[1:]}. Every option can be a YAML key.",
        epilog=parser.epilog,
    )
    shown.add_argument("--config", metavar="FILE", help="YAML file with options as keys; the command line wins.")
    # The first of two: booleans have a second option, `--no_...`.
    actions = {action.dest: action for action in reversed(parser._actions) if action.help != argparse.SUPPRESS}
    kinds: list[Any] = [kind for part in parser.dataclass_types for kind in part.__mro__ if is_dataclass(kind)]
    kinds.sort(key=lambda kind: (not kind.__module__.startswith("trl_bilevel."), kind.__name__ != "ModelConfig"))
    for kind in kinds:
        own = [actions.pop(name) for name in inspect.get_annotations(kind) if name in actions]
        group = shown.add_argument_group(f"{kind.__name__} ({kind.__module__.partition('.')[0]})") if own else shown
        for action in own:
            group._add_action(_shown(action))
    return shown


def _shown(action: argparse.Action) -> argparse.Action:
    """An option as it is shown: one spelling, what kind of value it takes, and its default."""
    shown = copy.copy(action)
    shown.option_strings = [word for word in action.option_strings if "-" not in word[2:]]
    if not action.choices:
        boolean = getattr(action.type, "__name__", "") == "string_to_bool"
        shown.metavar = "True|False" if boolean else METAVARS.get(action.type, "VALUE")
    default = action.default
    told = f" (default: {default!r})" if isinstance(default, bool | int | float | str) and default != "" else ""
    # Some texts are escaped for argparse already, some are not.
    shown.help = f"{action.help or ''}{told}".replace("%%", "%").replace("%", "%%")
    return shown


def loading(model_args: Any) -> dict[str, Any]:
    """TRL's options of the model as keyword arguments of `from_pretrained`, without quantisation."""
    names = {"revision": "model_revision", "attn_implementation": "attn_implementation", "dtype": "dtype"}
    return {key: getattr(model_args, name) for key, name in names.items() if getattr(model_args, name) is not None}


def trainer_arguments(script_args: Any, training_args: Any, model_args: Any, dataset_args: Any) -> dict[str, Any]:
    """What a trainer takes beside model and config: rows (a stream with `streaming`), adapters, quantisation.

    How to load the model goes into the config.
    """
    from trl import get_peft_config, get_quantization_config

    from ..data.loading import load_mixture, load_rows

    if dataset_args.test_split_size is not None:
        raise ValueError("`test_split_size` is not supported: give rows for reporting by `eval_dataset_name`.")
    if bool(dataset_args.datasets) == bool(script_args.dataset_name):
        raise ValueError("Give the training rows: `dataset_name` (one data set), or `datasets` in the config file.")
    streaming = bool(dataset_args.streaming)
    if dataset_args.datasets:
        train = load_mixture(dataset_args.datasets, streaming)
    else:
        split, config = script_args.dataset_train_split, script_args.dataset_config
        train = load_rows(script_args.dataset_name, split=split, config=config, streaming=streaming)
    if model_args.model_name_or_path is None:
        raise ValueError("Give the model: `model_name_or_path` (a hub name or a folder).")
    training_args.model_init_kwargs = loading(model_args) | (training_args.model_init_kwargs or {})
    given = {"quantization_config": get_quantization_config(model_args), "peft_config": get_peft_config(model_args)}
    for kind in ("validation", "eval", "selection", "prompt"):
        name = getattr(script_args, f"{kind}_dataset_name", None)
        if name:
            split = getattr(script_args, f"{kind}_dataset_split")
            config = getattr(script_args, f"{kind}_dataset_config", None)
            given[f"{kind}_dataset"] = load_rows(name, split=split, config=config)
    return given | {"train_dataset": train}
