"""What works with every release of TRL that is supported: weights chosen before training, rows drawn by them.

Run by `make test-lowest` and `make test-middle` with older releases of TRL, transformers and PEFT.
"""

import json
import subprocess
import sys

import pytest
import torch
from datasets import Dataset
from packaging.version import Version
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer
from trl import __version__ as trl_version

from tests.conftest import base_arguments, losses, parameters
from trl_bilevel import BilevelSFTConfig, BilevelSFTTrainer, learn_weights

pytestmark = pytest.mark.compat
PILOT = {"weight_estimator": "value_function", "pilot_steps": 4}
ROWS = {
    "pairs": lambda row: row,
    "chat": lambda row: {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "completion": [{"role": "assistant", "content": row["completion"]}],
    },
    "messages": lambda row: {
        "messages": [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"]},
        ]
    },
    "text": lambda row: {"text": row["prompt"] + row["completion"]},
}


@pytest.fixture
def make(tiny_model, tokenizer, tmp_path):
    """Makes a trainer on the tiny model; keyword arguments are settings."""

    def trainer(train, trusted, peft=True, **settings):
        args = BilevelSFTConfig(**base_arguments(tmp_path) | settings)
        adapter = LoraConfig(r=4, target_modules="all-linear") if peft else None
        sets = {"train_dataset": train, "validation_dataset": trusted}
        return BilevelSFTTrainer(tiny_model(), args, processing_class=tokenizer, peft_config=adapter, **sets)

    return trainer


@pytest.mark.parametrize(
    ("format", "settings"), [*((name, {}) for name in ROWS), ("pairs", PILOT)], ids=[*ROWS, "pilot"]
)
def test_weights_are_those_of_a_function(format, settings, make, rows, mixed_rows, tiny_model, tokenizer):
    """`learn_weights` gives the weights that a trainer of the same settings trains with, to the last bit."""
    train, trusted = (Dataset.from_list([ROWS[format](row) for row in part]) for part in (mixed_rows, rows[40:60]))
    trainer = make(train, trusted, **settings)
    trainer.train()
    found = learn_weights(
        tiny_model(), train, trusted, processing_class=tokenizer, max_length=128, disable_tqdm=True, **settings
    )
    assert torch.equal(found.values, trainer.sample_weights()) and float(found.values.std()) > 1e-3
    assert len(losses(trainer)) == 6


def test_a_resumed_run_ends_as_an_uninterrupted_one(make, train_rows, validation_rows, tmp_path):
    whole = make(train_rows, validation_rows, save_strategy="steps", save_steps=3)
    whole.train()
    again = make(train_rows, validation_rows, save_strategy="steps", save_steps=3)
    again.train(resume_from_checkpoint=f"{tmp_path}/out/checkpoint-3")
    assert torch.equal(whole.sample_weights(), again.sample_weights())
    for first, second in zip(parameters(whole), parameters(again), strict=True):
        assert torch.equal(first, second)


def test_a_plain_trainer_trains_on_the_result(train_rows, validation_rows, tiny_model, tokenizer, tmp_path):
    found = learn_weights(tiny_model(), train_rows, validation_rows, processing_class=tokenizer, disable_tqdm=True)
    drawn = found.resample().select_columns(["prompt", "completion"])
    args = SFTConfig(**base_arguments(tmp_path))
    trainer = SFTTrainer(tiny_model(), args, train_dataset=drawn, processing_class=tokenizer)
    trainer.train()
    assert len(drawn) == 40 and len(losses(trainer)) == 6


def test_without_weights_it_is_the_parent(train_rows, tiny_model, tokenizer, tmp_path):
    ends = []
    for kind, config, more in (
        (SFTTrainer, SFTConfig, {}),
        (BilevelSFTTrainer, BilevelSFTConfig, {"weight_estimator": "none"}),
    ):
        args = config(**base_arguments(tmp_path) | more)
        trainer = kind(tiny_model(), args, train_dataset=train_rows, processing_class=tokenizer)
        trainer.train()
        ends.append(parameters(trainer))
    for first, second in zip(*ends, strict=True):
        assert torch.equal(first, second)


@pytest.mark.skipif(Version(trl_version) >= Version("1.16"), reason="this TRL gives log-probabilities of tokens")
@pytest.mark.parametrize(
    "settings",
    [{"selector_weighting": "loss"}, {"packing": True}, {"validation_loss_weight": 0.5}, {"selector_preset": "seal"}],
    ids=str,
)
def test_what_an_older_release_lacks_is_named(settings, make, rows):
    with pytest.raises(ImportError, match=r"compute_loss.*trl>=1\.16"):
        make(Dataset.from_list(rows[:40]), Dataset.from_list(rows[40:60]), **settings)


def test_rank_writes_these_weights(train_rows, validation_rows, tiny_model, tokenizer, tmp_path):
    """The command, in a process of its own."""
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for name, part in (("mixed", train_rows), ("trusted", validation_rows)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    command = [sys.executable, "-m", "trl_bilevel.cli.main", "rank", "mixed.jsonl", "--trusted", "trusted.jsonl"]
    command += ["--model_name_or_path", "model", "--output", "ranked.jsonl"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line)["data_weight"] for line in (tmp_path / "ranked.jsonl").read_text().splitlines()]
    expected = learn_weights(model, train_rows, validation_rows, processing_class=tokenizer, disable_tqdm=True)
    assert found == pytest.approx(expected.values.tolist(), rel=1e-6)
