"""Peak GPU memory of recipes as they stand, against what `trl-bilevel plan` computes: on models of random weights.

python -m benchmarks.gpu_memory [--recipes quality/llama3-8b-24gb ...] [--small]

A model of the recipe's shape is made with random weights (memory does not depend on them) and kept in a folder; then
`trl-bilevel sft` and, for recipes with rounds, `trl-bilevel refine` run the recipe's own file on rows of full length,
few steps. Each run is a process of its own; its peak is that of PyTorch's allocator, from the first byte of the model
to the saved adapter. Adds to `benchmarks/results/gpu_memory.json`. `--small` tries the script itself, on narrow models
of two layers, and writes nothing: then a CPU will do.
"""

import argparse
import contextlib
import io
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.run import machine, versions
from tests.recipes.test_recipes import FAMILIES, header, save_tiny_model
from trl_bilevel.cli import plan, refine, sft
from trl_bilevel.cli.arguments import parse
from trl_bilevel.data.assets import docstrings
from trl_bilevel.planning.shapes import KNOWN, known_name

TARGET = Path(__file__).parent / "results" / "gpu_memory.json"
RECIPES = ("quality/llama3-8b-24gb", "quality/qwen3-1.7b-12gb")
ROWS = {"train": 64, "validation": 32, "test": 4}
# Of a question and its answer: longer than `max_length` tokens together, a question is not.
WORDS, WORDS_SMALL = (550, 1000), (10, 20)
# Few steps, each as large as the recipe's.
SHORT = {"save_strategy": "no", "logging_steps": 1, "disable_tqdm": "true"}
SHORT_OFFLINE = SHORT | {"max_steps": 3}
# The rows are few: every question is asked, so that a round is as large as the recipe's.
SHORT_ONLINE = SHORT | {"num_rounds": 1, "question_fraction": 1.0}
NARROW = {"vocab_size": 2048, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
ON_CPU = {"use_cpu": "true", "bf16": "false", "max_length": 128, "max_completion_length": 8}


def make_model(recipe: dict[str, Any], folder: Path, small: bool) -> None:
    """A model of the recipe's shape with random bf16 weights, and a tokenizer with the family's chat template."""
    family = next(short for name, short in FAMILIES.items() if name in recipe["model_name_or_path"])
    save_tiny_model(family, folder)
    tiny = json.loads((folder / "config.json").read_text())
    shape = KNOWN[known_name(recipe["model_name_or_path"])] | (NARROW if small else {})
    ids = {name: tiny[name] for name in ("pad_token_id", "eos_token_id", "bos_token_id")}
    config = AutoConfig.for_model(**(shape | ids))
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)


def make_rows(folder: Path, prompt: int, completion: int) -> None:
    """Parquet files of rows of so many words."""
    words = " ".join(row["description"] for row in docstrings()).split()
    for number, (name, count) in enumerate(ROWS.items()):
        rows = []
        for row in range(count):
            text = (words * 2)[(number * 101 + row) * 7 :]
            question, answer = " ".join(text[:prompt]), " ".join(text[prompt : prompt + completion])
            turns = ([{"role": "user", "content": question}], [{"role": "assistant", "content": answer}])
            rows.append({"prompt": turns[0], "completion": turns[1], "source": "random", "kind": "random"})
        Dataset.from_list(rows).to_parquet(str(folder / f"{name}.parquet"))


def words_of(recipe: str, settings: dict[str, Any]) -> list[str]:
    if not torch.cuda.is_available():
        given = yaml.safe_load(Path(f"recipes/{recipe}.yaml").read_text())
        settings = settings | {k: v for k, v in ON_CPU.items() if k != "max_completion_length" or k in given}
    return [
        "--config",
        f"recipes/{recipe}.yaml",
        *(word for name, value in settings.items() for word in (f"--{name}", str(value))),
    ]


