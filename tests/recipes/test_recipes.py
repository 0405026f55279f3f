"""Every recipe parses, builds its trainer on a tiny model of its architecture, and runs on data in its format."""

import itertools
import json
import re
import shlex
from pathlib import Path

import pytest
import trl
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from transformers import AutoConfig, Qwen3Config, Qwen3ForCausalLM

from recipes import prepare
from recipes.prepare import __main__ as prepare_command
from tests.conftest import make_tiny_model, make_tokenizer
from tests.recipes import fixtures
from trl_bilevel.cli import refine, sft
from trl_bilevel.cli.arguments import parse

ROOT = Path(__file__).parents[2]
OFFLINE = sorted(
    str(path.relative_to(ROOT))
    for folder in ("quality", "safety")
    for path in (ROOT / "recipes" / folder).glob("*.yaml")
    if not path.stem.endswith("-refine")
)
ONLINE = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "recipes").glob("*/*-refine.yaml"))
ACCELERATE = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "recipes" / "accelerate").glob("*.yaml"))
SECTIONS = (
    "What it does:",
    "Model:",
    "Data (",
    "Hardware:",
    "Memory (computed, not measured",
    "Steps:",
    "Expect:",
    "Run",
)
FAMILIES = {"Llama-3": "llama3", "Qwen3": "qwen3", "SmolLM2": "smollm2"}
MARKS = {
    "llama3": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "qwen3": ["<think>", "</think>"],
    "smollm2": [],
}
# Recipes whose 4-bit weights stay so; in the others they are bf16, which is faster on CPU.
IN_4_BIT = ("quality/llama3-8b-24gb", "quality/qwen3-1.7b-12gb")
# What is scaled down; all else is the recipe's.
COMMON = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "use_cpu": "true",
    "bf16": "false",
    "save_strategy": "no",
    "disable_tqdm": "true",
    "logging_steps": 1,
    "per_device_eval_batch_size": 16,
    "gradient_checkpointing": "false",
}
SFT = COMMON | {"max_steps": 2}
REFINE = COMMON | {
    "num_rounds": 1,
    "steps_per_round": 2,
    "num_generations": 2,
    "max_completion_length": 6,
}


def header(recipe):
    """The comment at the top as text, without its marks."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), (ROOT / recipe).read_text().splitlines())
    return "\n".join(line[1:].removeprefix(" ") for line in lines)


def commands(recipe):
    """The command lines of a recipe's header, as words."""
    text = header(recipe).replace("\\\n", " ")
    found = re.findall(r"^ +((?:accelerate launch|python -m) .*)$", text, re.MULTILINE)
    return [shlex.split(line) for line in found]


def values(recipe):
    return yaml.safe_load((ROOT / recipe).read_text())


def save_tiny_model(family, folder):
    """Two layers of a family, with a tokenizer that has its marks and the family's own chat template."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": MARKS[family]})
    if family != "smollm2":
        template = Path(trl.__file__).parent / "chat_templates" / f"{family}.jinja"
        tokenizer.chat_template = template.read_text()
    if family == "llama3":
        # As the real one: no padding token, and turns end in a mark of their own.
        tokenizer.bos_token, tokenizer.eos_token = "<|begin_of_text|>", "<|eot_id|>"
        tokenizer.pad_token = None
    sizes = {"hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 2048}
    if family == "qwen3":
        settings = sizes | {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
        ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
        model = Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), tie_word_embeddings=True, **settings, **ids))
    else:
        model = make_tiny_model(tokenizer, **sizes)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Tiny models, the prepared rows of each set, and a place for runs."""
    folder = tmp_path_factory.mktemp("recipes")
    for family in MARKS:
        save_tiny_model(family, folder / family)
    sizes = {"train_rows": 20, "validation_rows": 28, "test_rows": 5} | fixtures.hub()
    prepare.write_prepared(prepare.prepare_recipe("quality", **sizes), folder / "quality")
    prepare.write_prepared(prepare.prepare_recipe("safety", **sizes), folder / "safety")
    sizes["validation_rows"] = 12
    made = prepare.prepare_recipe("safety", construction="beavertails", **sizes)
    prepare.write_prepared(made, folder / "beavertails")
    return folder


