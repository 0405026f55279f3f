"""Trains a tiny model in each process of a `torchrun`, or alone; the first process writes what came of it."""

import json
import os
import sys
from pathlib import Path

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig

from tests.conftest import base_arguments, losses, make_tiny_model, make_tokenizer
from trl_bilevel import BilevelSFTConfig, BilevelSFTTrainer
from trl_bilevel.demo.assets import docstrings


def main(folder: str, overrides: str) -> None:
    torch.set_num_threads(1)
    disable_progress_bars()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    rows = [{"prompt": f"What is {r['name']}?\n", "completion": r["description"]} for r in docstrings()[:60]]
    settings = base_arguments(Path(folder)) | {
        "per_device_train_batch_size": 8 // world,
        "max_steps": 8,
        "pilot_steps": 3,
        "pilot_learning_rate": 1e-2,
        "learning_rate": 1e-2,
        "ddp_find_unused_parameters": False,
    }
    tokenizer = make_tokenizer()
    trainer = BilevelSFTTrainer(
        make_tiny_model(tokenizer).double(),
        BilevelSFTConfig(**(settings | json.loads(overrides))),
        train_dataset=Dataset.from_list(rows[:40]),
        validation_dataset=Dataset.from_list(rows[40:]),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )
    assert trainer.accelerator.num_processes == world
    trainer.train()
    if trainer.is_world_process_zero():
        result = {"losses": losses(trainer), "weights": trainer.sample_weights().tolist()}
        (Path(folder) / "result.json").write_text(json.dumps(result))
    # A process that leaves with its connections open may abort in their threads' destructors.
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
