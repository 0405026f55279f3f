"""What we rely on in TRL, transformers and PEFT. A failure here says which release changed it."""

import inspect

import pytest
import torch
import transformers
import trl
from packaging.version import Version
from transformers import Trainer
from trl import SFTTrainer


def test_trl_version_is_supported():
    assert Version("1.16") <= Version(trl.__version__) < Version("1.17"), (
        f"TRL {trl.__version__} is outside the tested range >=1.16,<1.17: run the suite, then widen pyproject.toml."
    )


@pytest.mark.parametrize(
    ("owner", "method", "arguments"),
    [
        (SFTTrainer, "compute_loss", ["model", "inputs", "return_outputs", "num_items_in_batch"]),
        (SFTTrainer, "_set_signature_columns_if_needed", []),
        (
            SFTTrainer,
            "_prepare_dataset",
            ["dataset", "processing_class", "args", "packing", "formatting_func", "dataset_name"],
        ),
        (SFTTrainer, "training_step", ["args", "kwargs"]),
        (SFTTrainer, "log", ["logs", "start_time"]),
        (Trainer, "get_batch_samples", ["epoch_iterator", "num_batches", "device"]),
        (Trainer, "training_step", ["model", "inputs", "num_items_in_batch"]),
        (Trainer, "_get_train_sampler", ["train_dataset"]),
        (Trainer, "save_model", ["output_dir", "_internal_call"]),
        (Trainer, "_save_checkpoint", ["model", "trial"]),
        (Trainer, "_load_from_checkpoint", ["resume_from_checkpoint", "model"]),
    ],
)
def test_signature(owner, method, arguments):
    found = list(inspect.signature(getattr(owner, method)).parameters)[1:]
    assert found == arguments, (
        f"{owner.__name__}.{method} takes {found} in trl {trl.__version__} / transformers {transformers.__version__}; "
        f"trl_bilevel was written for {arguments}."
    )


def test_the_fused_head_gives_what_the_weights_multiply(tiny_model, config, train_rows, tokenizer):
    from trl_bilevel import BilevelSFTTrainer

    trainer = BilevelSFTTrainer(
        tiny_model(),
        config(weight_estimator="none", validation_loss_weight=0),
        train_dataset=train_rows,
        processing_class=tokenizer,
    )
    rows = [{k: trainer.train_dataset[i][k] for k in ("input_ids", "labels")} for i in range(3)]
    batch = trainer.data_collator(rows)
    outputs = trainer.model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        labels=batch["labels"],
        use_cache=False,
        fused_lm_head=True,
    )
    assert outputs.log_probs.shape == outputs.label_mask.shape == (3, batch["input_ids"].shape[1] - 1)
    assert torch.equal(outputs.label_mask.bool(), batch["labels"][:, 1:] != -100)
    assert (outputs.log_probs[~outputs.label_mask.bool()] == 0).all(), "log_probs are not zero where ignored"


def test_compute_loss_only_calls_the_model_and_sums_log_probs():
    """TRL is handed a model with scaled log-probabilities; it must use them for the loss only."""
    body = inspect.getsource(SFTTrainer.compute_loss)
    assert "outputs = model(**inputs, fused_lm_head=True)" in body, "TRL calls the model in another way"
    assert "per_token_loss = -outputs.log_probs" in body, "TRL builds the loss in another way"
    for used in ("outputs.label_mask", "outputs.entropy", "outputs.is_top1"):
        assert used in body
