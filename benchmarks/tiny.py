"""A small Llama pretrained for a minute on clean docstrings: seconds per experiment, and it knows enough to select.

A model with random values shows mechanics only: it cannot tell a right answer from a wrong one.
"""

import functools
import tempfile

import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from tests.conftest import make_tiny_model, make_tokenizer
from trl_bilevel.data.assets import docstrings
from trl_bilevel.demo.tasks import END, PROMPT


@functools.cache
def pretrained_tiny_model() -> str:
    """Folder of a model of four layers of width 128 and its tokenizer, trained on every third docstring."""
    tokenizer = make_tokenizer()
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
    rows = [PROMPT.format(name=row["name"]) + row["description"] + END for row in docstrings()[::3]]
    args = SFTConfig(
        output_dir=tempfile.mkdtemp(),
        num_train_epochs=8,
        per_device_train_batch_size=16,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=12,
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        logging_steps=10**6,
    )
    trainer = SFTTrainer(
        make_tiny_model(tokenizer, **sizes, num_key_value_heads=2),
        args,
        train_dataset=Dataset.from_dict({"text": rows}),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()
    return args.output_dir
