"""Help, completion and exit codes: what they say, and what they do not import."""

import argparse
import ast
import contextlib
import io
import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from trl_bilevel.cli import doctor
from trl_bilevel.cli.main import COMMANDS, main

# Loading one of these takes longer than a person waits for help.
HEAVY = ("torch", "transformers", "trl", "datasets", "peft", "accelerate", "matplotlib", "pandas")


WITH_CONFIGS = ("sft", "refine", "plan", "evaluate")


def imported(code):
    """Which of `HEAVY` a fresh interpreter has loaded after some code, and what the code printed."""
    code = f"{code}\nimport sys, json; print('\\n' + json.dumps([m for m in {HEAVY} if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *text, found = done.stdout.splitlines()
    return json.loads(found), "\n".join(text)


def test_importing_the_package_loads_nothing_heavy():
    assert imported("import trl_bilevel; trl_bilevel.__version__")[0] == []


def test_help_loads_nothing_heavy_and_gives_an_example():
    """The help of commands with configs is their parser's, which needs TRL; a few seconds."""
    plain = [name for name in COMMANDS if name not in (*WITH_CONFIGS, "rank")]
    lines = ["from trl_bilevel.cli.main import main", "main(['--help'])"]
    for name in plain:
        lines.append(f"try: main(['{name}', '--help'])\nexcept SystemExit as end: assert end.code == 0")
    found, text = imported("\n".join(lines))
    assert found == []
    assert all(f"\n  {name} " in text for name in COMMANDS)
    for name in plain:
        assert text.count(f"trl-bilevel {name} ") > 1, name


@pytest.mark.parametrize("name", WITH_CONFIGS)
def test_help_of_commands_with_configs_says_what_their_parser_takes(name, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    module = import_module(f"trl_bilevel.cli.{name}")
    with pytest.raises(SystemExit) as end:
        module.run(["--help"])
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "%%" not in text and f"example: trl-bilevel {name} " in text
    # Ours first, then what is asked for most.
    assert text.index("(trl_bilevel)") < text.index("ModelConfig (trl)") < text.index("--model_name_or_path")
    if name != "evaluate":
        assert text.index("--validation_dataset_name") < text.index("ModelConfig (trl)") < text.index("--warmup_steps")
    compared = 0
    for action in module.make_parser()._actions:
        word = next((w for w in action.option_strings if w.startswith("--") and "-" not in w[2:]), "--help")
        if word == "--help" or word.startswith("--no_") or action.help == argparse.SUPPRESS:
            continue
        assert f" {word} " in text, word
        said = text.partition(f" {word} ")[2].partition(" --")[0]
        _, found, default = said.rpartition("(default: ")
        # Defaults that are computed are said in words, if at all.
        if found and isinstance(action.default, bool | int | float | str):
            assert ast.literal_eval(default.partition(")")[0]) == action.default, word
            compared += 1
    assert compared > 10
    assert (" --use_peft " in text) == (name != "evaluate")


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """The scripts for both shells, in files."""
    folder, out = tmp_path_factory.mktemp("completion"), {}
    for shell in ("bash", "zsh"):
        with contextlib.redirect_stdout(io.StringIO()) as text:
            assert main(["completion", shell]) == 0
        out[shell] = folder / shell
        out[shell].write_text(text.getvalue())
    return out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["ex"], ["export"]),
        (["export", "--top"], ["--top-k"]),
        (["sft", "--validation_dataset_n"], ["--validation_dataset_name"]),
        (["plan", "--gpu"], ["--gpu_memory"]),
        (["evaluate", "--use_pef"], []),
        (["export", "out", "--min"], ["--min-weight"]),
        (["export", "out", "--format", "ax"], ["axolotl"]),
        (["sft", "--config", "run"], ["run.yaml"]),
    ],
)
def test_completion_in_bash(words, expected, scripts, tmp_path):
    (tmp_path / "run.yaml").touch()
    line = f"COMP_WORDS=(trl-bilevel {' '.join(words)}); COMP_CWORD={len(words)}; _shtab_trl_bilevel"
    command = f'source {scripts["bash"]}; {line}; echo "${{COMPREPLY[@]-}}"'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.split() == expected and done.stderr == ""


def test_completion_in_zsh(scripts):
    text = scripts["zsh"].read_text()
    assert text.startswith("#compdef trl-bilevel")
    assert all(f"{name}:" in text for name in COMMANDS)
    assert '"--validation_dataset_name[' in text and '"--top-k[' in text


def test_an_interrupted_command_says_so(monkeypatch, capsys):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("trl_bilevel.cli.doctor.run", interrupted)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "trl-bilevel doctor: interrupted.\n"


def mistake():
    raise ValueError("`rows` must be at least 1, got 0.")


def accident():
    return {}["rows"]


def deep():
    import torch

    torch.ones(2) @ torch.ones(3)


def deep_value():
    from transformers import AutoConfig

    AutoConfig.for_model("no such model")


def no_file():
    Path("nowhere.jsonl").read_text()


@pytest.fixture(params=[True, False])
def ours(request, monkeypatch):
    """Whether this file passes for one of the package's."""
    if request.param:
        monkeypatch.setattr("trl_bilevel.cli.main.PACKAGE", Path(__file__).parent)
    return request.param


@pytest.mark.parametrize("function", [mistake, no_file, accident, deep, deep_value])
def test_a_users_error_is_a_sentence_and_a_crash_says_where(function, ours, monkeypatch, capsys):
    """A crash: a KeyError of ours, a RuntimeError of torch, a ValueError that another library raises."""
    monkeypatch.setattr(doctor, "run", lambda arguments: function())
    assert main(["doctor"]) == 1
    error = capsys.readouterr().err
    if function is no_file or (ours and function is mistake):
        assert error.startswith("trl-bilevel doctor: ") and "Traceback" not in error
    else:
        assert "Traceback (most recent call last)" in error and f"in {function.__name__}" in error
        assert "stopped by an error that it did not expect" in error


def test_the_place_of_a_users_error_can_be_asked_for(monkeypatch):
    monkeypatch.setattr(doctor, "run", lambda arguments: mistake())
    monkeypatch.setenv("TRL_BILEVEL_TRACEBACK", "1")
    with pytest.raises(ValueError, match="at least 1"):
        main(["doctor"])
