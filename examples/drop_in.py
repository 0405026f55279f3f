"""Replace `SFTTrainer`: the same arguments, and `validation_dataset`, a few dozen rows that you trust."""

from peft import LoraConfig
from setting import MODEL, SMALL, held_out, mixed, trusted

from trl_bilevel import BilevelSFTConfig, BilevelSFTTrainer

trainer = BilevelSFTTrainer(
    model=MODEL,
    args=BilevelSFTConfig(output_dir="out/drop_in", max_steps=12, eval_strategy="epoch", **SMALL),
    train_dataset=mixed,
    validation_dataset=trusted,  # says what good means
    eval_dataset=held_out,  # only reports
    peft_config=LoraConfig(target_modules="all-linear"),
)
trainer.train()
trainer.save_model()

weights = trainer.sample_weights()  # float32 [len(mixed)], mean 1, in the order of `mixed`
for row in weights.argsort(descending=True)[[0, 1, -2, -1]].tolist():
    print(f"{weights[row]:5.2f}  {mixed[row]['completion'][0]['content'][:80]}")
# Text of rows belongs in a folder with an underscore: it is never uploaded with the model.
trainer.weighted_dataset().to_parquet("out/drop_in/_rows/weighted.parquet")
