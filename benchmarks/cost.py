"""Counted cost of selection: FLOPs of a whole two-epoch run, everything included, against TRL's `SFTTrainer`.

python -m benchmarks.cost [--rows 576] [--settings balanced ...]

FLOPs are counted by `torch.utils.flop_counter` while the trainers run (reading, pilot, scoring, validation rows,
trackers and the recomputation of gradient checkpointing are all in), on a small Llama of ten layers whose LM head has
the share that it has in SmolLM2-135M. It prints ratios; docs/results.md has those that the planner computes, whose
formulas `tests/planning` holds to such counts.
"""

import argparse
import random
import tempfile

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback
from trl import SFTConfig, SFTTrainer

from trl_bilevel import BilevelSFTConfig, BilevelSFTTrainer

VOCABULARY, BATCH, VALIDATION = 1360, 8, 32

# What each line of the table sets; `None` is TRL's own trainer.
SETTINGS: dict[str, dict | None] = {
    "SFTTrainer": None,
    "reliable": {"selector_preset": "reliable"},
    "balanced": {},
    "fast": {"selector_preset": "fast"},
    "balanced, lambda = 0.5": {"validation_loss_weight": 0.5},
    "value_function, online": {"selector_preset": "sparse_centred"},
}


def make_rows(count: int, seed: int, tokens: int = 50) -> Dataset:
    """Tokenised rows of one length, half of it prompt."""
    rng = random.Random(seed)
    rows = [[rng.randrange(3, VOCABULARY) for _ in range(tokens)] for _ in range(count)]
    half = tokens // 2
    return Dataset.from_list([{"input_ids": ids, "labels": [-100] * half + ids[half:]} for ids in rows])


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=128,
        num_hidden_layers=10,
        num_attention_heads=3,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config)


def count(setting: dict | None, rows: int, tokenizer: object) -> int:
    """FLOPs of one run."""
    arguments = {
        "output_dir": tempfile.mkdtemp(),
        "num_train_epochs": 2,
        "per_device_train_batch_size": BATCH,
        "gradient_checkpointing": True,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "logging_steps": 10**6,
        "dataset_kwargs": {"skip_prepare_dataset": True},
    }
    parts = {
        "train_dataset": make_rows(rows, 0),
        "processing_class": tokenizer,
        "peft_config": LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
    }
    if setting is None:
        trainer = SFTTrainer(make_model(), SFTConfig(**arguments), **parts)
    else:
        args = BilevelSFTConfig(**(arguments | setting))
        trainer = BilevelSFTTrainer(make_model(), args, validation_dataset=make_rows(VALIDATION, 1), **parts)
    trainer.remove_callback(PrinterCallback)
    with FlopCounterMode(display=False) as counter:
        trainer.train()
    return counter.get_total_flops()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", type=int, default=[576])
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS))
    options = parser.parse_args()
    disable_progress_bars()
    from tests.conftest import make_tokenizer

    tokenizer = make_tokenizer()
    for rows in options.rows:
        plain = count(None, rows, tokenizer)
        for name in (name for name in options.settings if SETTINGS[name] is not None):
            print(f"{rows} rows, {name:32} {count(SETTINGS[name], rows, tokenizer) / plain:.3f}", flush=True)


if __name__ == "__main__":
    main()
