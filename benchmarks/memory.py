"""Measured peak memory of training against what `trl_bilevel.planning` computes, on a Llama of SmolLM2-135M's shape.

python -m benchmarks.memory [--settings lora ...] [--force]

Weights are random: memory does not depend on them. Every run is a process of its own. What is measured is the memory
of tensors, as PyTorch's allocator reports each allocation and release to its profiler, on top of the parameters and
buffers that are there when training starts; the peak of the process (RSS, less what it has before training starts)
stands beside it. Adds what is missing to `benchmarks/results/memory.json`.
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from peft import LoraConfig
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, PrinterCallback

from benchmarks.cost import make_rows
from benchmarks.run import machine, versions
from benchmarks.speed import forget_peak, peak
from trl_bilevel import BilevelSFTConfig, BilevelSFTTrainer
from trl_bilevel.planning.memory import MemoryPlan, estimate_memory
from trl_bilevel.planning.shapes import find_config, model_shape, run_shape

HERE = Path(__file__).parent
ROWS, TOKENS, BATCH, VALIDATION, STEPS = 32, 256, 2, 8, 2

LORA: dict[str, Any] = {"lora_r": 16}
CHECKPOINTING: dict[str, Any] = {"gradient_checkpointing": True}
PILOT: dict[str, Any] = {"weight_estimator": "value_function", "pilot_steps": 2}
# With tiles of the LM head as narrow as this one, the decoder's layers make the peak, as they do on a GPU.
NARROW: dict[str, Any] = {"tile_width": 1024}
SETTINGS: dict[str, dict[str, Any]] = {
    "LoRA, checkpointing": LORA | CHECKPOINTING,
    "LoRA": LORA,
    "LoRA, dropout, mixed precision": LORA | {"bf16": True, "lora_dropout": 0.05},
    "LoRA, eager attention": LORA | {"attention": "eager"},
    "full, checkpointing": CHECKPOINTING,
    "full, 8-bit AdamW, checkpointing": CHECKPOINTING | {"optim": "adamw_bnb_8bit"},
    "NF4, LoRA, checkpointing": LORA | CHECKPOINTING | {"dtype": "bfloat16", "quantisation": "4bit_nested"},
    "LoRA, checkpointing, pilot run": LORA | CHECKPOINTING | PILOT,
    "LoRA, checkpointing, narrow tiles": LORA | CHECKPOINTING | NARROW,
    "NF4, LoRA, checkpointing, narrow tiles": LORA
    | CHECKPOINTING
    | NARROW
    | {"dtype": "bfloat16", "quantisation": "4bit_nested"},
    "full, checkpointing, pilot run, narrow tiles": CHECKPOINTING | PILOT | NARROW,
}


def split(setting: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings of the model, and those of the trainer."""
    names = ("lora_r", "lora_dropout", "dtype", "quantisation", "attention", "tile_width")
    return {k: v for k, v in setting.items() if k in names}, {k: v for k, v in setting.items() if k not in names}


def make_config(setting: dict[str, Any]) -> BilevelSFTConfig:
    arguments = {
        "output_dir": tempfile.mkdtemp(),
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "per_device_eval_batch_size": BATCH,
        "learning_rate": 1e-4,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "logging_steps": 10**6,
        "max_length": TOKENS,
        "weight_estimator": "none",
        "dataset_kwargs": {"skip_prepare_dataset": True},
    }
    return BilevelSFTConfig(**(arguments | split(setting)[1]))


