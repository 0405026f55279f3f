"""Checkpoints that are incomplete, cut off, of another version, or could not be written."""

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.conftest import parameters
from tests.errors_table import CHECKPOINTS, bad_input
from trl_bilevel import BilevelSFTTrainer
from trl_bilevel.trainer.checkpoints import resume_point
from trl_bilevel.weights import result


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


@pytest.mark.bad_input(CHECKPOINTS, "`resume_from_checkpoint=True`, and no complete checkpoint")
def test_nothing_to_resume_from(refused, tmp_path):
    make(tmp_path, 1, {})
    with refused("no complete checkpoint"):
        resume_point(True, str(tmp_path), [])


@pytest.mark.compat
def test_training_goes_on_from_an_older_one(config, tiny_model, train_rows, validation_rows, tokenizer, tmp_path):
    def trainer():
        args = config(save_strategy="steps", save_steps=2)
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
    (tmp_path / "out" / "checkpoint-4" / "weights.json").unlink()
    resumed = trainer()
    resumed.train(resume_from_checkpoint=True)
    assert_same(resumed, whole)


@pytest.fixture
def saving(config, tiny_model, train_rows, validation_rows, tokenizer):
    """Makes trainers that save every second step, and keep one checkpoint."""

    def make(trainer_class=BilevelSFTTrainer):
        return trainer_class(
            tiny_model(),
            config(save_strategy="steps", save_steps=2, save_total_limit=1),
            train_dataset=train_rows,
            validation_dataset=validation_rows,
            processing_class=tokenizer,
        )

    return make


def assert_same(run, other):
    assert torch.equal(run.sample_weights(), other.sample_weights())
    assert all(torch.equal(a, b) for a, b in zip(parameters(run), parameters(other), strict=True))


FILES = ["model.safetensors", "weights.safetensors", "optimizer.pt", "rng_state.pth", "weights.json"]


@pytest.mark.parametrize("file", FILES)
def test_a_file_that_was_cut_off(file, tmp_path, caplog):
    """Half of any file: the disk was full, or the machine stopped before it was on it."""
    good, bad = (make(tmp_path, step, WHOLE) for step in (1, 2))
    for folder in (good, bad):
        save_file({"weight": torch.zeros(100)}, f"{folder}/model.safetensors")
        save_file({"logits": torch.zeros(100)}, f"{folder}/weights.safetensors")
        torch.save({"state": torch.zeros(100)}, f"{folder}/optimizer.pt")
        torch.save({"cpu": torch.zeros(100)}, f"{folder}/rng_state.pth")
        Path(f"{folder}/weights.json").write_text(json.dumps({"format": 1}))
    assert resume_point(True, str(tmp_path), FILES) == bad
    content = Path(bad, file).read_bytes()
    Path(bad, file).write_bytes(content[: len(content) // 2])
    assert resume_point(True, str(tmp_path), FILES) == good
    assert f"({file} missing or cut off" in caplog.text


@pytest.mark.parametrize("fails", ["weights", "optimizer"])
def test_a_full_disk_costs_no_checkpoint(fails, saving, tmp_path, monkeypatch):
    class FullDisk(BilevelSFTTrainer):
        """Fails in the second save."""

        def _save_optimizer_and_scheduler(self, output_dir):
            if fails == "optimizer" and self.state.global_step == 4:
                Path(output_dir, "optimizer.pt").write_bytes(b"PK")
                raise OSError(errno.ENOSPC, "No space left on device")
            super()._save_optimizer_and_scheduler(output_dir)

    def full(tensors, path):
        if fails == "weights" and "checkpoint-4" in str(path):
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(result, "save_file", full)
        with pytest.raises(OSError, match="No space left"):
            saving(FullDisk).train()
    resumed = saving()
    resumed.train(resume_from_checkpoint=True)
    shutil.rmtree(tmp_path / "out")
    whole = saving()
    whole.train()
    assert_same(resumed, whole)


@pytest.mark.parametrize(
    "format",
    [
        bad_input(CHECKPOINTS, f"a checkpoint of {kind}", number)
        for number, kind in ((0, "an older version"), (None, "a version without a number"), (2, "a newer version"))
    ],
)
def test_state_of_another_version(refused, format, saving, tmp_path):
    saving().train()
    file = tmp_path / "out" / "checkpoint-6" / "weights.json"
    summary = json.loads(file.read_text())
    del summary["format"]
    file.write_text(json.dumps(summary if format is None else summary | {"format": format}))
    with refused(f"format {format}, this version reads 1.*that wrote them"):
        saving().train(resume_from_checkpoint=True)
