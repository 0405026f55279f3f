"""Rounds: books, choice of model, rollback, patience, what they start from."""

import json

import pandas as pd
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback

from tests.conftest import parameters
from trl_bilevel import BilevelSFTTrainer, SelfRefineTrainer
from trl_bilevel.trainer.rounds import Snapshot
from trl_bilevel.trainer.self_refine_config import check_contract
from trl_bilevel.weights.learn import learn_weights


@pytest.mark.parametrize(
    "adapter", [pytest.param(True, id="lora", marks=pytest.mark.compat), pytest.param(False, id="full")]
)
def test_rounds_train_and_keep_their_books(build, adapter, tmp_path):
    trainer = build(adapter=adapter, eval_dataset=Dataset.from_list([{"prompt": "a", "completion": "b c"}]))
    before = parameters(trainer)
    trainer.train()
    assert any(not torch.equal(a, b) for a, b in zip(before, parameters(trainer), strict=True))
    assert [entry["round"] for entry in trainer.ledger] == [0, 1]
    for entry in trainer.ledger:
        assert entry["questions"] == 4 and entry["responses"] == 16 and entry["kept"]
        assert entry["trained_loss"] <= entry["incoming_loss"] and entry["standard_error"] > 0
        assert entry["eval_loss"] > 0
    assert trainer.ledger[1]["incoming_loss"] == trainer.ledger[0]["trained_loss"]
    lines = (tmp_path / "out" / "_rows" / "ledger.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == trainer.ledger
    table = pd.read_parquet(tmp_path / "out" / "_rows" / "responses" / "round-0001.parquet")
    assert len(table) == 16 and (table["prompt"].iloc[::4].values == table["prompt"].iloc[3::4].values).all()
    assert table["response"].str.len().gt(0).any()


def test_a_sabotaged_round_is_rolled_back_to_the_last_bit(build):
    states = {}

    class Sabotage(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            states[state.global_step] = everything()
            if state.global_step in (2, 3):
                for group in trainer.optimizer.param_groups:
                    group["lr"] *= 100

    def everything():
        moments = [v.clone() for s in trainer.optimizer.state_dict()["state"].values() for v in s.values()]
        return parameters(trainer) + moments

    trainer = build(num_rounds=3, callbacks=[Sabotage()], adapter=False)
    trainer.train()
    assert [entry["kept"] for entry in trainer.ledger] == [True, False, True]
    assert all(torch.equal(a, b) for a, b in zip(states[2], states[4], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(states[2], states[3], strict=True))
    losses = [min(e["incoming_loss"], e["trained_loss"]) if e["kept"] else e["incoming_loss"] for e in trainer.ledger]
    assert losses == sorted(losses, reverse=True)


def test_a_round_stopped_in_the_middle_is_decided(build):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    trainer = build(num_rounds=3, callbacks=[Stop()])
    trainer.train()
    assert [entry["step"] for entry in trainer.ledger] == [2, 3]
    assert trainer.rounds.snapshot is None
    trainer.pop_callback(Stop)
    trainer.train()
    assert [entry["round"] for entry in trainer.ledger] == [0, 1, 2, 3, 4]


def test_steps_are_logged_beside_rounds(build):
    trainer = build(logging_steps=1)
    trainer.train()
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [1, 2, 3, 4]
    assert [entry["step"] for entry in trainer.state.log_history if "round/kept" in entry] == [2, 4]


def test_snapshots_hold_any_optimizer_state():
    class Optimizer:
        state = {0: {"step": 3, "inner": {"m": torch.ones(2)}, "v": torch.zeros(2)}}

        def state_dict(self):
            return {"state": self.state, "param_groups": []}

        def load_state_dict(self, loaded):
            self.state = loaded["state"]

    optimizer, parameter = Optimizer(), torch.nn.Parameter(torch.ones(3))
    snapshot = Snapshot.take([parameter], optimizer)
    optimizer.state[0]["inner"]["m"].add_(1)
    optimizer.state[0]["step"] = 4
    with torch.no_grad():
        parameter.zero_()
    snapshot.restore([parameter], optimizer)
    assert parameter.tolist() == [1.0, 1.0, 1.0]
    assert optimizer.state[0]["step"] == 3 and optimizer.state[0]["inner"]["m"].tolist() == [1.0, 1.0]


def test_patience_ends_the_run(build):
    trainer = build(num_rounds=5, patience=2, learning_rate=3.0, adapter=False)
    trainer.train()
    assert [entry["kept"] for entry in trainer.ledger] == [False, False]


def test_positional_arguments_of_train(build):
    trainer = build(num_rounds=1)
    trainer.train(None, None)
    assert len(trainer.ledger) == 1


def test_without_weights_and_without_validation_loss(build):
    trainer = build(weight_estimator="none", validation_loss_weight=0.0, num_rounds=1, question_strategy="random")
    trainer.train()
    assert torch.allclose(trainer.explicit_weights(), torch.ones(40))


def test_given_weights_are_used(build, train_rows):
    weights = torch.linspace(0.1, 1.9, len(train_rows))
    trainer = build(train=train_rows.add_column("data_weight", weights.tolist()), num_rounds=1)
    trainer.train()
    torch.testing.assert_close(trainer.explicit_weights(), weights / weights.mean(), atol=1e-4, rtol=1e-4)


def test_goes_on_from_a_bilevel_run(
    config, refine_config, tiny_model, train_rows, validation_rows, trusted, tokenizer
):
    first = BilevelSFTTrainer(
        tiny_model(),
        config(),
        train_dataset=train_rows,
        validation_dataset=validation_rows,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )
    first.train()
    second = SelfRefineTrainer(
        first.model, refine_config(), first.weighted_dataset(), trusted, processing_class=tokenizer
    )
    before = parameters(second)
    assert all(torch.equal(a, b) for a, b in zip(before, parameters(first), strict=True))
    second.train()
    assert len(before) == len(parameters(second)) and second.ledger[-1]["kept"]
    torch.testing.assert_close(second.explicit_weights(), first.sample_weights(), atol=1e-5, rtol=1e-5)


def chat(row):
    return {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "completion": [{"role": "assistant", "content": row["completion"]}],
    }


def test_conversations_and_questions_without_answers(build, rows):
    chats = [chat(row) for row in rows[:80]]
    trainer = build(
        train=Dataset.from_list(chats[:40]),
        validation={"a": Dataset.from_list(chats[40:60]), "b": Dataset.from_list(chats[60:])},
        prompt_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in chats[40:50]]),
        question_strategy="all",
        num_rounds=1,
    )
    trainer.train()
    assert trainer.ledger[0]["questions"] == 4


def test_template_settings_reach_questions_and_answers(build, tokenizer, rows):
    """Rows that are trained on, that pull, that select and that report open as the questions do."""
    tokenizer.chat_template = "{{ style }}: " + tokenizer.chat_template
    chats = Dataset.from_list([chat(row) for row in rows[:100]])
    trainer = build(
        train=chats.select(range(40)),
        validation=chats.select(range(40, 80)),
        eval_dataset=chats.select(range(80, 100)),
        chat_template_kwargs={"style": "plainly"},
        num_rounds=1,
    )
    question = trainer._tokenize_prompts([chats[0]["prompt"]])[0][0]
    assert tokenizer.decode(question).startswith("plainly:")
    assert trainer.rows.dataset[0]["input_ids"][: len(question)] == question
    for rows in (*trainer.trusted.sets.values(), *trainer.selection.sets.values(), trainer.eval_rows):
        assert all(tokenizer.decode(ids).startswith("plainly:") for ids in rows.dataset["input_ids"])
    trainer.train()
    assert len(trainer.ledger) == 1


def test_evaluation_looks_at_losses_and_leaves_the_books_alone(build, rows, tmp_path):
    trainer = build(eval_dataset=Dataset.from_list(rows[80:90]), num_rounds=1)
    trainer.train()
    books = sorted((file.name, file.read_bytes()) for file in (tmp_path / "out").rglob("*") if file.is_file())
    metrics = trainer.evaluate()
    assert metrics["eval_selection_loss"] == pytest.approx(trainer.ledger[0]["trained_loss"])
    assert metrics["eval_loss"] == pytest.approx(trainer.ledger[0]["eval_loss"])
    other = trainer.evaluate(Dataset.from_list(rows[90:95]), metric_key_prefix="test")
    assert {"test_selection_loss", "test_loss"} <= set(other) and other["test_loss"] != metrics["eval_loss"]
    assert books == sorted((file.name, file.read_bytes()) for file in (tmp_path / "out").rglob("*") if file.is_file())


def test_learned_weights_are_those_of_learn_weights(build, tiny_model, train_rows, trusted, rows, tokenizer):
    """To the last bit, with nothing else given; and they come back as a column."""
    trainer = build(num_rounds=1, selection_dataset=Dataset.from_list(rows[80:100]), adapter=False)
    assert trainer.weights.known is False
    trainer.train()
    settings = {"max_length": 128, "disable_tqdm": True}
    model = tiny_model().to(trainer.accelerator.device)
    learned = learn_weights(model, train_rows, trusted, processing_class=tokenizer, **settings)
    assert torch.equal(trainer.sample_weights(), learned.values)
    assert trainer.weighted_dataset()["data_weight"] == learned.to_dataset()["data_weight"]
    assert len(trainer.weighted_dataset(top_k=5)) == 5


def test_weights_and_record_are_written(build, tmp_path, rows):
    trainer = build(num_rounds=1, save_strategy="steps", save_steps=1, eval_dataset=Dataset.from_list(rows[80:90]))
    trainer.train()
    for folder in (tmp_path / "out" / "checkpoint-1", tmp_path / "out" / "checkpoint-2"):
        assert {"weights.safetensors", "weights.json", "rounds.json"} <= {file.name for file in folder.iterdir()}
    told = json.loads((tmp_path / "out" / "_record" / "run.json").read_text())
    assert told["kind"] == "refine" and told["finished"]
    assert told["weights"] | {"learned": True, "by": "resample", "asks_own_rows": True} == told["weights"]
    assert len(told["evaluation"]["losses"]) == 10
    losses = trainer.row_losses(Dataset.from_list(rows[80:90]))
    assert losses.tolist() == pytest.approx(told["evaluation"]["losses"], abs=1e-4)
    # No text of a row lies where a model's folder is uploaded from.
    names = {file.name for file in (tmp_path / "out").iterdir() if not file.name.startswith(("_", "checkpoint-"))}
    assert not {"ledger.jsonl", "responses"} & names


def test_a_release_of_trl_that_lacks_what_rounds_need_is_refused():
    class Older:
        def __init__(self):
            self.eos_token_ids = self.mask_truncated_completions = self._buffered_inputs = self._step = None

        def _prepare_inputs(self):
            return self._generate_and_score_completions, self.steps_per_generation

        def _tokenize_prompts(self):
            """There is no `_generate_single_turn`."""

    with pytest.raises(ImportError, match="lacks `GRPOTrainer._generate_single_turn`, which rounds need"):
        check_contract(Older)
