"""The best rows as a file for other tools, and a plain `SFTTrainer` trained on them.

The same on the command line: `trl-bilevel export out/export --top-k 20 --output best.jsonl`.
"""

from datasets import Dataset
from peft import LoraConfig
from setting import MODEL, SMALL, mixed, trusted
from trl import SFTConfig, SFTTrainer

from trl_bilevel import BilevelSFTConfig, BilevelSFTTrainer

lora = LoraConfig(target_modules="all-linear")
selecting = BilevelSFTTrainer(
    MODEL,
    BilevelSFTConfig(output_dir="out/export", max_steps=12, **SMALL),
    train_dataset=mixed,
    validation_dataset=trusted,
    peft_config=lora,
)
selecting.train()
selecting.weighted_dataset().to_parquet("out/export/weighted.parquet")  # all rows
selecting.weighted_dataset(top_k=20).to_json("out/export/best.jsonl")  # sample_id, data_weight, data_rank go along

best = Dataset.from_json("out/export/best.jsonl").select_columns(["prompt", "completion"])
plain = SFTTrainer(
    MODEL, SFTConfig(output_dir="out/export/plain", max_steps=4, **SMALL), train_dataset=best, peft_config=lora
)
plain.train()
print(f"trained on {len(best)} of {len(mixed)} rows")
