"""Several trusted sets that pull in different directions, each with its share of the say."""

from datasets import Dataset
from peft import LoraConfig
from setting import MODEL, SMALL, chat, mixed, trusted

from trl_bilevel import BilevelSFTConfig, BilevelSFTTrainer

topics = ("tables", "clouds", "rivers", "stones", "lamps", "doors", "roofs", "seeds", "bells", "boats")
polite = Dataset.from_list([chat(f"Tell me about {topic}.", f"Gladly! What about {topic}?") for topic in topics])

trainer = BilevelSFTTrainer(
    MODEL,
    BilevelSFTConfig(
        output_dir="out/several_objectives",
        validation_weights={"facts": 3, "manners": 1},  # scaled to sum one; equal if left out
        max_steps=12,
        **SMALL,
    ),
    train_dataset=mixed,
    validation_dataset={"facts": trusted, "manners": polite},
    peft_config=LoraConfig(target_modules="all-linear"),
)
trainer.train()

losses = trainer.validation_loss()
print(", ".join(f"{name} {loss:.3f}" for name, loss in losses.items()), "nats per token")
