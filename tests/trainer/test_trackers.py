"""Trackers see the weights: those that run offline are asked what they were shown."""

import json
import logging
from importlib.util import find_spec

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback

from trl_bilevel import BilevelSFTTrainer
from trl_bilevel.trainer import trackers

FIXED = {"weight_estimator": "none", "validation_loss_weight": 0.0, "max_steps": 2}


def needs(name):
    return pytest.mark.skipif(find_spec(name) is None, reason=f"{name} is not installed")


@pytest.fixture
def train(config, tiny_model, tokenizer, train_rows, validation_rows):
    """Trains on rows with the weights 0, 1/20, 2/20 ..., scaled to mean one."""

    def run(report_to, before=None, weights=None, **overrides):
        settings = FIXED | {"report_to": report_to} | overrides
        rows = train_rows
        if settings["weight_estimator"] == "none" and weights is not False:
            rows = rows.add_column("data_weight", [n / 20 for n in range(len(rows))])
        trainer = BilevelSFTTrainer(
            tiny_model(),
            config(**settings),
            train_dataset=rows,
            validation_dataset=validation_rows,
            eval_dataset=validation_rows if settings.get("eval_strategy") else None,
            processing_class=tokenizer,
            peft_config=LoraConfig(r=4, target_modules="all-linear"),
        )
        if before:
            before(trainer)
        trainer.train()
        return trainer

    return run


@pytest.fixture
def sent(monkeypatch):
    """What a tracker was sent: `(step, weights, rows)` each time. It goes by the name of `tensorboard`."""
    calls = []
    sink = lambda trainer, step, weights, rows: calls.append((step, weights.copy(), rows))  # noqa: E731
    monkeypatch.setitem(trackers.SINKS, "tensorboard", sink)
    monkeypatch.setattr("transformers.trainer.get_reporting_integration_callbacks", lambda report_to: [])
    return calls


def test_rows_at_both_ends_with_their_text(train, train_rows, sent):
    train("tensorboard", tracked_rows=2)
    ((step, weights, rows),) = sent
    assert step == 0 and len(weights) == 40 and weights.mean() == pytest.approx(1)
    assert [line[:3] for line in rows] == [
        ["highest", 2.0, 39],
        ["highest", pytest.approx(1.9487, abs=1e-4), 38],
        ["lowest", pytest.approx(0.0513, abs=1e-4), 1],
        ["lowest", 0.0, 0],
    ]
    assert rows[0][3].strip() == train_rows[39]["prompt"].strip()
    assert rows[0][4][:40] == train_rows[39]["completion"][:40]
    assert all(len(text) <= trackers.TEXT_LENGTH + 2 for line in rows for text in line[3:])


def test_texts_are_kept_back_on_request(train, sent):
    train("tensorboard", tracked_rows=0)
    assert sent[0][2] == []


def test_weights_that_move_are_sent_again_and_others_are_not(train, sent):
    moving = {"weight_estimator": None, "selector_preset": "seal", "validation_loss_weight": 0.5}
    moving |= {"eval_strategy": "steps", "eval_steps": 1}
    trainer = train("tensorboard", **moving)
    assert [step for step, _, _ in sent] == [0, 1, 2]
    assert not (sent[1][1] == sent[2][1]).all()
    torch.testing.assert_close(torch.from_numpy(sent[2][1]), trainer.sample_weights())
    sent.clear()
    train("tensorboard", eval_strategy="steps", eval_steps=1)
    assert [step for step, _, _ in sent] == [0]


def test_the_pilot_has_chosen_when_weights_are_sent(train, sent):
    trainer = train("tensorboard", weight_estimator="value_function")
    assert sent[0][0] == 0
    torch.testing.assert_close(torch.from_numpy(sent[0][1]), trainer.sample_weights())


