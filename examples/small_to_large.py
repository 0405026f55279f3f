"""Learn the weights with a small model, and train a larger one with them.

Weights belong to rows, not to tokens, so the models may have different tokenizers. `TRL_BILEVEL_LARGE_MODEL` names the
second model. The authors of SEAL (arXiv 2410.07471) report that their selector transfers so; for these weights it
was not measured: compare with `trl-bilevel evaluate`.
"""

import os

from peft import LoraConfig
from setting import MODEL, SMALL, mixed, trusted

from trl_bilevel import BilevelSFTConfig, BilevelSFTTrainer

LARGE = os.environ.get("TRL_BILEVEL_LARGE_MODEL", "HuggingFaceTB/SmolLM2-360M-Instruct")
lora = LoraConfig(target_modules="all-linear")

small = BilevelSFTTrainer(
    MODEL,
    BilevelSFTConfig(output_dir="out/small", max_steps=12, **SMALL),
    train_dataset=mixed,
    validation_dataset=trusted,
    peft_config=lora,
)
small.train()

large = BilevelSFTTrainer(
    LARGE,
    # Rows are drawn in proportion to the column `data_weight`; no pilot run, no validation rows.
    BilevelSFTConfig(
        output_dir="out/large", weight_estimator="none", selector_weighting="resample", max_steps=8, **SMALL
    ),
    train_dataset=small.weighted_dataset(),
    peft_config=lora,
)
large.train()
print(f"{LARGE} trained with weights of {MODEL}")
