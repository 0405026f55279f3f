"""Records and reports of real runs of a tiny model."""

import json
import os

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig

from tests.conftest import base_arguments
from tests.report.conftest import ARTEFACTS, embedded
from tests.trainer.test_plain_sft import chat
from trl_bilevel import BilevelSFTTrainer, SelfRefineConfig, SelfRefineTrainer
from trl_bilevel.report import write_report
from trl_bilevel.report.run import load_run

PILOT = {"weight_estimator": "value_function", "pilot_steps": 2, "pilot_learning_rate": 1e-2}


@pytest.fixture
def build(config, tiny_model, train_rows, validation_rows, tokenizer):
    def make(train=None, validation=validation_rows, evaluation=None, **settings):
        return BilevelSFTTrainer(
            tiny_model(),
            config(**settings),
            train_dataset=train_rows if train is None else train,
            validation_dataset=validation,
            eval_dataset=evaluation,
            processing_class=tokenizer,
            peft_config=LoraConfig(r=4, target_modules="all-linear"),
        )

    return make


def read(trainer, name="run.json"):
    return json.loads(open(os.path.join(trainer.args.output_dir, "_record", name)).read())


@pytest.mark.parametrize(("estimator", "calibrating"), [({}, 20), (PILOT, 5)], ids=["default", "pilot"])
def test_a_run_and_its_baseline(estimator, calibrating, build, rows, tmp_path):
    evaluation = Dataset.from_list(rows[60:80])
    evals = {"eval_strategy": "steps", "eval_steps": 3}
    trainer = build(evaluation=evaluation, **estimator, **evals)
    trainer.train()
    record, pilot = read(trainer), read(trainer, "pilot.json")
    assert record["finished"] and record["steps"] == {"done": 6, "planned": 6}
    assert [entry["step"] for entry in record["validation"]] == [0, 3, 6]
    assert record["validation"][-1]["total"] == pytest.approx(trainer.validation_loss()["total"], abs=1e-4)
    losses = trainer.row_losses(evaluation).tolist()
    assert record["evaluation"]["losses"] == pytest.approx(losses, abs=1e-4)
    assert 0 < pilot["seconds"] <= record["seconds"]["selection"] <= record["seconds"]["total"]
    assert pilot["rows_scored"] == 40 and len(pilot["trusted"]) == calibrating
    assert pilot["steps"] == estimator.get("pilot_steps", 0)
    # Trusted rows that calibrate, as they were given.
    known = {(row["prompt"].strip(), row["completion"].strip()) for row in rows[40:60]}
    assert all((row["prompt"].strip(), row["answer"].strip()) in known for row in pilot["trusted"])

    uniform = build(evaluation=evaluation, weight_estimator="none", output_dir=str(tmp_path / "uniform"), **evals)
    uniform.train()
    path = write_report(trainer, baseline=uniform.args.output_dir)
    run = load_run(trainer.args.output_dir)
    np.testing.assert_allclose(run.weights, trainer.sample_weights().numpy(), rtol=1e-6)
    assert int(np.isfinite(run.scores).sum()) == 40
    page = path.read_text()
    assert "Loss on the eval rows, which chose nothing" in page and "With care" not in page
    found = embedded(page)["rows"]
    assert found["question"][0].strip() == rows[found["row"][0]]["prompt"].strip()
    ARTEFACTS.mkdir(parents=True, exist_ok=True)
    (ARTEFACTS / "example_tiny_run.html").write_text(page)


