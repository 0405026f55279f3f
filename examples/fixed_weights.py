"""Weights that you have already: a weighted loss from the column `data_weight`, without any selection.

Weighted losses need trl 1.16 or newer; drawing rows by their weights does not.
"""

from peft import LoraConfig
from setting import MODEL, SMALL, mixed

from trl_bilevel import BilevelSFTConfig, BilevelSFTTrainer

# Any numbers of at least 0; they are scaled to mean one. Here: what a reviewer said about each row.
mixed = mixed.add_column("data_weight", [1.0 if kind == "good" else 0.1 for kind in mixed["kind"]])

trainer = BilevelSFTTrainer(
    MODEL,
    # `selector_weighting="resample"` visits rows in proportion to their weights; the default multiplies losses.
    BilevelSFTConfig(output_dir="out/fixed_weights", weight_estimator="none", max_steps=8, **SMALL),
    train_dataset=mixed,  # no validation rows: nothing is learned about the weights
    peft_config=LoraConfig(target_modules="all-linear"),
)
trainer.train()

weights = trainer.sample_weights()
print(f"mean {weights.mean():.2f}, least {weights.min():.2f}, largest {weights.max():.2f}")
