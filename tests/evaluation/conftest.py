"""Small models in folders, as the command takes them."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForSequenceClassification

from tests.conftest import make_tiny_model, make_tokenizer
from trl_bilevel.data.assets import docstrings
from trl_bilevel.evaluation import models
from trl_bilevel.evaluation.models import Settings


def shaken(model, seed, scale=0.05):
    """The model with other parameters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """`model`, `baseline` (full models), `adapter` (LoRA on `model`), `reward`, and files of rows and requests."""
    out = tmp_path_factory.mktemp("evaluation")
    tokenizer = make_tokenizer()
    for name, model in {
        "model": make_tiny_model(tokenizer),
        "baseline": shaken(make_tiny_model(tokenizer), 1),
        "reward": LlamaForSequenceClassification(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=1,
                num_labels=1,
                pad_token_id=tokenizer.pad_token_id,
            )
        ),
    }.items():
        model.save_pretrained(out / name)
        tokenizer.save_pretrained(out / name)
    adapter = get_peft_model(
        make_tiny_model(tokenizer), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", r=4)
    )
    adapter.peft_config["default"].base_model_name_or_path = str(out / "model")
    shaken(adapter, 2).save_pretrained(out / "adapter")
    rows = [
        {
            "prompt": [{"role": "user", "content": f"What does `{row['name']}` do?"}],
            "completion": [{"role": "assistant", "content": row["description"]}],
        }
        for row in docstrings()[:24]
    ]
    (out / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (out / "harmful.txt").write_text("".join(f"Stand-in for a harmful request, number {n}\n" for n in range(9)))
    (out / "benign.jsonl").write_text(
        "".join(
            json.dumps({"prompt": f"Question {n}", "label": "unsafe" if n % 3 else "safe"}) + "\n" for n in range(12)
        )
    )
    return out


@pytest.fixture(autouse=True)
def little_memory(monkeypatch):
    """The models are small, and collecting garbage in a process that has loaded everything takes seconds."""
    monkeypatch.setattr(models, "free", lambda: None)


@pytest.fixture
def settings():
    return Settings(batch_size=5, max_length=128, max_new_tokens=6)
