"""`trl-bilevel completion`: a script that completes commands and options in bash and zsh.

The options of `sft`, `refine`, `plan` and `evaluate` are fields of dataclasses, ours and TRL's. They are read off the
sources, since importing those would load torch.
"""

from __future__ import annotations

import argparse
import ast
import shlex
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

Source = tuple[str, str, str]

# Of a dataclass: package, module and class.
PARENTS: tuple[Source, ...] = (
    ("trl", "trainer.base_config", "_BaseConfig"),
    ("transformers", "training_args", "TrainingArguments"),
)
MODEL: Source = ("trl", "trainer.model_config", "ModelConfig")
SFT: tuple[Source, ...] = (
    ("trl_bilevel", "cli.arguments", "BilevelScriptArguments"),
    ("trl_bilevel", "trainer.bilevel_sft_config", "BilevelSFTConfig"),
    ("trl", "trainer.sft_config", "SFTConfig"),
    *PARENTS,
    MODEL,
    ("trl", "scripts.utils", "DatasetMixtureConfig"),
)
REFINE: tuple[Source, ...] = (
    *SFT[:1],
    ("trl_bilevel", "cli.arguments", "RefineScriptArguments"),
    ("trl_bilevel", "trainer.self_refine_config", "SelfRefineConfig"),
    ("trl", "trainer.grpo_config", "GRPOConfig"),
    *SFT[3:],
)
SOURCES: dict[str, tuple[Source, ...]] = {
    "sft": SFT,
    "refine": REFINE,
    "plan": (("trl_bilevel", "cli.plan", "PlanArguments"), *SFT),
    "evaluate": (("trl_bilevel", "cli.evaluate", "EvaluateArguments"), MODEL),
}
SCRIPT = """_trl_bilevel() {{
  local words
  COMPREPLY=()
  case "$COMP_CWORD:${{COMP_WORDS[1]}}" in
    1:*) words={commands} ;;
{cases}
  esac
  case "$COMP_CWORD:${{COMP_WORDS[COMP_CWORD]}}" in
    1:*|*:-*) COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}")) ;;
  esac
}}
complete -o default -F _trl_bilevel trl-bilevel
"""
ZSH = "autoload -Uz compinit bashcompinit\ncompinit\nbashcompinit\n"
EXAMPLES = """to try it:       source <(trl-bilevel completion bash)
to keep it:      trl-bilevel completion bash > ~/.local/share/bash-completion/completions/trl-bilevel
in zsh (.zshrc): source <(trl-bilevel completion zsh)
"""


def make_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="trl-bilevel completion",
        description="Prints a script that completes commands and options.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", choices=("bash", "zsh"))
    return parser


def run(arguments: list[str]) -> None:
    """Print the script."""
    shell = make_parser().parse_args(arguments).shell
    print((ZSH if shell == "zsh" else "") + script(), end="")


def script() -> str:
    """The script for bash: a list of words per command, no program is started by completing."""
    from .main import COMMANDS

    cases = [f"    *:{name}) words={shlex.quote(' '.join(options(name)))} ;;" for name in COMMANDS]
    words = shlex.quote(" ".join([*COMMANDS, "--help", "--version"]))
    return SCRIPT.format(commands=words, cases="\n".join(cases))


def options(command: str) -> list[str]:
    """Options of a command, as they are written."""
    from .main import COMMANDS

    if command in SOURCES:
        names = {name for source in SOURCES[command] for name in _fields(source)}
        return [*sorted(f"--{name}" for name in names), "--config", "--help"]
    parser = import_module(COMMANDS[command][0]).make_parser()
    return [word for action in parser._actions for word in action.option_strings if word.startswith("--")]


def _fields(source: Source) -> list[str]:
    """Names of the fields that a dataclass declares itself."""
    package, module, name = source
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return []
    path = Path(next(iter(spec.submodule_search_locations)), *module.split(".")).with_suffix(".py")
    if not path.is_file():
        return []
    tree = ast.parse(path.read_text(encoding="utf-8"))
    declared = next((node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name), None)
    lines = [] if declared is None else declared.body
    found = [node.target.id for node in lines if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)]
    return [field for field in found if not field.startswith("_")]