def arguments_of(recipe, settings):
    if not any(name in recipe for name in IN_4_BIT):
        settings = settings | {"load_in_4bit": "false"}
    words = [word for name, value in settings.items() for word in (f"--{name}", *str(value).split())]
    return ["--config", str(ROOT / recipe), *words]


def run_offline(recipe, world):
    given = values(recipe)
    family = next(short for name, short in FAMILIES.items() if name in given["model_name_or_path"])
    data = world / Path(given["dataset_name"]).parent.name.removesuffix("-cpu")
    output = world / Path(given["output_dir"]).name
    if not output.exists():
        changed = SFT | {"model_name_or_path": world / family, "output_dir": output}
        for name in ("dataset_name", "validation_dataset_name", "eval_dataset_name"):
            changed[name] = data / Path(given[name]).name
        sft.main(*parse(sft.make_parser(), arguments_of(recipe, changed)))
    return output, data


@pytest.mark.parametrize("recipe", OFFLINE)
def test_offline_recipes_run(recipe, world):
    output, data = run_offline(recipe, world)
    given = values(recipe)
    saved = json.loads((output / "adapter_config.json").read_text())
    assert (saved["r"], saved["lora_alpha"]) == (given["lora_r"], given["lora_alpha"])
    if given["lora_target_modules"] != "all-linear":
        assert sorted(saved["target_modules"]) == given["lora_target_modules"]
    from datasets import Dataset

    weighted = Dataset.from_parquet(str(output / "_rows" / "weighted.parquet"))
    assert len(weighted) == json.loads((data / "prepare.lock.json").read_text())["sets"]["train"]["rows"]
    assert {"prompt", "completion", "source", "kind", "data_weight"} <= set(weighted.column_names)
    assert all(weight is not None for weight in weighted["data_weight"])
    assert AutoConfig.from_pretrained(saved["base_model_name_or_path"]).model_type in ("llama", "qwen3")


