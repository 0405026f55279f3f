"""A stream that nobody can count: the pilot runs on its first rows, and weights are predicted as rows come by."""

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

# Again a stream. NaN: not seen in training.
weighted = list(trainer.weighted_dataset())
seen = [row for row in weighted if row["data_weight"] == row["data_weight"]]
print(f"{len(seen)} of {len(weighted)} rows were seen; the first weighs {seen[0]['data_weight']:.2f}")
