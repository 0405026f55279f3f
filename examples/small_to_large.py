"""Learn the weights with a small model, and train a larger one with them.

Weights belong to rows, not to tokens, so the models may have different tokenizers. `TRL_BILEVEL_LARGE_MODEL` names the
second model. The small model must itself know what is good (docs/cost.md has measurements): compare with
`trl-bilevel evaluate`.
"""

import os

from peft import LoraConfig
from setting import MODEL, SMALL, mixed, trusted

from trl_bilevel import BilevelSFTConfig, BilevelSFTTrainer, learn_weights

LARGE = os.environ.get("TRL_BILEVEL_LARGE_MODEL", "HuggingFaceTB/SmolLM2-360M-Instruct")

weights = learn_weights(MODEL, mixed, trusted)
large = BilevelSFTTrainer(
    LARGE,
    # Rows are drawn in proportion to the column `data_weight`; nothing is learned, no trusted rows.
    BilevelSFTConfig(
        output_dir="out/large", weight_estimator="none", selector_weighting="resample", max_steps=8, **SMALL
    ),
    train_dataset=weights.to_dataset(),
    peft_config=LoraConfig(target_modules="all-linear"),
)
large.train()
print(f"{LARGE} trained with weights of {MODEL}")
