"""Without the extra `report`: what works all the same, and what says what to install."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import trl_bilevel
from trl_bilevel.extras import PACKAGES

# TRL itself imports jinja2, which needs markupsafe.
HIDDEN = ["matplotlib", "rich", "shtab"]
PATH = str(Path(trl_bilevel.__file__).parents[1])


def without_extra(code, hidden=HIDDEN, cwd=None, **environment):
    code = f"import sys\nfor name in {list(hidden)}: sys.modules[name] = None\n{code}"
    environment = os.environ | {"PYTHONPATH": PATH} | environment
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, env=environment)
    return done.returncode, done.stdout, done.stderr


def command(*arguments):
    return f"from trl_bilevel.cli.main import main; sys.exit(main({list(arguments)}))"


def test_package_and_trainers_are_imported():
    code, _, error = without_extra("import trl_bilevel; from trl_bilevel import BilevelSFTTrainer, SelfRefineTrainer")
    assert code == 0, error


def test_help_of_the_commands():
    code = (
        "import runpy; sys.argv = ['trl-bilevel', '--help']; runpy.run_module('trl_bilevel.cli.main', "
        "run_name='__main__')"
    )
    found, out, error = without_extra(code, PACKAGES)
    assert found == 0 and "commands:" in out, error


@pytest.mark.parametrize(
    ("arguments", "package"), [(("report", "out"), "matplotlib"), (("completion", "bash"), "shtab")]
)
def test_what_needs_the_extra_says_so(arguments, package):
    code, _, error = without_extra(command(*arguments))
    assert code == 1 and "Traceback" not in error
    assert f'{package}, which is not installed: pip install "trl-bilevel[report]"' in error


def test_write_report_says_so_too():
    code, _, error = without_extra("from trl_bilevel import write_report; write_report('out')")
    assert code == 1 and "ImportError: This needs matplotlib" in error and 'pip install "trl-bilevel[report]"' in error


def test_doctor_prints_plain_lines():
    code, out, error = without_extra(command("doctor"), HF_HUB_OFFLINE="1", FORCE_COLOR="1")
    assert code == 0, error
    assert "A basic run works here" in out and "Findings:" in out and "\x1b" not in out


def test_training_goes_through(tmp_path, tiny_model, tokenizer, rows):
    from datasets import Dataset

    tiny_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    Dataset.from_list(rows[:16]).to_json(tmp_path / "mixed.jsonl")
    Dataset.from_list(rows[40:48]).to_json(tmp_path / "trusted.jsonl")
    words = ["sft", "--model_name_or_path", "model", "--dataset_name", "mixed.jsonl", "--output_dir", "out"]
    words += ["--validation_dataset_name", "trusted.jsonl", "--max_steps", "2"]
    words += ["--use_cpu", "true", "--bf16", "false", "--report_to", "none", "--save_strategy", "no"]
    code, out, error = without_extra(command(*words), cwd=tmp_path)
    assert code == 0, error
    assert "Weighted rows: out/_rows/weighted.parquet" in out and "Report" not in error
    assert 'No report: This needs matplotlib, which is not installed: pip install "trl-bilevel[report]"' in out