@pytest.mark.parametrize("recipe", ONLINE)
def test_online_recipes_go_on_from_the_offline_ones(recipe, world):
    given = values(recipe)
    offline = recipe.replace("-refine", "")
    assert values(offline)["output_dir"] == given["model_name_or_path"]
    assert given["dataset_name"] == f"{given['model_name_or_path']}/_rows/weighted.parquet"
    for name in ("validation_dataset_name", "eval_dataset_name"):
        assert given[name] == values(offline)[name]
    trained, data = run_offline(offline, world)
    output = world / Path(given["output_dir"]).name
    changed = REFINE | {"model_name_or_path": trained, "dataset_name": trained / "_rows" / "weighted.parquet"}
    changed |= {"validation_dataset_name": data / "validation.parquet", "eval_dataset_name": data / "test.parquet"}
    changed["output_dir"] = output
    refine.main(*parse(refine.make_parser(), arguments_of(recipe, changed)))
    (entry,) = [json.loads(line) for line in (output / "_rows" / "ledger.jsonl").read_text().splitlines()]
    assert (entry["questions"], entry["responses"]) == (2, 4)
    assert (output / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("recipe", [*OFFLINE, *ONLINE])
def test_headers_say_what_one_needs_to_know(recipe):
    text = header(recipe)
    places = [text.find("\n" + section) for section in SECTIONS]
    assert min(places) > 0 and places == sorted(places), dict(zip(SECTIONS, places, strict=True))
    assert "licen" in text.lower()
    items = re.findall(r"^ +(\d+\.\d\d)  (.*)$", text, re.MULTILINE)
    if not recipe.endswith(("cpu.yaml", "cpu-refine.yaml")):
        *parts, (total, last) = items
        assert last.startswith("in all, on a GPU of")
        assert abs(sum(float(value) for value, _ in parts) - float(total)) < 0.005
        assert float(total) < float(re.search(r"GPU of (\d+) GB", last)[1])
        assert "Not run here" in text


@pytest.mark.parametrize("recipe", [*OFFLINE, *ONLINE])
def test_the_commands_of_a_header_can_be_copied(recipe):
    found = commands(recipe)
    (make, *launches) = found
    assert make[:3] == ["python", "-m", "recipes.prepare"] and launches
    settings = prepare_command.make_parser().parse_args(make[3:])
    prepare_command.settings_of(settings, None)
    offline = recipe.replace("-refine", "")
    assert values(offline)["dataset_name"] == f"{settings.output}/train.parquet"
    for launch in launches:
        assert launch[2] == "--config_file" and launch[3] in ACCELERATE and launch[4] == "-m"
        arguments = launch[6:]
        arguments[1] = str(ROOT / arguments[1])
        command = {"trl_bilevel.cli.sft": sft, "trl_bilevel.cli.refine": refine}[launch[5]]
        # Mixed precision is for the machine that runs it.
        parse(command.make_parser(), [*arguments, "--use_cpu", "true", "--bf16", "false"])
    assert any(launch[7] == recipe for launch in launches)


@pytest.mark.parametrize("recipe", [OFFLINE[0], ONLINE[0]])
def test_unknown_keys_are_errors(recipe, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text((ROOT / recipe).read_text() + "lora_rank: 4\n")
    command = refine if recipe in ONLINE else sft
    with pytest.raises(ValueError, match="lora_rank"):
        parse(command.make_parser(), ["--config", str(path), "--use_cpu", "true", "--bf16", "false"])


@pytest.mark.parametrize("name", ACCELERATE)
def test_accelerate_reads_its_files(name):
    config = load_config_from_file(str(ROOT / name))
    sharded = config.distributed_type.value in ("FSDP", "DEEPSPEED")
    text = (ROOT / name).read_text()
    assert sharded == text.startswith("# FOR FIXED WEIGHTS ONLY (weight_estimator: none)")
    assert "Not run" in text or config.use_cpu


@pytest.mark.parametrize("name", ACCELERATE)
def test_the_commands_of_accelerate_files_can_be_copied(name):
    for launch in commands(name):
        assert launch[3] == name
        if launch[4] == "--num_processes":
            del launch[4:6]
        arguments = [word.replace("RECIPE", OFFLINE[1]) for word in launch[6:]]
        arguments[1] = str(ROOT / arguments[1])
        _, training, *_ = parse(sft.make_parser(), [*arguments, "--use_cpu", "true", "--bf16", "false"])
        assert (training.weight_estimator == "none") == ("FIXED WEIGHTS" in (ROOT / name).read_text())


def test_a_recipe_trains_with_fixed_weights_as_the_sharded_files_say(world):
    recipe = "recipes/safety/llama3-8b-80gb.yaml"
    trained, data = run_offline(recipe, world)
    (launch,) = commands("recipes/accelerate/zero2.yaml")
    given = dict(zip(launch[8::2], launch[9::2], strict=True))
    assert given.pop("--config") == "RECIPE"
    changed = COMMON | {name.removeprefix("--"): value for name, value in given.items()}
    changed |= {"dataset_name": trained / "_rows" / "weighted.parquet", "output_dir": world / "fixed", "max_steps": 2}
    changed |= {"model_name_or_path": world / "llama3", "validation_dataset_name": data / "validation.parquet"}
    changed["eval_dataset_name"] = data / "test.parquet"
    sft.main(*parse(sft.make_parser(), arguments_of(recipe, changed)))
    assert (world / "fixed" / "adapter_model.safetensors").is_file()
    # Its report shows the weights that were given.
    assert (world / "fixed" / "_rows" / "report.html").is_file()


def test_every_size_is_there():
    sizes = {"llama3-8b-24gb", "llama3-8b-80gb", "qwen3-1.7b-12gb", "cpu"}
    stems = {
        folder: {Path(p).stem for p in [*OFFLINE, *ONLINE] if f"/{folder}/" in p} for folder in ("quality", "safety")
    }
    both = sizes | {f"{size}-refine" for size in sizes}
    assert stems == {"quality": both, "safety": both | {f"beavertails-{size}" for size in sizes}}