def planned(recipe: str) -> dict[str, Any]:
    """What the planner says of the recipe as it stands; of one with rounds, what the recipe's own header says."""
    if recipe.endswith("-refine"):
        *parts, (total, _) = re.findall(r"^ +(\d+\.\d\d)  (.*)$", header(f"recipes/{recipe}.yaml"), re.MULTILINE)
        assumed = sum(float(value) for value, text in parts if "(assumed)" in text)
        return {"tensor_bytes": round((float(total) - assumed) * 1e9), "total_bytes": round(float(total) * 1e9)}
    text = io.StringIO()
    device = ["--validation_rows", "32", "--json", "true", "--device", "cuda"]
    with contextlib.redirect_stdout(text):
        plan.main(*parse(plan.make_parser(), ["--config", f"recipes/{recipe}.yaml", *device]))
    found = json.loads(text.getvalue())
    return {name: found[name] for name in ("tensor_bytes", "total_bytes", "peak", "moments")}


def run_one(recipe: str, folder: Path) -> dict[str, Any]:
    """Run a recipe in this process."""
    online = recipe.endswith("-refine")
    files = {
        "dataset_name": folder / "train.parquet",
        "validation_dataset_name": folder / "validation.parquet",
        "eval_dataset_name": folder / "test.parquet",
    }
    offline_output = folder / "out" / recipe.removesuffix("-refine")
    start = time.perf_counter()
    if online:
        settings = SHORT_ONLINE | files | {"dataset_name": offline_output / "_rows" / "weighted.parquet"}
        settings |= {"model_name_or_path": offline_output, "output_dir": folder / "out" / recipe}
        settings |= {"validation_dataset_split": "train", "eval_dataset_split": "train"}
        refine.main(*parse(refine.make_parser(), words_of(recipe, settings)))
    else:
        settings = SHORT_OFFLINE | files | {"model_name_or_path": folder / "model", "output_dir": offline_output}
        sft.main(*parse(sft.make_parser(), words_of(recipe, settings)))
    found: dict[str, Any] = {"seconds": round(time.perf_counter() - start, 1)}
    if torch.cuda.is_available():
        found["allocated_bytes"] = torch.cuda.max_memory_allocated()
        found["reserved_bytes"] = torch.cuda.max_memory_reserved()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES), help="without folder `recipes` and suffix")
    parser.add_argument("--small", action="store_true", help="narrow models, only to try this script")
    parser.add_argument("--one", help="one run in this process, printed as JSON")
    parser.add_argument("--make", help="only the model and the rows of one recipe, in --folder")
    parser.add_argument("--folder", type=Path, help="of --one and --make")
    options = parser.parse_args()
    if options.make:
        recipe = yaml.safe_load(Path(f"recipes/{options.make}.yaml").read_text())
        make_model(recipe, options.folder / "model", options.small)
        make_rows(options.folder, *(WORDS_SMALL if options.small else WORDS))
        return
    if options.one:
        print(json.dumps(run_one(options.one, options.folder)))
        return
    if not (options.small or torch.cuda.is_available()):
        raise SystemExit("No GPU: there is nothing to measure here. `--small` tries the script itself.")
    memory = Path("/dev/shm")
    for recipe in options.recipes:
        with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name:
            itself = [sys.executable, "-m", "benchmarks.gpu_memory", "--folder", name]
            # In a process of its own, whose memory is gone when it is.
            subprocess.run([*itself, "--make", recipe, *(["--small"] if options.small else [])], check=True)
            for run in (recipe, f"{recipe}-refine"):
                command = [*itself, "--one", run]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
                if done.returncode:
                    print(f"{run} failed:\n{done.stdout[-2000:]}", flush=True)
                    continue
                record = {"measured": json.loads(done.stdout.splitlines()[-1]), "computed": planned(run)}
                record |= {"versions": versions(), "machine": machine()}
                show(run, record)
                if not options.small:
                    runs = json.loads(TARGET.read_text()) if TARGET.exists() else {}
                    TARGET.write_text(json.dumps(runs | {run: record}, indent=1) + "\n")


def show(run: str, record: dict[str, Any]) -> None:
    measured, computed = record["measured"], record["computed"]
    if "allocated_bytes" in measured:
        ratio = computed["tensor_bytes"] / measured["allocated_bytes"]
        figures = (measured["allocated_bytes"], measured["reserved_bytes"], computed["tensor_bytes"])
        allocated, reserved, tensors = (f"{value / 1e9:.2f}" for value in figures)
        print(f"{run}: {allocated} GB allocated ({reserved} reserved), computed {tensors}: {ratio:.3f}", flush=True)
    else:
        print(f"{run}: ran in {measured['seconds']} s", flush=True)


if __name__ == "__main__":
    main()