def test_other_processes_send_nothing(train, sent):
    class Elsewhere(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            state.is_world_process_zero = False

    train("tensorboard", before=lambda trainer: trainer.add_callback(Elsewhere()))
    assert sent == []


def test_a_tracker_that_fails_stops_no_training(train, monkeypatch, caplog, sent):
    def broken(*args):
        raise OSError("disk is full")

    monkeypatch.setitem(trackers.SINKS, "tensorboard", broken)
    with caplog.at_level(logging.WARNING):
        trainer = train("tensorboard", eval_strategy="steps", eval_steps=1)
    assert trainer.state.global_step == 2
    assert sum("disk is full" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize("report_to", ["none", "tensorboard"])
def test_nothing_is_added_without_tracker_or_weights(train, report_to, sent):
    trainer = train(report_to, weights=False if report_to == "tensorboard" else None)
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert trackers.WeightTracking not in kinds and sent == []


def test_streams_show_their_weights_without_rows(config, tiny_model, tokenizer, rows, sent):
    stream = Dataset.from_list(rows[:80]).to_iterable_dataset()
    trainer = BilevelSFTTrainer(
        tiny_model(),
        config(report_to="tensorboard", max_steps=3, stream_sample_rows=64),
        train_dataset=stream,
        validation_dataset=Dataset.from_list(rows[80:100]),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )
    trainer.train()
    step, weights, shown = sent[-1]
    assert step == 0 and len(weights) == 64 and shown == []


def test_text_of_rows_is_no_markup():
    shown = trackers._markdown([["highest", 1.0, 0, "<img src=x onerror=a()>|\n![i](http://x)", "`b`"]])
    assert "<img" not in shown and "![i](" not in shown and len(shown.splitlines()) == 3
    assert shown.splitlines()[2].count(" | ") == len(trackers.COLUMNS) - 1


@needs("tensorboard")
def test_tensorboard(train, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    train("tensorboard", tracked_rows=1)
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    (histogram,) = events.Histograms(trackers.HISTOGRAM)
    assert histogram.histogram_value.num == 40 and histogram.histogram_value.max == pytest.approx(2.0, abs=1e-3)
    (text,) = events.Tensors(f"{trackers.ROWS}/text_summary")
    assert "| highest | 2.0 | 39 |" in text.tensor_proto.string_val[0].decode()


@needs("wandb")
def test_wandb_offline(train, tmp_path, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    train("wandb", tracked_rows=1)
    summary = dict(wandb.run.summary)
    wandb.finish()
    assert summary[trackers.HISTOGRAM]["_type"] == "histogram"
    (file,) = tmp_path.rglob("*.table.json")
    found = json.loads(file.read_text())
    assert found["columns"] == list(trackers.COLUMNS)
    assert [line[:3] for line in found["data"]] == [["highest", 2.0, 39], ["lowest", 0.0, 0]]


@needs("trackio")
def test_trackio(train, tmp_path, monkeypatch):
    from trackio import sqlite_storage

    monkeypatch.setattr(sqlite_storage, "TRACKIO_DIR", tmp_path)
    train("trackio", tracked_rows=1, project="weights", run_name="run")
    shown = {
        name: value for log in sqlite_storage.SQLiteStorage.get_logs("weights", "run") for name, value in log.items()
    }
    assert sum(shown[trackers.HISTOGRAM]["values"]) == 40
    assert "39" in json.dumps(shown[trackers.ROWS])


@needs("mlflow")
def test_mlflow(train, tmp_path, monkeypatch):
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")
    mlflow.set_tracking_uri(f"file://{tmp_path}/mlruns")
    train("mlflow", tracked_rows=1)
    (table,) = (tmp_path / "mlruns").rglob("rows-*.json")
    found = json.loads(table.read_text())
    assert found["columns"] == list(trackers.COLUMNS)
    assert [line[:3] for line in found["data"]] == [["highest", 2.0, 39], ["lowest", 0.0, 0]]
    (figure,) = (tmp_path / "mlruns").rglob("weights-*.png")
    assert figure.read_bytes()[:4] == b"\x89PNG"
