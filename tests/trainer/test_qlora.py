"""A 4-bit base on the CPU: learns, saves, resumes exactly, and evaluation does not spoil the gradients."""

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.conftest import losses, parameters
from trl_bilevel import BilevelSFTTrainer

pytest.importorskip("bitsandbytes")


@pytest.fixture
def folder(tiny_model, tokenizer, tmp_path):
    tiny_model(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def build(folder, config, train_rows, validation_rows, tokenizer):
    def make(**overrides):
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        return BilevelSFTTrainer(
            folder,
            config(max_steps=8, **overrides),
            train_dataset=train_rows,
            validation_dataset=validation_rows,
            eval_dataset=validation_rows,
            processing_class=tokenizer,
            quantization_config=quantization,
            peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"]),
        )

    return make


def gradients(trainer):
    rows = [{k: trainer.train_dataset[i][k] for k in ("input_ids", "labels")} for i in range(4)]
    batch = trainer._prepare_inputs(trainer.data_collator(rows))
    trainer.model.train()
    trainer.model.zero_grad()
    outputs = trainer.model(**batch, use_cache=False, fused_lm_head=True)
    (-outputs.log_probs.sum()).backward()
    return [p.grad.clone() for p in trainer.model.parameters() if p.requires_grad]


def test_the_base_is_4_bit(folder):
    config = BitsAndBytesConfig(load_in_4bit=True)
    assert AutoModelForCausalLM.from_pretrained(folder, quantization_config=config).is_loaded_in_4bit


def test_gradients_after_evaluation_are_those_before(build):
    trainer = build()
    trainer.train()
    before = gradients(trainer)
    assert max(float(g.abs().max()) for g in before) > 0
    trainer.evaluate()
    after = gradients(trainer)
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)


@pytest.mark.parametrize("preset", [pytest.param("balanced", marks=pytest.mark.compat), "sparse_centred"])
def test_learns_saves_and_resumes_exactly(build, preset, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 4, "selector_preset": preset}
    whole = build(output_dir=str(tmp_path / "a"), **settings)
    before = whole.validation_loss()["total"]
    whole.train()
    assert whole.validation_loss()["total"] < before - 0.05
    dtypes = {p.dtype for p in whole.model.parameters() if p.requires_grad}
    resumed = build(output_dir=str(tmp_path / "b"), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    assert {p.dtype for p in resumed.model.parameters() if p.requires_grad} == dtypes == {torch.bfloat16}
    assert losses(resumed) == losses(whole)
    assert torch.equal(resumed.sample_weights(), whole.sample_weights())
    assert all(torch.equal(a, b) for a, b in zip(parameters(resumed), parameters(whole), strict=True))
