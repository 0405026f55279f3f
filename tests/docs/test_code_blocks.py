"""Every code block of README and docs: Python runs on a tiny model, commands and configs are parsed."""

import ast
import json
import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset

from recipes.prepare.__main__ import make_parser
from tests.conftest import make_tiny_model
from tests.docs.blocks import LANGUAGES, PAGES, ROOT, blocks_of, commands_of, in_language
from trl_bilevel import BilevelSFTConfig, BilevelSFTTrainer
from trl_bilevel.cli.arguments import parse
from trl_bilevel.cli.main import COMMANDS
from trl_bilevel.data.contamination import contaminate

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
# Commands that are not ours and need no check, by their first words.
KNOWN = (["pip", "install"],)
LAUNCHED = re.compile(r"accelerate launch (?:--\S+ \S+ )*-m trl_bilevel\.cli\.(\w+)")
# What docs leave to the reader's machine: it has no GPU here, and not the time for long responses.
ON_THIS_MACHINE = {
    f'"{HUB_NAME}"': '"tiny"',
    "BilevelSFTConfig(output_dir": f"BilevelSFTConfig(use_cpu={not torch.cuda.is_available()}, output_dir",
}
SMALLER_ROUNDS = {"use_cpu": not torch.cuda.is_available(), "max_completion_length": 8}


@pytest.fixture(scope="module")
def world(tmp_path_factory, tokenizer):
    """A folder with a tiny model and the files that pages name."""
    folder = tmp_path_factory.mktemp("docs")
    make_tiny_model(tokenizer).save_pretrained(folder / "tiny")
    tokenizer.save_pretrained(folder / "tiny")
    (folder / "run.yaml").write_text("model_name_or_path: tiny\ndataset_name: mixed.jsonl\noutput_dir: out\n")
    return folder


def rows_between(start, stop):
    from trl_bilevel.data.assets import docstrings

    rows = docstrings()[start:stop]
    return Dataset.from_list([{"prompt": f"`{row['name']}`?\n", "completion": row["description"]} for row in rows])


@pytest.fixture
def names(world, monkeypatch):
    """What pages take for granted: rows, classes, a trained trainer."""
    import peft

    import trl_bilevel

    monkeypatch.chdir(world)
    mixed, trusted = contaminate(rows_between(60, 100), kinds=["lazy"]).remove_columns("kind"), rows_between(0, 30)
    init = trl_bilevel.SelfRefineConfig.__init__
    monkeypatch.setattr(
        trl_bilevel.SelfRefineConfig, "__init__", lambda self, **given: init(self, **(given | SMALLER_ROUNDS))
    )
    return {
        "mixed": mixed,
        "trusted": trusted,
        "polite": rows_between(30, 40),
        "held_out": rows_between(40, 60),
        "LoraConfig": peft.LoraConfig,
        **{name: getattr(trl_bilevel, name) for name in trl_bilevel.__all__},
    }


def trained(names, folder, **settings):
    args = BilevelSFTConfig(output_dir=folder, max_steps=2, use_cpu=True, save_strategy="no", **settings)
    trainer = BilevelSFTTrainer(
        "tiny",
        args,
        train_dataset=names["mixed"],
        validation_dataset=names["trusted"],
        peft_config=names["LoraConfig"](target_modules="all-linear"),
    )
    trainer.train()
    return trainer


