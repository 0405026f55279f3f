"""A stream, whose rows nobody can count: weights are chosen on its first rows; all others are weighed as they come."""

from peft import LoraConfig
from setting import MODEL, SMALL, mixed, trusted

from trl_bilevel import BilevelSFTConfig, BilevelSFTTrainer

# Yours: `load_dataset(NAME, split="train", streaming=True)`. The first rows must be a fair sample, so shuffle.
stream = mixed.to_iterable_dataset().shuffle(seed=0, buffer_size=1000)

trainer = BilevelSFTTrainer(
    MODEL,
    BilevelSFTConfig(
        output_dir="out/streaming",
        max_steps=12,  # must be given: a stream has no epochs
        stream_sample_rows=64,  # 2,048 by default
        **SMALL,
    ),
    train_dataset=stream,
    validation_dataset=trusted,
    peft_config=LoraConfig(target_modules="all-linear"),
)
trainer.train()

# Again a stream: weights are computed as it is read.
weighted = list(trainer.weighted_dataset())
print(f"{len(weighted)} rows; the first weighs {weighted[0]['data_weight']:.2f}")
