"""Trains, kills itself in a given phase, resumes; one process tree, so that torch is imported once.

Usage: python -m tests.faults.kill_worker FOLDER; prints one JSON line per kill.
"""

import itertools
import json
import os
import shutil
import signal
import sys
import traceback
from pathlib import Path

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig

from tests.conftest import base_arguments, make_tiny_model, make_tokenizer
from trl_bilevel import SelfRefineConfig, SelfRefineTrainer
from trl_bilevel.demo.assets import docstrings

# Where a run is killed; each of these methods is entered several times in a run.
PHASES = {
    "generate": "_generate",
    "score": "_score_responses",
    "train": "training_step",
    "round_begin": "begin_round",
    "round_end": "end_round",
    "evaluate": "_losses",
    "save": "_save_checkpoint",
    "save_model": "save_model",
    "save_optimizer": "_save_optimizer_and_scheduler",
    "save_random_state": "_save_rng_state",
}
NEVER = ("", 0, "")


def doomed(phase: str, count: int, when: str) -> type[SelfRefineTrainer]:
    """The trainer, killed when it enters or leaves the phase's method for the `count`-th time; never for 0."""

    class Doomed(SelfRefineTrainer):
        entered = 0

    def method(self, *args, **kwargs):
        self.entered += 1
        number = self.entered
        if number == count and when == "entering":
            os.kill(os.getpid(), signal.SIGKILL)
        out = getattr(SelfRefineTrainer, PHASES[phase])(self, *args, **kwargs)
        if number == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return out

    if count:
        setattr(Doomed, PHASES[phase], method)
    return Doomed


def train(folder: Path, phase: str, count: int, when: str, resume: bool) -> None:
    rows = [
        {"prompt": f"What does `{row['name']}` do?\n", "completion": row["description"]} for row in docstrings()[:80]
    ]
    settings = base_arguments(folder) | {
        "max_steps": -1,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_rounds": 2,
        "steps_per_round": 2,
        "max_completion_length": 8,
        "pilot_steps": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": 2,
    }
    tokenizer = make_tokenizer()
    trainer = doomed(phase, count, when)(
        make_tiny_model(tokenizer),
        SelfRefineConfig(**settings),
        Dataset.from_list(rows[:40]),
        Dataset.from_list(rows[40:]),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )
    try:
        trainer.train(resume_from_checkpoint=resume)
    except ValueError as error:
        if "no complete checkpoint" not in str(error):
            raise
        trainer.train()
    trainer.save_model(str(folder / "final"))


def outcome(folder: Path) -> tuple[bytes, list[dict], list[str]]:
    """The final adapter, the ledger without wall times, and the responses' files."""
    ledger = [json.loads(line) for line in (folder / "out" / "ledger.jsonl").read_text().splitlines()]
    entries = [{k: v for k, v in entry.items() if k != "seconds"} for entry in ledger]
    responses = [Dataset.from_parquet(str(p)).to_dict() for p in sorted((folder / "out" / "responses").glob("*"))]
    return (folder / "final" / "adapter_model.safetensors").read_bytes(), entries, [json.dumps(r) for r in responses]


def in_child(folder: Path, phase: str, count: int, when: str, resume: bool) -> int:
    """Train in a forked process; its exit status (the negative number of the signal that killed it)."""
    pid = os.fork()
    if pid == 0:
        try:
            # The trainers' logs would mix with the results.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            train(folder, phase, count, when, resume)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main(root: Path) -> None:
    torch.set_num_threads(1)
    disable_progress_bars()
    assert in_child(root / "whole", *NEVER, False) == 0
    whole = outcome(root / "whole")
    for phase, when, count in itertools.product(PHASES, ("entering", "leaving"), (1, 2, 3)):
        folder = root / f"{phase}-{when}-{count}"
        status = in_child(folder, phase, count, when, False)
        if status != 0:
            resumed = in_child(folder, *NEVER, True)
            kill = {"phase": phase, "when": when, "count": count, "killed": -status, "resumed": resumed}
            print(json.dumps(kill | {"same": resumed == 0 and outcome(folder) == whole}), flush=True)
        shutil.rmtree(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
