"""Help, completion and exit codes: what they say, and what they do not import."""

import ast
import json
import subprocess
import sys
from importlib import import_module

import pytest

from trl_bilevel.cli import completion, options
from trl_bilevel.cli.main import COMMANDS, main

# Loading one of these takes longer than a person waits for help.
HEAVY = ("torch", "transformers", "trl", "datasets", "peft", "accelerate", "matplotlib", "pandas")


def imported(code):
    """Which of `HEAVY` a fresh interpreter has loaded after some code, and what the code printed."""
    code = f"{code}\nimport sys, json; print('\\n' + json.dumps([m for m in {HEAVY} if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *text, found = done.stdout.splitlines()
    return json.loads(found), "\n".join(text)


def test_importing_the_package_loads_nothing_heavy():
    assert imported("import trl_bilevel; trl_bilevel.__version__")[0] == []


def test_help_loads_nothing_heavy_and_gives_an_example():
    lines = ["from trl_bilevel.cli.main import main", "main(['--help'])"]
    for name in COMMANDS:
        lines.append(f"try: main(['{name}', '--help'])\nexcept SystemExit as end: assert end.code == 0")
    found, text = imported("\n".join(lines))
    assert found == []
    assert all(f"\n  {name} " in text for name in COMMANDS)
    for name in COMMANDS:
        assert text.count(f"trl-bilevel {name} ") > 1, name


@pytest.mark.parametrize("name", options.SOURCES)
def test_help_of_training_commands_says_what_their_parser_takes(name, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    module = import_module(COMMANDS[name][0])
    with pytest.raises(SystemExit):
        module.run(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "%%" not in text
    compared = 0
    for action in module.make_parser()._actions:
        word = next((w for w in action.option_strings if w.startswith("--") and "-" not in w[2:]), "--help")
        unused = name in options.UNUSED and options.UNUSED[name].fullmatch(action.dest)
        if word == "--help" or word.startswith("--no_") or unused:
            continue
        assert f" {word} " in text, word
        said = text.partition(f" {word} ")[2].partition(" --")[0]
        _, found, default = said.rpartition("(default: ")
        # Defaults that are computed are said in words, if at all.
        if found and isinstance(action.default, bool | int | float | str):
            assert ast.literal_eval(default.partition(")")[0]) == action.default, word
            compared += 1
    assert compared > 10


def test_completion_loads_nothing_heavy():
    found, text = imported("from trl_bilevel.cli.main import main; main(['completion', 'bash'])")
    assert found == [] and "--validation_dataset_name" in text


@pytest.mark.parametrize("name", options.SOURCES)
def test_completion_knows_the_options_of_the_parser(name):
    parser = import_module(COMMANDS[name][0]).make_parser()
    real = {word for action in parser._actions for word in action.option_strings}
    offered = set(completion.options(name))
    # Fields that no command line can set are offered by nobody; argparse adds spellings with hyphens and `no_`.
    assert offered - real - {"--config"} == set()
    missing = {
        word for word in real if word.startswith("--") and "-" not in word[2:] and not word[2:].startswith("no_")
    }
    assert missing - offered == set()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["ex"], ["export"]),
        (["export", "--top"], ["--top-k"]),
        (["sft", "--validation_dataset_n"], ["--validation_dataset_name"]),
        (["export", "out", "--min"], ["--min-weight"]),
        (["export", "ou"], []),
    ],
)
def test_completion_in_bash(words, expected, tmp_path, capsys):
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "completion.sh"
    script.write_text(capsys.readouterr().out)
    line = f"COMP_WORDS=(trl-bilevel {' '.join(words)}); COMP_CWORD={len(words)}; _trl_bilevel"
    command = f'set -u; source {script}; {line}; echo "${{COMPREPLY[@]-}}"'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.split() == expected and done.stderr == ""


def test_completion_in_zsh_goes_through_bashcompinit(capsys):
    assert main(["completion", "zsh"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("autoload -Uz compinit bashcompinit") and text.endswith(completion.script())


def test_an_interrupted_command_says_so(monkeypatch, capsys):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("trl_bilevel.cli.doctor.run", interrupted)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "trl-bilevel doctor: interrupted.\n"
