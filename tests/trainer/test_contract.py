"""What we rely on in TRL, transformers and PEFT. A failure here says which release changed it."""

import inspect

import pytest
import torch
import transformers
import trl
from datasets import Dataset
from packaging.version import Version
from transformers import Trainer
from trl import SFTTrainer, pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from trl_bilevel.data.batches import concatenate_batches
from trl_bilevel.data.identity import SAMPLE_ID, SEGMENTS, SampleIdCollator


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


def test_padding_free_batches_hold_what_we_join():
    """Two batches that are joined are the batch of all their rows."""
    rows = [{"input_ids": list(range(5, 5 + n)), "labels": [-100, *range(6, 5 + n)]} for n in (3, 1, 4, 2)]
    collator = SampleIdCollator(DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True), merges=True)
    rows = [row | {SAMPLE_ID: number} for number, row in enumerate(rows)]
    whole = collator(rows)
    known = {"input_ids", "labels", "position_ids", "seq_idx", SAMPLE_ID, SEGMENTS}
    known |= {f"{name}_{side}" for name in ("cu_seq_lens", "max_length") for side in "qk"}
    assert set(whole) == known, "TRL's collator gives other inputs: see data.batches.concatenate_batches"
    joined = concatenate_batches(collator(rows[:2]), collator(rows[2:]), 0)
    for name, value in whole.items():
        assert torch.equal(torch.as_tensor(joined[name]), torch.as_tensor(value)), name


def test_the_packer_carries_our_numbers():
    rows = Dataset.from_dict({"input_ids": [[1, 2], [3]], "labels": [[1, 2], [3]], SAMPLE_ID: [[7, 7], [8]]})
    packed = pack_dataset(rows, 4, "bfd")
    assert packed[0] == {
        "input_ids": [1, 2, 3],
        "labels": [1, 2, 3],
        SAMPLE_ID: [7, 7, 8],
        "seq_lengths": [2, 1],
    }, "TRL's packer drops or reorders columns: see data.packing"


def test_compute_loss_only_calls_the_model_and_sums_log_probs():
    """TRL is handed a model with scaled log-probabilities; it must use them for the loss only."""
    body = inspect.getsource(SFTTrainer.compute_loss)
    assert "outputs = model(**inputs, fused_lm_head=True)" in body, "TRL calls the model in another way"
    assert "per_token_loss = -outputs.log_probs" in body, "TRL builds the loss in another way"
    for used in ("outputs.label_mask", "outputs.entropy", "outputs.is_top1"):
        assert used in body
