"""What a run shows on a terminal and elsewhere, and what it says at its end."""

from types import SimpleNamespace

import pytest
from peft import LoraConfig
from transformers import PrinterCallback, ProgressCallback

from trl_bilevel import BilevelSFTTrainer
from trl_bilevel.cli import training
from trl_bilevel.cli.show import show_summary


@pytest.fixture
def trainer(config, tiny_model, tokenizer, train_rows, validation_rows):
    return BilevelSFTTrainer(
        tiny_model(),
        config(disable_tqdm=False, max_steps=4, eval_strategy="steps", eval_steps=2),
        train_dataset=train_rows,
        validation_dataset=validation_rows,
        eval_dataset=validation_rows.select(range(8)),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )


@pytest.fixture
def screen(monkeypatch, capsys):
    """Standard error, taken for a terminal; reads what it shows."""
    monkeypatch.setattr(training, "sys", SimpleNamespace(stderr=SimpleNamespace(isatty=lambda: True)))
    return lambda: capsys.readouterr().err


def test_the_numbers_that_matter_on_a_terminal(trainer, screen):
    with training.shown_progress(trainer):
        (shown,) = [c for c in trainer.callback_handler.callbacks if isinstance(c, training.RunProgress)]
        trainer.train()
    assert set(shown.numbers) == {"loss", "eval_loss", "validation", "selector/ess"}
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert shown.numbers["selector/ess"] == f"{logged[-1]['selector/ess']:.3f}"
    shown_there = screen()
    assert "validation=" in shown_there and "4/4" in shown_there and "'loss'" not in shown_there
    assert shown.training_bar is None


def test_a_run_that_fails_leaves_the_terminal_in_order(trainer, screen, monkeypatch):
    monkeypatch.setattr(trainer, "training_step", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError), training.shown_progress(trainer):
        trainer.train()
    # What is printed next begins a line.
    assert screen().endswith("\n")


def test_quiet_where_there_is_no_terminal(trainer, capfd):
    with training.shown_progress(trainer):
        trainer.train()
    assert not any(isinstance(c, ProgressCallback) for c in trainer.callback_handler.callbacks)
    found = capfd.readouterr()
    assert found.out == "" and not any(said in found.err for said in ("loss", "4/4", "Choosing", "token/s"))


def test_quiet_on_other_processes(trainer, screen, monkeypatch):
    monkeypatch.setattr(trainer, "is_world_process_zero", lambda: False)
    with training.shown_progress(trainer):
        trainer.train()
    assert screen() == ""


def test_logs_line_by_line_stay_if_asked_for(config, tiny_model, tokenizer, train_rows, validation_rows, screen):
    trainer = BilevelSFTTrainer(
        tiny_model(), config(max_steps=1), None, train_rows, None, tokenizer, validation_dataset=validation_rows
    )
    with training.shown_progress(trainer):
        assert any(isinstance(c, PrinterCallback) for c in trainer.callback_handler.callbacks)
    assert screen() == ""


def test_summary_as_table_and_as_text(monkeypatch, capsys):
    command = "trl-bilevel export " + "x" * 200
    show_summary("Done", [("Model", "out"), ("Loss [a]", "1.0")], ["A note."], [command])
    assert capsys.readouterr().out == f"Model: out\nLoss [a]: 1.0\nA note.\nNext: {command}\n"
    monkeypatch.setenv("FORCE_COLOR", "1")
    show_summary("Done", [("Model", "out"), ("Loss [a]", "1.0")], ["A note."], [command])
    drawn = capsys.readouterr().out
    assert "─" in drawn and "Loss [a]" in drawn
    # A command is there to be copied: it is never broken into lines.
    assert f"Next: {command}\n" in drawn