def test_no_secret_and_no_path_is_recorded(build, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_environment")
    trainer = build(max_steps=1, hub_token="hf_secret", run_name="hf_name", model_init_kwargs=None)
    trainer.args.model_init_kwargs = {"token": "hf_kwargs"}
    trainer.model.config._name_or_path = str(tmp_path / "home of someone" / "model")
    trainer.train()
    page = write_report(trainer).read_text()
    text = page + json.dumps(read(trainer))
    assert "hf_" not in text and str(tmp_path) not in text and "model" in read(trainer)["model"]


def test_an_interrupted_run_and_its_end(build, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2}
    first = build(max_steps=6, **saving)

    class Stop(Exception):
        pass

    def stop(*args, **kwargs):
        if first.state.global_step == 3:
            raise Stop
        return type(first).training_step(first, *args, **kwargs)

    first.training_step = stop
    with pytest.raises(Stop):
        first.train()
    scores = load_run(first.args.output_dir).scores
    assert not read(first)["finished"] and np.isfinite(scores).any()
    page = write_report(first.args.output_dir).read_text()
    assert "This run was interrupted at step 2" in page and "The texts of the rows are not in this folder" in page
    second = build(max_steps=6, **saving)
    second.train(resume_from_checkpoint=True)
    run = load_run(second.args.output_dir)
    assert run.finished and [e["step"] for e in run.record["validation"]] == [0, 6]
    # Nothing was chosen again: the scores are those of the first part.
    np.testing.assert_array_equal(run.scores, scores)
    assert run.record["seconds"]["selection"] >= run.pilot["seconds"]
    # A new run in the same folder forgets all of it.
    third = build(max_steps=1, weight_estimator="none")
    third.train()
    assert load_run(third.args.output_dir).pilot == {} and load_run(third.args.output_dir).weights is None


@pytest.mark.parametrize(
    ("make", "settings", "texts"),
    [
        ("groups", {"selector_group_column": "source"}, ["Weight by source"]),
        ("fixed", {"weight_estimator": "none"}, ["the weights were given", "No weights were learned"]),
        ("sets", {}, ["Loss on each set of trusted rows"]),
        ("chat", {}, ["How the weights are spread"]),
        ("online", {"selector_preset": "sparse_centred"}, ["How the weights are spread"]),
    ],
)
def test_every_kind_of_run_has_a_report(build, rows, mixed_rows, make, settings, texts):
    train, validation = Dataset.from_list(mixed_rows), Dataset.from_list(rows[40:60])
    if make == "groups":
        train = train.add_column("source", ["a", "b"] * 20)
    elif make == "fixed":
        train, validation = train.add_column("data_weight", [0.5, 1.5] * 20), None
    elif make == "sets":
        validation = {"one": validation, "two": Dataset.from_list(rows[60:80])}
    elif make == "chat":
        train, validation = train.map(chat, remove_columns=train.column_names), validation.map(
            chat, remove_columns=validation.column_names
        )  # fmt: skip
    trainer = build(train, validation, **settings)
    trainer.train()
    page = write_report(trainer).read_text()
    assert all(text in page for text in texts)
    found = embedded(page)["rows"]
    assert mixed_rows[found["row"][0]]["completion"][:20] in found["answer"][0]
    assert ("score" in page) and (make in ("fixed", "online") or any(s is not None for s in found["score"]))


def test_a_self_refining_run(tmp_path, tiny_model, train_rows, rows, tokenizer):
    settings = base_arguments(tmp_path) | {"max_steps": -1, "per_device_train_batch_size": 4, "num_rounds": 2}
    settings |= {"steps_per_round": 2, "max_completion_length": 8}
    trainer = SelfRefineTrainer(
        tiny_model(),
        SelfRefineConfig(**settings),
        train_rows,
        Dataset.from_list(rows[40:80]),
        Dataset.from_list(rows[80:90]),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )
    trainer.train()
    record = read(trainer)
    assert record["kind"] == "refine" and record["finished"] and record["weights"]["asks_own_rows"]
    assert record["seconds"]["selection"] > 0 and read(trainer, "pilot.json")["rows_scored"] == 40
    page = write_report(trainer).read_text()
    kept = sum(entry["kept"] for entry in trainer.ledger)
    assert (f"{kept} of 2 rounds were kept" if kept else "None of 2 rounds helped") in page
    assert page.count('<article class="question">') >= 2 and "The offline answer is not" not in page


def test_following_losses_changes_nothing(build, rows):
    """Watching does not train: the weights of a run are the same to the last bit with evaluations and without."""
    ends = []
    for evaluation in (None, Dataset.from_list(rows[60:80])):
        settings = {} if evaluation is None else {"eval_strategy": "steps", "eval_steps": 2}
        trainer = build(evaluation=evaluation, **settings)
        trainer.train()
        ends.append([p.detach().clone() for p in trainer.model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_a_record_that_cannot_be_written_stops_nothing(build, caplog):
    trainer = build(max_steps=1)
    os.makedirs(trainer.args.output_dir, exist_ok=True)
    open(os.path.join(trainer.args.output_dir, "_record"), "w").close()
    trainer.train()
    assert "could not be written" in caplog.text and trainer.state.global_step == 1


def test_rows_dropped_in_preparation(build, rows):
    long = Dataset.from_list([{"prompt": 60 * "far too long ", "completion": "x"}])
    trainer = build(concatenate_datasets([Dataset.from_list(rows[:39]), long]), max_steps=1)
    trainer.train()
    page = write_report(trainer).read_text()
    assert "Rows were dropped in preparation" in page and embedded(page)["rows"]["weight"][-1] is None
