"""A small Llama pretrained for a minute on clean docstrings: seconds per experiment, and it knows enough to select.

A model with random values shows mechanics only: it cannot tell a right answer from a wrong one.
"""

import functools
import math
import tempfile

import torch
from transformers import get_cosine_schedule_with_warmup

from tests.conftest import make_tiny_model, make_tokenizer
from trl_bilevel.demo.assets import docstrings
from trl_bilevel.demo.tasks import END, PROMPT

EPOCHS, BATCH, LEARNING_RATE = 8, 16, 3e-3


@functools.cache
def pretrained_tiny_model() -> str:
    """Folder of a model of four layers of width 128 and its tokenizer, trained on every third docstring."""
    tokenizer = make_tokenizer()
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = make_tiny_model(tokenizer, **sizes, num_key_value_heads=2)
    rows = [PROMPT.format(name=row["name"]) + row["description"] + END for row in docstrings()[::3]]
    generator = torch.Generator().manual_seed(0)
    steps = EPOCHS * math.ceil(len(rows) / BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    for _ in range(EPOCHS):
        for part in torch.randperm(len(rows), generator=generator).split(BATCH):
            batch = tokenizer([rows[i] for i in part.tolist()], return_tensors="pt", padding=True)
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
            model(**batch, labels=labels).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    folder = tempfile.mkdtemp()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
