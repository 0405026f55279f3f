"""Arms that only the benchmarks have: which rows they keep, and that they train on these."""

import pytest
import torch
from datasets import Dataset

from benchmarks.arms import ARMS, chosen_rows, run_arm
from trl_bilevel.demo import experiment
from trl_bilevel.demo.experiment import Budget, make_trainer
from trl_bilevel.demo.tasks import Task

pytestmark = [
    pytest.mark.filterwarnings("ignore:.selector_preset='seal':UserWarning"),
    pytest.mark.filterwarnings("ignore:.* rows of .* are also training rows:UserWarning"),
]


@pytest.fixture
def settings(tiny_model, tokenizer, tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    budget = Budget(batch_size=4, overrides={"model_init_kwargs": {"dtype": torch.float32}})
    return {"seed": 0, "budget": budget, "model": str(tmp_path / "model"), "output_dir": str(tmp_path / "out")}


@pytest.fixture
def task(rows):
    train = [row | {"kind": "good" if i % 4 == 0 else "lazy"} for i, row in enumerate(rows[:20])]
    return Task("mixed", Dataset.from_list(train), Dataset.from_list(rows[20:50]), Dataset.from_list(rows[50:60]), [])


@pytest.fixture
def trained_on(monkeypatch):
    """The training prompts and arguments of every trainer that is made."""
    seen = []

    def watched(*args, **kwargs):
        trainer, pilot = make_trainer(*args, **kwargs)
        seen.append((list(trainer.train_dataset["prompt"]), trainer.args))
        return trainer, pilot

    monkeypatch.setattr(experiment, "make_trainer", watched)
    return seen


def test_perplexity_keeps_the_likeliest_rows(settings, task):
    untrained, _ = make_trainer("uniform", task, **settings)
    losses = untrained.row_losses(task.train.remove_columns("kind"))
    assert sorted(chosen_rows("perplexity", task, **settings)) == sorted(losses.argsort()[:5].tolist())


def test_two_stages_keep_four_fifths_of_the_rows(settings, task):
    assert len(set(chosen_rows("seal_two_stage", task, **settings))) == 16


@pytest.mark.parametrize("arm", ["perplexity", "seal", "seal_two_stage", "random_subset"])
def test_arms_run(arm, settings, task):
    result = run_arm(arm, task, **settings)
    assert (result.arm, result.train_steps, result.pilot_steps) == (arm, 10, 0)
    assert (result.weights is not None) == (arm == "seal")


def test_rows_chosen_elsewhere(settings, task, trained_on):
    result = run_arm("elsewhere", task, **settings, keep=[8, 4, 0, 12], choosing_seconds=1000.0)
    assert (result.arm, result.train_steps, result.weights) == ("elsewhere", 10, None)
    assert result.seconds > 1000
    assert trained_on[0][0] == list(task.train.select([0, 4, 8, 12])["prompt"])


def test_validation_rows_alone(settings, task, trained_on):
    settings["budget"].validation_loss_weight = 0.5
    result = run_arm("validation_only", task, **settings)
    prompts, args = trained_on[0]
    assert prompts == list(task.validation["prompt"]) and args.validation_loss_weight == 0
    assert (result.train_steps, result.weights, settings["budget"].validation_loss_weight) == (10, None, 0.5)


@pytest.mark.parametrize(("arm", "pilot"), [("bilevel", 0), ("pilot", 2), ("both", 2)])
def test_steps_of_a_pilot_are_taken_off(arm, pilot, settings, task):
    settings["budget"].pilot_steps = 2
    result = run_arm(arm, task, **settings)
    assert (result.train_steps, result.pilot_steps, len(result.weights)) == (10 - pilot, pilot, 20)


def test_twice_the_rows_per_step(settings, task, trained_on):
    result = run_arm("bilevel_double", task, **settings)
    assert trained_on[0][1].per_device_train_batch_size == 8 and result.train_steps == 10 and len(result.weights) == 20


@pytest.mark.parametrize("arm", ["refine_random", "refine_best"])
def test_controls_of_the_rounds(arm, settings, task, trained_on):
    settings["budget"].refining = {"num_rounds": 1, "steps_per_round": 2, "max_completion_length": 4}
    result = run_arm(arm, task, **settings)
    assert result.train_steps == 10 and len(result.ledger) == 1
    assert (trained_on[1][1].implicit_weight_temperature == 1e-4) == (arm == "refine_best")


def test_arms_of_the_demo_are_arms():
    assert experiment.ARMS.items() <= ARMS.items()