def adapters(setting: dict[str, Any]) -> LoraConfig | None:
    if "lora_r" not in setting:
        return None
    dropout = setting.get("lora_dropout", 0.0)
    return LoraConfig(r=setting["lora_r"], lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM")


def plan(setting: dict[str, Any], config: LlamaConfig, tokens: int = TOKENS) -> MemoryPlan:
    """What the planner says."""
    quantisation = setting.get("quantisation")
    model = model_shape(
        config,
        dtype=setting.get("dtype", "float32"),
        peft_config=adapters(setting),
        quantised=quantisation is not None,
    )
    run = run_shape(
        make_config(setting),
        device="cpu",
        tokens=tokens,
        training_rows=ROWS,
        validation_rows=VALIDATION,
        quantisation=quantisation,
        attention=setting.get("attention", "sdpa"),
        dropout=setting.get("lora_dropout", 0.0),
        padded=False,
        **({"tile_width": setting["tile_width"]} if "tile_width" in setting else {}),
    )
    return estimate_memory(model, run)


def make_model(setting: dict[str, Any], config: LlamaConfig) -> Any:
    torch.manual_seed(0)
    config._attn_implementation = setting.get("attention", "sdpa")
    dtype = getattr(torch, setting.get("dtype", "float32"))
    model = LlamaForCausalLM(config).to(dtype)
    if "quantisation" not in setting:
        return model
    # Quantisation happens as weights are loaded.
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=setting["quantisation"] == "4bit_nested",
            bnb_4bit_compute_dtype=dtype,
        )
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=quantization)


def held(model: torch.nn.Module) -> int:
    """Bytes of parameters, buffers and quantisation states, shared ones once."""
    tensors = [*model.parameters(), *model.buffers()]
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            tensors += [state.absmax, state.code]
            if state.nested:
                tensors += [state.offset, state.state2.absmax, state.state2.code]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def measure(setting: dict[str, Any], config: LlamaConfig, tokenizer: Any, tokens: int = TOKENS) -> dict[str, int]:
    """Bytes at the peak of a run: of tensors, and of the process."""
    if "tile_width" in setting:
        transformers.logging.set_verbosity_error()
        import trl.trainer.utils

        trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE = setting["tile_width"]
    rows: Dataset = make_rows(ROWS, 0, tokens)
    trainer = BilevelSFTTrainer(
        make_model(setting, config),
        make_config(setting),
        train_dataset=rows,
        validation_dataset=make_rows(VALIDATION, 1, tokens),
        processing_class=tokenizer,
        peft_config=adapters(setting),
    )
    trainer.remove_callback(PrinterCallback)
    # What an earlier run left must not be released while this one is measured.
    gc.collect()
    there = held(trainer.model)
    forget_peak()
    before = peak()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer.train()
    process = peak() - before + there
    events = profiler.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    now = most = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return {"tensors": there + most, "process": process}


def table(runs: dict[str, Any]) -> str:
    """Markdown."""
    lines = ["| run | measured, MiB | computed, MiB | ratio | peak at |", "|---|---|---|---|---|"]
    for name in (name for name in SETTINGS if name in runs):
        measured, computed = runs[name]["measured"]["tensors"], runs[name]["computed"]
        sizes = f"{measured / 2**20:,.0f} | {computed / 2**20:,.0f} | {computed / measured:.3f}"
        lines.append(f"| {name} | {sizes} | {runs[name]['peak_at']} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS))
    parser.add_argument("--force", action="store_true", help="measure again what has been measured")
    parser.add_argument("--table", action="store_true", help="print the table of docs/planning.md")
    parser.add_argument("--one", help="one run in this process, printed as JSON")
    options = parser.parse_args()
    config = find_config("SmolLM2-135M")[0]
    config.update({"pad_token_id": 0, "eos_token_id": 1})
    if options.one:
        from tests.conftest import make_tokenizer

        print(json.dumps(measure(SETTINGS[options.one], config, make_tokenizer())))
        return
    target = HERE / "results" / "memory.json"
    runs: dict[str, Any] = json.loads(target.read_text())["runs"] if target.exists() else {}
    if options.table:
        print(table(runs))
        return
    for name in options.settings:
        if name not in runs or options.force:
            command = [sys.executable, "-m", "benchmarks.memory", "--one", name]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            runs[name] = {"measured": json.loads(done.stdout.splitlines()[-1])}
        found = plan(SETTINGS[name], config)
        runs[name]["computed"] = found.tensor_bytes
        runs[name]["peak_at"] = found.peak
        ratio = found.tensor_bytes / runs[name]["measured"]["tensors"]
        print(f"{name:48} {ratio:.3f} {found.peak}", flush=True)
        record = {"batch": BATCH, "tokens": TOKENS, "runs": runs, "versions": versions(), "machine": machine()}
        target.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
