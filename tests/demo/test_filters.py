"""Baselines that keep a part of the rows: which rows they keep, and that they train on these."""

import pytest
import torch
from datasets import Dataset

from trl_bilevel.demo.experiment import Budget, chosen_rows, make_trainer, run_arm
from trl_bilevel.demo.tasks import Task

pytestmark = pytest.mark.filterwarnings("ignore:.selector_preset='seal':UserWarning")


@pytest.fixture
def settings(tiny_model, tokenizer, tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    budget = Budget(batch_size=4, overrides={"model_init_kwargs": {"dtype": torch.float32}})
    return {"seed": 0, "budget": budget, "model": str(tmp_path / "model"), "output_dir": str(tmp_path / "out")}


@pytest.fixture
def task(rows):
    train = [row | {"kind": "good" if i % 4 == 0 else "lazy"} for i, row in enumerate(rows[:20])]
    return Task("mixed", Dataset.from_list(train), Dataset.from_list(rows[20:40]), Dataset.from_list(rows[40:50]), [])


def test_perplexity_keeps_the_likeliest_rows(settings, task):
    untrained, _ = make_trainer("uniform", task, **settings)
    losses = untrained.row_losses(task.train.remove_columns("kind"))
    assert sorted(chosen_rows("perplexity", task, **settings)) == sorted(losses.argsort()[:5].tolist())


def test_two_stages_train_on_the_rows_that_the_first_one_kept(settings, task):
    kept = chosen_rows("seal_two_stage", task, **settings)
    assert len(set(kept)) == 16
    second, pilot = make_trainer("seal_two_stage", task, **settings, keep=kept)
    assert pilot == 0 and not second.mode.learns
    chosen = task.train.select(sorted(kept))
    assert list(second.train_dataset["prompt"]) == list(chosen["prompt"])


@pytest.mark.parametrize("arm", ["perplexity", "seal", "seal_two_stage"])
def test_arms_run(arm, settings, task):
    result = run_arm(arm, task, **settings)
    assert (result.train_steps, result.pilot_steps) == (10, 0)
    assert (result.weights is not None) == (arm == "seal")


def test_rows_chosen_elsewhere(settings, task):
    second, _ = make_trainer("elsewhere", task, **settings, keep=[8, 4, 0, 12])
    assert list(second.train_dataset["prompt"]) == list(task.train.select([0, 4, 8, 12])["prompt"])
    result = run_arm("elsewhere", task, **settings, keep=[8, 4, 0, 12], choosing_seconds=1000.0)
    assert (result.arm, result.train_steps, result.weights) == ("elsewhere", 10, None)
    assert result.seconds > 1000
