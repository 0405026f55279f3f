"""Ask questions of least weight again: offline selection first, then rounds of the model's own responses."""

from peft import LoraConfig
from setting import MODEL, SMALL, held_out, mixed, trusted

from trl_bilevel import BilevelSFTConfig, BilevelSFTTrainer, SelfRefineConfig, SelfRefineTrainer

offline = BilevelSFTTrainer(
    MODEL,
    BilevelSFTConfig(output_dir="out/offline", max_steps=12, learning_rate=1e-3, **SMALL),
    train_dataset=mixed,
    validation_dataset=trusted,
    peft_config=LoraConfig(target_modules="all-linear"),
)
offline.train()

refiner = SelfRefineTrainer(
    offline.model,
    SelfRefineConfig(
        output_dir="out/refined",
        num_rounds=2,
        steps_per_round=2,
        num_generations=4,  # responses per question
        max_completion_length=24,
        learning_rate=1e-4,
        **SMALL,
    ),
    train_dataset=offline.weighted_dataset(),  # its weights are kept
    validation_dataset=trusted,  # 70% score the responses, 30% decide whether a round is kept
    eval_dataset=held_out,
    processing_class=offline.processing_class,
)
refiner.train()

for entry in refiner.ledger:
    decision = "kept" if entry["kept"] else "rolled back"
    print(f"round {entry['round']}: {entry['incoming_loss']:.3f} -> {entry['trained_loss']:.3f}, {decision}")
print("questions, responses and their scores: out/refined/_rows/responses/")
