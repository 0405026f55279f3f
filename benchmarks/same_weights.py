"""`trl-bilevel rank` and `BilevelSFTTrainer` give the same weights, to the last bit: the real model, 400 rows.

    python -m benchmarks.same_weights

Runs in whatever environment it is started in: beside an older release of TRL it shows that the default path needs no
newer one. On 2 CPU cores it takes about five minutes. Writes nothing but what it prints, and exits with 1 if a weight
differs.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import trl
from datasets import Dataset, concatenate_datasets, load_dataset
from peft import LoraConfig

from trl_bilevel import BilevelSFTConfig, BilevelSFTTrainer
from trl_bilevel.data.assets import model_folder
from trl_bilevel.demo.tasks import make_task

ROWS = 400


def main() -> int:
    """Rank the rows by the command, train on them, and compare; returns the exit code."""
    folder = Path(tempfile.mkdtemp())
    task = make_task("quality")
    further = task.test.select(range(ROWS - len(task.train)))
    mixed = concatenate_datasets([task.train.remove_columns("kind"), further])
    sets = {"mixed": mixed, "trusted": task.validation}
    for name, rows in sets.items():
        rows.to_json(folder / f"{name}.jsonl")
    command = [sys.executable, "-m", "trl_bilevel.cli.main", "rank", "mixed.jsonl", "--trusted", "trusted.jsonl"]
    command += ["--output", "ranked.parquet", "--report", "False"]
    subprocess.run(command, cwd=folder, check=True)
    ranked = Dataset.from_parquet(str(folder / "ranked.parquet"))
    mixed, trusted = (
        load_dataset("json", data_files=str(folder / f"{name}.jsonl"), split="train", cache_dir=str(folder / "cache"))
        for name in sets
    )
    trainer = BilevelSFTTrainer(
        str(model_folder()),
        BilevelSFTConfig(
            output_dir=str(folder / "out"),
            per_device_train_batch_size=8,
            max_steps=1,
            learning_rate=1e-4,
            bf16=False,
            use_cpu=not torch.cuda.is_available(),
            report_to="none",
        ),
        train_dataset=mixed,
        validation_dataset=trusted,
        peft_config=LoraConfig(r=8, target_modules="all-linear"),
    )
    trainer.train()
    written, trained = torch.tensor(ranked["data_weight"][:]), trainer.sample_weights()
    same = torch.equal(written, trained)
    print(
        f"trl {trl.__version__}: {len(written)} weights of `rank`, {int((written == trained).sum())} equal the "
        f"trainer's to the last bit; they lie between {float(written.min()):.3f} and {float(written.max()):.3f}."
    )
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
