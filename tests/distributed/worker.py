"""Trains tiny models in each process of a `torchrun`, or alone; the first process writes what came of them.

    worker FOLDER '{NAME: SETTINGS, ...}'

One after the other, since a process takes longer to start than to train one of these.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from transformers import TrainerCallback

from tests.conftest import LAZY, base_arguments, losses, make_tiny_model, make_tokenizer
from tests.exact_head import use_exact_head
from trl_bilevel import BilevelSFTConfig, BilevelSFTTrainer, learn_weights
from trl_bilevel.data.assets import docstrings
from trl_bilevel.trainer.weighted_loss import WeightedObjective


class Accident(TrainerCallback):
    """What befalls a process after the fifth step: it is killed, or its weights change."""

    def __init__(self, trainer: BilevelSFTTrainer, kind: str):
        self.trainer = trainer
        self.kind = kind

    def on_step_end(self, args: object, state: Any, control: object, **kwargs: object) -> None:
        if state.global_step == 5 and self.kind == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        elif state.global_step == 5:
            self.trainer.weights.give(torch.rand(len(self.trainer.weights.kept)))


def count_exchanged_bytes(found: list[int]) -> None:
    """Have the bytes that the steps of this process exchange for the weights noted in `found`, from now on."""
    gather = WeightedObjective._gather_rows

    def counted(objective: WeightedObjective, values: list[torch.Tensor]) -> list[torch.Tensor]:
        found.append(sum(value.numel() * value.element_size() for value in values))
        return gather(objective, values)

    WeightedObjective._gather_rows = counted  # type: ignore[method-assign]


def main(folder: str, runs: str) -> None:
    torch.set_num_threads(1)
    disable_progress_bars()
    use_exact_head()
    exchanged: list[int] = []
    count_exchanged_bytes(exchanged)
    for name, overrides in json.loads(runs).items():
        exchanged.clear()
        accelerator = train(str(Path(folder) / name), overrides, exchanged)
    # A process that leaves with its connections open may abort in their threads' destructors.
    accelerator.wait_for_everyone()
    accelerator.end_training()


def train(folder: str, overrides: dict[str, Any], exchanged: list[int]) -> Any:
    """Train with some settings; returns the accelerator."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    rows = [{"prompt": f"What is {r['name']}?\n", "completion": r["description"]} for r in docstrings()[:64]]
    # Every second answer of the training rows is boilerplate, so that there is something to choose by.
    given = [row | {"completion": LAZY} if n % 2 else row for n, row in enumerate(rows[:44])]
    settings = base_arguments(Path(folder)) | {
        "per_device_train_batch_size": 8 // world,
        "max_steps": 8,
        "learning_rate": 1e-2,
        "ddp_find_unused_parameters": False,
    }
    settings |= overrides
    accident, resume = settings.pop("accident", None), settings.pop("resume", False)
    count = settings.pop("rows", 40)
    mixed: Any = Dataset.from_list(given[:count])
    if settings.pop("stream", False):
        mixed = mixed.to_iterable_dataset()
    tokenizer = make_tokenizer()
    trainer = BilevelSFTTrainer(
        make_tiny_model(tokenizer).double(),
        BilevelSFTConfig(**settings),
        train_dataset=mixed,
        validation_dataset=Dataset.from_list(rows[44:]),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )
    assert trainer.accelerator.num_processes == world
    alone = None
    if (
        settings.get("packing") is None
        and trainer.mode.learns
        and not trainer.args.published
        and not trainer.data.streams
    ):
        # As a script of a user's that the processes run, without a trainer.
        alone = learn_weights(
            make_tiny_model(tokenizer).double(),
            mixed,
            Dataset.from_list(rows[44:]),
            processing_class=tokenizer,
            bf16=False,
            max_length=settings["max_length"],
            disable_tqdm=True,
            **{
                k: settings[k]
                for k in ("pilot_steps", "pilot_learning_rate", "selector_preset", "weight_estimator")
                if k in settings
            },
        ).values.tolist()
    if accident is not None and trainer.accelerator.process_index == 1:
        trainer.add_callback(Accident(trainer, accident))
    trainer.train(resume_from_checkpoint=resume)
    if trainer.is_world_process_zero():
        gradients = sum(p.numel() * p.element_size() for p in trainer.model.parameters() if p.requires_grad)
        result = {
            "losses": losses(trainer),
            "weights": [row["data_weight"] for row in trainer.weighted_dataset()],
            "learned": alone,
            "selector_share_of_traffic": sum(exchanged) / (gradients * trainer.state.global_step),
        }
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "result.json").write_text(json.dumps(result))
    return trainer.accelerator


if __name__ == "__main__":
    main(*sys.argv[1:])
