"""One weight per source: how much of each data set should go into the mixture?"""

from peft import LoraConfig
from setting import MODEL, SMALL, mixed, trusted

from trl_bilevel import BilevelSFTConfig, BilevelSFTTrainer

# Three made-up sources; a row's `source` is all that tells the selector about it.
sources = {"good": "manual", "lazy": "forum", "swapped": "scrape", "salad": "scrape"}
mixed = mixed.add_column("source", [sources[kind] for kind in mixed["kind"]])

trainer = BilevelSFTTrainer(
    MODEL,
    BilevelSFTConfig(
        output_dir="out/per_source",
        selector_group_column="source",
        max_steps=12,
        **SMALL,
    ),
    train_dataset=mixed,
    validation_dataset=trusted,
    peft_config=LoraConfig(target_modules="all-linear"),
)
trainer.train()

weight_of = dict(zip(mixed["source"], trainer.sample_weights().tolist(), strict=True))
for source, weight in sorted(weight_of.items(), key=lambda item: -item[1]):
    print(f"{source:8} {weight:.2f}")
