"""The options of `sft`, `refine`, `plan` and `evaluate`: fields of dataclasses, ours, TRL's and transformers'.

They are read off the sources: importing those would load torch, which takes longer than a person waits for help.
"""

from __future__ import annotations

import argparse
import ast
import re
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TypeGuard


@dataclass(frozen=True)
class Source:
    """A dataclass with options: its package, module and name, and what to call its options in the help."""

    package: str
    module: str
    name: str
    title: str


@dataclass(frozen=True)
class Option:
    """An option, as its source has it: type and default in Python's spelling. Computed defaults are left out."""

    name: str
    kind: str
    default: str
    text: str


MODEL = Source("trl", "trainer.model_config", "ModelConfig", "model, adapters, quantisation (TRL's ModelConfig)")
# A subclass comes before its parents, so that its defaults are those that are shown.
PARENTS = (
    Source("trl", "trainer.base_config", "_BaseConfig", "training (transformers' TrainingArguments, TRL's defaults)"),
    Source("transformers", "training_args", "TrainingArguments", "training (transformers' TrainingArguments)"),
)
DATA = Source("trl_bilevel", "cli.arguments", "BilevelScriptArguments", "data")
MIXTURE = Source("trl", "scripts.utils", "DatasetMixtureConfig", "mixing data sets (TRL's DatasetMixtureConfig)")
SFT = (
    DATA,
    Source("trl_bilevel", "trainer.bilevel_sft_config", "BilevelSFTConfig", "selection (BilevelSFTConfig)"),
    MODEL,
    Source("trl", "trainer.sft_config", "SFTConfig", "fine-tuning (TRL's SFTConfig)"),
    *PARENTS,
    MIXTURE,
)
REFINE = (
    DATA,
    Source("trl_bilevel", "cli.arguments", "RefineScriptArguments", "data of the rounds"),
    Source("trl_bilevel", "trainer.self_refine_config", "SelfRefineConfig", "rounds and selection (SelfRefineConfig)"),
    MODEL,
    Source("trl", "trainer.grpo_config", "GRPOConfig", "generation (TRL's GRPOConfig)"),
    *PARENTS,
    MIXTURE,
)
SOURCES: dict[str, tuple[Source, ...]] = {
    "sft": SFT,
    "refine": REFINE,
    "plan": (Source("trl_bilevel", "cli.plan", "PlanArguments", "what to plan for"), *SFT),
    "evaluate": (Source("trl_bilevel", "cli.evaluate", "EvaluateArguments", "what to evaluate"), MODEL),
}
# Options of a shared dataclass that a command has no use for, and refuses.
UNUSED = {"evaluate": re.compile(r"use_peft|lora_.*|use_dora|use_rslora")}
DEFAULT_IN_WORDS = re.compile(r" ?It defaults to [^.]*\.")


def option_groups(command: str) -> dict[str, list[Option]]:
    """Options of one of `SOURCES`, by the title of the dataclass that declares them first."""
    seen: set[str] = set()
    groups: dict[str, list[Option]] = {}
    for source in SOURCES[command]:
        new = [option for option in declared_options(source) if option.name not in seen]
        seen |= {option.name for option in new}
        groups[source.title] = new
    return groups


@cache
def declared_options(source: Source) -> tuple[Option, ...]:
    """The options that a dataclass declares itself; none if it is not where it was."""
    spec = find_spec(source.package)
    if spec is None or not spec.submodule_search_locations:
        return ()
    path = Path(next(iter(spec.submodule_search_locations)), *source.module.split(".")).with_suffix(".py")
    if not path.is_file():
        return ()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == source.name)
    lines = next((node.body for node in found), [])
    fields = [node for node in lines if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)]
    return tuple(option for option in map(_option, fields) if not option.name.startswith("_"))


def _option(field: ast.AnnAssign) -> Option:
    value = field.value
    given = {key.arg: key.value for key in value.keywords} if isinstance(value, ast.Call) else {}
    default = given.get("default", value if not isinstance(value, ast.Call) else None)
    metadata = given.get("metadata")
    pairs = zip(metadata.keys, metadata.values, strict=True) if isinstance(metadata, ast.Dict) else ()
    texts = [ast.literal_eval(v) for k, v in pairs if ast.unparse(k or v) == "'help'" and _is_literal(v)]
    return Option(
        name=ast.unparse(field.target),
        kind=ast.unparse(field.annotation),
        default=ast.unparse(default) if _is_literal(default) else "",
        text="".join(map(str, texts)),
    )


def _is_literal(node: ast.expr | None) -> TypeGuard[ast.expr]:
    if node is None:
        return False
    try:
        ast.literal_eval(node)
    except ValueError:
        return False
    return True


def show_help(command: str, arguments: list[str], example: str, **changes: str) -> None:
    """Print the help of a command and leave, if it was asked for.

    Args:
        command (`str`): one of `SOURCES`.
        arguments (`list[str]`): of the command line.
        example (`str`): shown at the end.
        changes: defaults that the command sets itself, in Python's spelling.

    Raises:
        SystemExit: with code 0, if `--help` or `-h` is among the arguments.
    """
    if {"-h", "--help"} & set(arguments):
        help_parser(command, example, **changes).parse_args(["--help"])


def help_parser(command: str, example: str, **changes: str) -> argparse.ArgumentParser:
    """A parser for its help alone: TRL's own parses the options."""
    from .main import COMMANDS

    parser = argparse.ArgumentParser(
        prog=f"trl-bilevel {command}",
        usage=f"trl-bilevel {command} {'MODEL ' if command == 'evaluate' else ''}[--config FILE.yaml] [OPTIONS]",
        description=f"{COMMANDS[command][1][0].upper()}{COMMANDS[command][1][1:]}. Every option can be a YAML key.",
        epilog=example,
    )
    if command == "evaluate":
        parser.add_argument("MODEL", help="Hub name, folder of a model, or folder of an adapter.")
    parser.add_argument("--config", metavar="FILE", help="YAML file with options as keys; the command line wins.")
    for title, options in option_groups(command).items():
        group = parser.add_argument_group(title)
        for option in options:
            if command in UNUSED and UNUSED[command].fullmatch(option.name):
                continue
            default = changes.get(option.name, option.default)
            shown = f" (default: {default})" if default not in ("", "None") else ""
            # Some texts are escaped for argparse already, some are not.
            said = DEFAULT_IN_WORDS.sub("", option.text) if option.name in changes else option.text
            text = f"{said}{shown}".replace("%%", "%").replace("%", "%%")
            group.add_argument(f"--{option.name}", metavar=_metavar(option.kind), help=text)
    return parser


def _metavar(kind: str) -> str:
    """`int | None` is INT, `bool` is [True|False], whatever has several forms VALUE."""
    words = [word for word in kind.replace("Optional[", "").rstrip("]").split(" | ") if word != "None"]
    if words == ["bool"]:
        return "[True|False]"
    known = {"int": "INT", "float": "NUMBER", "str": "TEXT"}
    return known.get(words[0], "VALUE") if len(words) == 1 else "VALUE"
