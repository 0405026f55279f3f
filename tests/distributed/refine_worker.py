"""A self-refining run of a tiny model in each process of a `torchrun`; the first process writes what came of it."""

import json
import os
import sys
from pathlib import Path

import pandas as pd
import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig

from tests.conftest import LAZY, base_arguments, make_tiny_model, make_tokenizer, parameters
from trl_bilevel import SelfRefineConfig, SelfRefineTrainer
from trl_bilevel.data.assets import docstrings


def duplicates(folder: str) -> int:
    """Responses that a question got twice: processes that draw the same random numbers would give them."""
    files = sorted(Path(folder).glob("out/_rows/responses/*.parquet"))
    return sum(int(pd.read_parquet(file).duplicated(["prompt", "response"]).sum()) for file in files)


class GivenResponses(SelfRefineTrainer):
    """Responses by their place in the round: the same for any number of processes."""

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        first = self.accelerator.process_index * len(prompt_ids)
        out = []
        for place in range(first, first + len(prompt_ids)):
            generator = torch.Generator().manual_seed(1000 * len(self.ledger) + place)
            length = int(torch.randint(2, 8, (), generator=generator))
            out.append(torch.randint(5, 200, (length,), generator=generator).tolist())
        return out, None


def main(folder: str, overrides: str) -> None:
    torch.set_num_threads(1)
    disable_progress_bars()
    rows = [{"prompt": f"What is {r['name']}?\n", "completion": r["description"]} for r in docstrings()[:80]]
    # Every second answer of the training rows is boilerplate, so that there is something to choose by.
    given = [row | {"completion": LAZY} if n % 2 else row for n, row in enumerate(rows[:40])]
    settings = base_arguments(Path(folder)) | {
        "max_steps": -1,
        "per_device_train_batch_size": 2,
        "num_rounds": 3,
        "steps_per_round": 2,
        "max_completion_length": 8,
        "pilot_learning_rate": 1e-2,
        "ddp_find_unused_parameters": False,
    }
    settings |= json.loads(overrides)
    trainer_class = GivenResponses if settings.pop("given_responses", False) else SelfRefineTrainer
    # The batch of a step is that of two processes.
    settings["per_device_train_batch_size"] *= 2 // int(os.environ.get("WORLD_SIZE", "1"))
    tokenizer = make_tokenizer()
    trainer = trainer_class(
        make_tiny_model(tokenizer),
        SelfRefineConfig(**settings),
        Dataset.from_list(given),
        Dataset.from_list(rows[40:]),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )
    trainer.train()
    flat = torch.cat([p.flatten() for p in parameters(trainer)])
    everywhere = trainer.accelerator.gather(flat.unsqueeze(0))
    if trainer.is_world_process_zero():
        result = {
            "processes": len(everywhere),
            "apart": float((everywhere[0] - everywhere[-1]).abs().max()),
            "parameters": flat[::7].tolist(),
            "ledger": trainer.ledger,
            "duplicates": duplicates(folder),
        }
        (Path(folder) / "result.json").write_text(json.dumps(result))
    # A process that leaves with its connections open may abort in their threads' destructors.
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
