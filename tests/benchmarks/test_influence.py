"""The filter by dattri's attribution: which rows it keeps."""

import pytest
import torch
from datasets import Dataset

from benchmarks.influence import influential_rows
from trl_bilevel.demo.experiment import Budget
from trl_bilevel.demo.tasks import Task

pytest.importorskip("dattri")


@pytest.fixture
def settings(tiny_model, tokenizer, tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    budget = Budget(batch_size=4, learning_rate=1e-2, overrides={"model_init_kwargs": {"dtype": torch.float32}})
    return {"seed": 0, "budget": budget, "model": str(tmp_path / "model")}


@pytest.fixture
def task(rows):
    """Every second answer is a row of punctuation."""
    train = [
        row | {"kind": "good"} if i % 2 == 0 else row | {"completion": "?! " * (5 + i % 7), "kind": "noise"}
        for i, row in enumerate(rows[:40])
    ]
    return Task("noise", Dataset.from_list(train), Dataset.from_list(rows[40:56]), Dataset.from_list(rows[56:66]), [])


def test_keeps_the_rows_that_resemble_the_validation_rows(settings, task):
    kept, influence = influential_rows(task, **settings, count=15)
    assert len(set(kept)) == 15 and all(task.good[row] for row in kept)
    assert len(influence) == 40 and min(influence[row] for row in kept) == sorted(influence)[-15]
