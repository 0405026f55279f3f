"""Lazy, swapped and garbled answers: is selection worth it? Uniform mixing against learned weights, same steps."""

from peft import LoraConfig
from setting import MODEL, SMALL, held_out, mixed, trusted
from sklearn.metrics import roc_auc_score

from trl_bilevel import BilevelSFTConfig, BilevelSFTTrainer

losses = {}
for estimator in ("none", "probe"):
    args = BilevelSFTConfig(
        output_dir=f"out/quality/{estimator}",
        weight_estimator=estimator,
        max_steps=20,
        learning_rate=1e-3,
        **SMALL,
    )
    trainer = BilevelSFTTrainer(
        MODEL,
        args,
        train_dataset=mixed,
        validation_dataset=trusted,
        peft_config=LoraConfig(target_modules="all-linear"),
    )
    trainer.train()
    losses[estimator] = float(trainer.row_losses(held_out).mean())

print(f"held-out loss: uniform {losses['none']:.3f}, bilevel {losses['probe']:.3f} nats per token")
weights, kinds = trainer.sample_weights().tolist(), mixed["kind"]
aucs = {}
for kind in ("lazy", "swapped", "salad"):
    rows = [row for row, found in enumerate(kinds) if found in ("good", kind)]
    aucs[kind] = roc_auc_score([kinds[row] == "good" for row in rows], [weights[row] for row in rows])
    print(f"AUC of the weights, good against {kind}: {aucs[kind]:.2f} (0.5 is chance)")