def give_files(names, code):
    """The weighted rows of earlier runs that the code reads."""
    for path in map(Path, re.findall(r'read_parquet\("([^"]+)"\)', code)):
        path.parent.mkdir(parents=True, exist_ok=True)
        count = len(names["mixed"])
        kinds = names["mixed"].add_column("kind", ["good", "unsafe"] * (count // 2))
        kinds.add_column("data_weight", [0.5 + row / count for row in range(count)]).to_parquet(path)


@pytest.mark.parametrize("page", sorted({block.page for block in in_language("python")}))
def test_python_runs(page, names):
    """The blocks of a page run one after the other, in one namespace."""
    blocks = [block for block in blocks_of(page) if block.language == "python"]
    code = "\n".join(block.code for block in blocks)
    if re.search(r"\btrainer\b", code.partition("trainer = ")[0]):
        names["trainer"] = trained(names, "out")
    if "uniform_out" in code:
        trained(names, "uniform_out", weight_estimator="none")
    give_files(names, code)
    for block in blocks:
        ast.parse(block.code)
        if block.reason:
            continue
        text = block.code
        for there, here in ON_THIS_MACHINE.items():
            text = text.replace(there, here)
        exec(compile("\n" * (block.line - 1) + text, block.page, "exec"), names)


@pytest.mark.parametrize("block", in_language("bash"), ids=str)
def test_commands_parse(block, world, monkeypatch):
    """Options exist, required ones are given, `make` targets are there."""
    monkeypatch.chdir(world)
    assert commands_of(block.code)
    for command in commands_of(block.code):
        check_command(shlex.split(LAUNCHED.sub(r"trl-bilevel \1", command)))


def check_command(words):
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert words[1:] and set(words[1:]) <= set(targets), f"{words}: the targets are {targets}"
    elif words[0] == "trl-bilevel":
        assert words[1] in COMMANDS, f"there is no command {words[1]}"
        parse_command(import_module(f"trl_bilevel.cli.{words[1]}"), words[1], words[2:])
    elif words[:3] == ["python", "-m", "recipes.prepare"]:
        make_parser().parse_args(words[3:])
    else:
        assert words[:2] in KNOWN, f"{words}: an unknown command. Check it here, or list it."


def parse_command(module, name, words):
    parser = module.make_parser()
    if hasattr(parser, "parse_args_and_config"):
        # The model or the rows come first, without an option; the others train, and TRL must know that no GPU is here.
        first = {"evaluate": "--model_name_or_path", "rank": "--rows"}
        words = [first[name], *words] if name in first else [*words, "--use_cpu", "true"]
        parse(parser, words)
    else:
        parser.parse_args(words)


@pytest.mark.parametrize("block", in_language("yaml"), ids=str)
def test_configs_parse(block, tmp_path):
    """A config file of `sft`, or of `refine` if it has rounds."""
    from trl_bilevel.cli import refine, sft

    values = yaml.safe_load(block.code)
    module = refine if {"num_rounds", "steps_per_round"} & set(values) else sft
    (tmp_path / "run.yaml").write_text(block.code)
    given = parse(module.make_parser(), ["--config", str(tmp_path / "run.yaml"), "--use_cpu", "true"])
    known = {key: value for part in given for key, value in vars(part).items()}
    assert {key: known[key] for key in values if key != "report_to"} == {
        key: value for key, value in values.items() if key != "report_to"
    }


@pytest.mark.parametrize("block", in_language("json"), ids=str)
def test_rows_parse(block):
    for line in block.code.splitlines():
        json.loads(line)


@pytest.mark.parametrize("page", PAGES)
def test_no_block_escapes(page):
    """Each fence is one that the tests above look at, and no command stands in an indented block."""
    text = (ROOT / page).read_text()
    blocks = blocks_of(page)
    assert text.count("\n```") == 2 * len(blocks)
    assert {block.language for block in blocks} <= LANGUAGES
    assert not re.findall(r"^    (?:trl-bilevel|make|pip|accelerate) .*", text, re.M)


def test_bad_commands_are_found(world, monkeypatch):
    monkeypatch.chdir(world)
    good = "trl-bilevel sft --config run.yaml --max_steps 3"
    check_command(shlex.split(good))
    for bad in (
        good.replace("max_steps", "pilots"),
        "trl-bilevel exports out",
        "python -m recipes.prepare quality",
        "trl-bilevel export out --best 3 --output x.jsonl",
        "trl-bilevel export out",
        "make everything",
        "rm -r out",
    ):
        with pytest.raises((AssertionError, ValueError, SystemExit)):
            check_command(shlex.split(bad))
