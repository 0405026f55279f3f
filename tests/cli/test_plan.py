"""`trl-bilevel plan` on config files, without weights, hub or GPU."""

import json

import pytest
from datasets import Dataset

from trl_bilevel.cli.main import main

RECIPE = """
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
output_dir: out
dtype: bfloat16
load_in_4bit: true
use_bnb_nested_quant: true
use_peft: true
lora_target_modules: all-linear
per_device_train_batch_size: 4
max_length: 1024
dataset_name: some/data
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return str(path)


def planned(capsys, *arguments):
    assert main(["plan", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def test_recipe_for_a_gpu_is_planned_on_a_machine_without(recipe, capsys):
    found = planned(capsys, "--config", recipe, "--gpu_memory", "24", "--training_rows", "10000")
    assert found["fits"] is True and found["way_to_fit"] == []
    assert found["run"]["device"] == "cuda" and found["run"]["autocast"] is True
    assert found["model"]["config_from"] == "table" and "built in here" in found["notes"][0]
    assert found["total_bytes"] == found["tensor_bytes"] + found["reserve_bytes"]
    assert found["work"]["total"] > found["work"]["plain"] > 0
    peak = next(moment for moment in found["moments"] if moment["name"] == found["peak"])
    assert peak["bytes"] == sum(peak["parts"].values()) == found["tensor_bytes"]


def test_what_does_not_fit_is_told_how_to(recipe, capsys):
    found = planned(capsys, "--config", recipe, "--gpu_memory", "8")
    assert found["fits"] is False and found["way_to_fit"]
    settings = {}
    for saving in found["way_to_fit"]:
        settings |= saving["settings"]
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    assert planned(capsys, "--config", recipe, "--gpu_memory", "8", *words)["fits"] is True


def test_tables(recipe, capsys):
    assert main(["plan", "--config", recipe, "--gpu_memory", "8", "--training_rows", "1000"]) == 0
    shown = capsys.readouterr().out
    for part in ("weights", "activations", "Does not fit", "With these it fits", "reading of hidden", "the whole run"):
        assert part in shown


def test_local_folder_and_rows(tmp_path, small_folder, rows, capsys):
    Dataset.from_list(rows[:40]).to_json(tmp_path / "mixed.jsonl")
    data, model = f"{tmp_path}/mixed.jsonl", str(small_folder)
    found = planned(capsys, "--model_name_or_path", model, "--dataset_name", data, "--use_cpu", "True")
    assert found["run"]["training_rows"] == 40 and found["run"]["device"] == "cpu"
    assert found["model"]["config_from"] == "folder" and found["reserve_bytes"] == 0
    assert found["model"]["trainable"] == found["model"]["parameters"]
    assert "LoRA adapters" in {saving["name"] for saving in found["savings"]}


@pytest.fixture
def small_folder(tiny_model, tmp_path):
    # The config alone: no weights are needed.
    folder = tmp_path / "model"
    tiny_model(hidden_size=512, intermediate_size=1024).config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Give the model"),
        (["--model_name_or_path", "nobody/nothing"], "no config of the model 'nobody/nothing'"),
        (["--model_config", "Llama-3-8B", "--load_in_4bit", "true"], "can only be trained with adapters"),
        (["--model_config", "Llama-3-8B", "--max_length", "None"], "max_length"),
        (["--model_config", "Llama-3-8B", "--rank", "true", "--weight_estimator", "none"], "weight_estimator"),
        (["--model_config", "Llama-3-8B", "--pilot_stepz", "3"], "pilot_stepz"),
    ],
)
def test_mistakes(arguments, message, capsys):
    assert main(["plan", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_rounds_are_not_planned(recipe, capsys):
    with open(recipe, "a") as file:
        file.write("num_rounds: 3\n")
    assert main(["plan", "--config", recipe]) == 1
    assert "only the offline run is planned" in capsys.readouterr().err


def test_a_ranking_is_planned(capsys):
    given = ["--model_config", "Llama-3-8B", "--dtype", "bfloat16", "--training_rows", "1000", "--rank", "true"]
    found = planned(capsys, *given, "--load_in_4bit", "true", "--gpu_memory", "24")
    assert found["fits"] is True and found["peak"] == "reading of rows"
    assert found["work"]["total"] > found["work"]["training"] == found["work"]["plain"] == 0
    assert not {"LoRA adapters", "weights chosen beforehand"} & {saving["name"] for saving in found["savings"]}
    assert main(["plan", *given]) == 0
    assert "0.0 M trained" in capsys.readouterr().out
