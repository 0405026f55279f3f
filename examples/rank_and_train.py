"""Rank rows, and train any trainer on the result: here TRL's plain `SFTTrainer`."""

from peft import LoraConfig
from setting import MODEL, SMALL, mixed, trusted
from trl import SFTConfig, SFTTrainer

from trl_bilevel import learn_weights

weights = learn_weights(MODEL, mixed, trusted)
weights.to_dataset().to_parquet("ranked.parquet")  # the rows with data_weight and data_rank
drawn = weights.resample()  # the rows as often as their weights say
args = SFTConfig(output_dir="out/rank_and_train", max_steps=8, **SMALL)
trainer = SFTTrainer(MODEL, args, train_dataset=drawn, peft_config=LoraConfig(target_modules="all-linear"))
trainer.train()
print(f"{len(set(drawn['sample_id']))} of {len(mixed)} rows were drawn, {len(drawn)} times in all")
