"""What the examples share: a model, and rows that stand for yours.

`TRL_BILEVEL_MODEL` names another model: a hub name or a folder. The rows are questions about Python's standard
library, answered by its docstrings; half of the training answers are damaged, and the column `kind` says how. No
trainer reads it.
"""

import os

import torch
from datasets import Dataset

from trl_bilevel.data.assets import docstrings
from trl_bilevel.data.contamination import contaminate

MODEL = os.environ.get("TRL_BILEVEL_MODEL", "HuggingFaceTB/SmolLM2-135M-Instruct")
# Small enough for a CPU. Without a GPU, TRL needs `use_cpu`.
SMALL = {
    "per_device_train_batch_size": 8,
    "logging_steps": 4,
    "save_strategy": "no",
    "use_cpu": not torch.cuda.is_available(),
}


def chat(question: str, answer: str) -> dict:
    """A row in TRL's conversational prompt-completion format."""
    return {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": answer}],
    }


def clean_rows(start: int, stop: int) -> Dataset:
    rows = docstrings()[start:stop]
    return Dataset.from_list([chat(f"What does Python's `{row['name']}` do?", row["description"]) for row in rows])


trusted = clean_rows(0, 28)
held_out = clean_rows(28, 56)
mixed = contaminate(clean_rows(64, 128), rate=0.5, kinds=["lazy", "swapped", "salad"])
