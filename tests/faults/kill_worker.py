"""Trains, kills itself in a given phase, resumes; one process tree, so that torch is imported once.

Usage: python -m tests.faults.kill_worker (sft | refine) FOLDER; prints one JSON line per kill.
"""

import itertools
import json
import os
import shutil
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig

from tests.conftest import LAZY, base_arguments, make_tiny_model, make_tokenizer
from trl_bilevel import BilevelSFTConfig, BilevelSFTTrainer, SelfRefineConfig, SelfRefineTrainer
from trl_bilevel.data.assets import docstrings

SAVING = {
    "train": "training_step",
    "save": "_save_checkpoint",
    "save_model": "save_model",
    "save_optimizer": "_save_optimizer_and_scheduler",
    "save_random_state": "_save_rng_state",
}
# Where a run is killed; each of these methods is entered several times in a run.
PHASES = {
    "refine": SAVING
    | {
        "generate": "_generate",
        "score": "_score_responses",
        "round_begin": "begin_round",
        "round_end": "end_round",
        "evaluate": "_losses",
        "choose": "choose_weights",
    },
    "sft": SAVING | {"choose": "choose_weights", "evaluate": "evaluate", "log": "log"},
}


# Which times: a round's methods come once per round, a step's more often.
COUNTS = {"refine": (1, 2, 3), "sft": (1, 3)}


def doomed(base: type, method: str, count: int, when: str) -> type:
    """The trainer, killed when it enters or leaves a method for the `count`-th time; never for 0."""

    class Doomed(base):  # type: ignore[misc, valid-type]
        entered = 0

    def deadly(self, *args, **kwargs):
        self.entered += 1
        number = self.entered
        if number == count and when == "entering":
            os.kill(os.getpid(), signal.SIGKILL)
        out = getattr(base, method)(self, *args, **kwargs)
        if number == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return out

    if count:
        setattr(Doomed, method, deadly)
    return Doomed


def make(kind: str, folder: Path, method: str, count: int, when: str) -> Any:
    rows = [
        {"prompt": f"What does `{row['name']}` do?\n", "completion": row["description"]} for row in docstrings()[:80]
    ]
    mixed = [row | {"completion": LAZY} if n % 2 else row for n, row in enumerate(rows[:40])]
    tokenizer = make_tokenizer()
    settings = base_arguments(folder) | {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": 2,
    }
    parts = {
        "model": make_tiny_model(tokenizer),
        "train_dataset": Dataset.from_list(mixed),
        "processing_class": tokenizer,
        "peft_config": LoraConfig(r=4, target_modules="all-linear"),
    }
    if kind == "sft":
        # All of a checkpoint's parts move: weights, the lower level, validation term.
        settings |= {
            "max_steps": 5,
            "selector_preset": "sparse_centred",
            "eval_strategy": "steps",
            "eval_steps": 2,
        }
        if method == "choose_weights":
            settings |= {"selector_preset": "balanced", "validation_loss_weight": 0.5}
            settings |= {"weight_estimator": "value_function", "pilot_steps": 8}
        trainer = doomed(BilevelSFTTrainer, method, count, when)
        parts |= {"validation_dataset": Dataset.from_list(rows[40:70]), "eval_dataset": Dataset.from_list(rows[70:])}
        return trainer(args=BilevelSFTConfig(**settings), **parts)
    settings |= {"max_steps": -1, "num_rounds": 2, "steps_per_round": 2, "max_completion_length": 8}
    trainer = doomed(SelfRefineTrainer, method, count, when)
    return trainer(args=SelfRefineConfig(**settings), validation_dataset=Dataset.from_list(rows[40:]), **parts)


def train(kind: str, folder: Path, method: str, count: int, when: str, resume: bool) -> None:
    trainer = make(kind, folder, method, count, when)
    try:
        trainer.train(resume_from_checkpoint=resume)
    except ValueError as error:
        if "no complete checkpoint" not in str(error):
            raise
        trainer.train()
    trainer.save_model(str(folder / "final"))


def outcome(folder: Path) -> tuple[bytes, bytes, list[dict], list[str]]:
    """The final adapter and weights, the ledger without wall times, and the responses' files."""
    file = folder / "out" / "_rows" / "ledger.jsonl"
    ledger = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    entries = [{k: v for k, v in entry.items() if k != "seconds"} for entry in ledger]
    responses = [
        Dataset.from_parquet(str(p)).to_dict() for p in sorted((folder / "out" / "_rows" / "responses").glob("*"))
    ]
    tensors = [(folder / "final" / f"{name}.safetensors").read_bytes() for name in ("adapter_model", "weights")]
    return tensors[0], tensors[1], entries, [json.dumps(r) for r in responses]


def in_child(kind: str, folder: Path, method: str, count: int, when: str, resume: bool) -> int:
    """Train in a forked process; its exit status (the negative number of the signal that killed it)."""
    pid = os.fork()
    if pid == 0:
        try:
            # The trainers' logs would mix with the results.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            train(kind, folder, method, count, when, resume)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main(kind: str, root: Path) -> None:
    torch.set_num_threads(1)
    disable_progress_bars()
    whole: dict[bool, Any] = {}
    for (phase, method), when, count in itertools.product(PHASES[kind].items(), ("entering", "leaving"), COUNTS[kind]):
        folder = root / f"{phase}-{when}-{count}"
        status = in_child(kind, folder, method, count, when, False)
        if status != 0:
            # What an uninterrupted run of the same settings comes to.
            chosen = phase == "choose"
            if chosen not in whole:
                reference = root / f"whole-{chosen}"
                assert in_child(kind, reference, method, 0, "", False) == 0
                whole[chosen] = outcome(reference)
            resumed = in_child(kind, folder, method, 0, "", True)
            kill = {"phase": phase, "when": when, "count": count, "killed": -status, "resumed": resumed}
            print(json.dumps(kill | {"same": resumed == 0 and outcome(folder) == whole[chosen]}), flush=True)
        shutil.rmtree(folder)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
