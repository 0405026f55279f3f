"""Step time and peak memory of selection against TRL's `SFTTrainer`, alternating, on SmolLM2-135M-Instruct with LoRA.

python -m benchmarks.speed [--repeats 3] [--steps 12] [--processes 2]

Each run is a process of its own, so that its peak memory is its own. All rows have 48 tokens, so that which rows are
visited does not change the work of a step. Writes
`benchmarks/results/speed.json`; ratios of medians are what counts. Run it on an idle machine.

With `--processes N` the same under DDP, 8 rows per process, `SFTTrainer` and `balanced` only; figures of the first
process, and the bytes of a step that it exchanges for the selector and for the gradients. Writes
`benchmarks/results/speed_processes.json`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from benchmarks.cost import make_rows
from benchmarks.run import machine, versions
from trl_bilevel import BilevelSFTConfig, BilevelSFTTrainer
from trl_bilevel.data import assets
from trl_bilevel.demo.experiment import Budget, lora, model_dtype

HERE = Path(__file__).parent
ROWS, TOKENS, BATCH, VALIDATION = 128, 48, 8, 32
WARM_UP = 2
SIDES: dict[str, dict[str, Any] | None] = {
    "SFTTrainer": None,
    "balanced": {},
    "balanced, lambda = 0.5": {"validation_loss_weight": 0.5},
}


class Clock(TrainerCallback):
    """Seconds of each optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        synchronise()
        self.start = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        synchronise()
        self.seconds.append(time.perf_counter() - self.start)


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def forget_peak() -> None:
    """Forget the peak of memory so far: loading the model is not what is measured."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """Bytes at the peak: of the process on a CPU, of the allocator on a GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def run_side(side: str, steps: int) -> dict[str, float]:
    """One run in this process, or in this and those that were started with it."""
    from tests.distributed.worker import count_exchanged_bytes

    exchanged: list[int] = []
    count_exchanged_bytes(exchanged)
    folder = str(assets.model_folder())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=model_dtype())
    arguments: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(),
        "max_steps": steps,
        "per_device_train_batch_size": BATCH,
        "per_device_eval_batch_size": BATCH,
        "learning_rate": 5e-4,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": not torch.cuda.is_available(),
        "bf16": False,
        "disable_tqdm": True,
        "logging_steps": 8,
        "dataset_kwargs": {"skip_prepare_dataset": True},
    }
    parts = {
        "train_dataset": make_rows(ROWS, 0, TOKENS),
        "processing_class": AutoTokenizer.from_pretrained(folder),
        "peft_config": lora(folder, Budget().lora_layers),
    }
    setting = SIDES[side]
    if setting is None:
        trainer = SFTTrainer(model, SFTConfig(**arguments), **parts)
    else:
        args = BilevelSFTConfig(**(arguments | setting))
        trainer = BilevelSFTTrainer(model, args, validation_dataset=make_rows(VALIDATION, 1, TOKENS), **parts)
    clock = Clock()
    trainer.add_callback(clock)
    trainer.remove_callback(PrinterCallback)
    forget_peak()
    start = time.perf_counter()
    trainer.train()
    found = {
        "median_step_seconds": statistics.median(clock.seconds[WARM_UP:]),
        "total_seconds": time.perf_counter() - start,
        "peak_bytes": peak(),
    }
    if trainer.accelerator.num_processes > 1:
        trainable = [p for p in trainer.model.parameters() if p.requires_grad]
        found["selector_bytes_per_step"] = sum(exchanged) / steps
        found["gradient_bytes_per_step"] = sum(p.numel() * p.element_size() for p in trainable)
        trainer.accelerator.wait_for_everyone()
        trainer.accelerator.end_training()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--side", choices=SIDES, help="one run in this process, printed as JSON")
    options = parser.parse_args()
    if options.side:
        found = run_side(options.side, options.steps)
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(found))
        return
    assets.model_folder()
    several = options.processes > 1
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(options.processes)]
    environment = os.environ | ({"ACCELERATE_USE_CPU": "true"} if not torch.cuda.is_available() else {})
    sides = list(SIDES)[:2] if several else list(SIDES)
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for _ in range(options.repeats):
        for side in sides:
            command = [sys.executable, *(launcher if several else []), "-m", "benchmarks.speed"]
            command += ["--side", side, "--steps", str(options.steps)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
            runs[side].append(next(json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")))
            print(side, runs[side][-1], flush=True)
    record = {
        "processes": options.processes,
        "rows": ROWS,
        "tokens_per_row": TOKENS,
        "batch": BATCH,
        "steps": options.steps,
        "runs": runs,
        "versions": versions(),
        "machine": machine(),
    }
    name = "speed_processes.json" if several else "speed.json"
    (HERE / "results" / name).write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
