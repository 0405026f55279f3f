"""`resume_from_checkpoint=True` after a run that was killed while saving."""

import json

import pytest
import torch

from tests.conftest import parameters
from trl_bilevel import BilevelSFTTrainer
from trl_bilevel.trainer.checkpoints import resume_point


def make(folder, step, files):
    target = folder / f"checkpoint-{step}"
    target.mkdir()
    for name, text in files.items():
        (target / name).write_text(text)
    return str(target)


WHOLE = {"trainer_state.json": json.dumps({"global_step": 1}), "rounds.json": "{}"}


def test_the_newest_complete_checkpoint_is_taken(tmp_path, caplog):
    best = make(tmp_path, 9, WHOLE)
    make(tmp_path, 8, WHOLE)
    make(tmp_path, 10, {"rounds.json": "{}"})
    make(tmp_path, 11, WHOLE | {"trainer_state.json": '{"global_'})
    make(tmp_path, 12, {"trainer_state.json": "{}"})
    (tmp_path / "checkpoint-best").mkdir()
    assert resume_point(True, str(tmp_path), ["rounds.json"]) == best
    assert caplog.text.count("is incomplete") == 3


def test_paths_are_passed_on(tmp_path):
    assert resume_point(None, str(tmp_path), []) is None
    assert resume_point(False, str(tmp_path), []) is False
    assert resume_point("elsewhere", str(tmp_path), ["rounds.json"]) == "elsewhere"


def test_nothing_to_resume_from(tmp_path):
    make(tmp_path, 1, {})
    with pytest.raises(ValueError, match="no complete checkpoint"):
        resume_point(True, str(tmp_path), [])


def test_training_goes_on_from_an_older_one(config, tiny_model, train_rows, validation_rows, tokenizer, tmp_path):
    def trainer():
        args = config(save_strategy="steps", save_steps=2, pilot_steps=2)
        return BilevelSFTTrainer(
            tiny_model(),
            args,
            train_dataset=train_rows,
            validation_dataset=validation_rows,
            processing_class=tokenizer,
        )

    whole = trainer()
    whole.train()
    (tmp_path / "out" / "checkpoint-6" / "trainer_state.json").unlink()
    (tmp_path / "out" / "checkpoint-4" / "selector.json").unlink()
    resumed = trainer()
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(resumed.sample_weights(), whole.sample_weights())
    assert all(torch.equal(a, b) for a, b in zip(parameters(resumed), parameters(whole), strict=True))
