"""SelfRefineTrainer on a tiny model: tokens, ratios, rounds, rollback, resume, refusals."""

import json

import pandas as pd
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback

from tests.conftest import base_arguments, parameters
from trl_bilevel import BilevelSFTTrainer, SelfRefineConfig, SelfRefineTrainer
from trl_bilevel.core.implicit import implicit_weights, question_weights
from trl_bilevel.trainer.rounds import Snapshot


@pytest.fixture
def refine_config(tmp_path):
    def make(**overrides):
        settings = base_arguments(tmp_path) | {
            "max_steps": -1,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "num_rounds": 2,
            "steps_per_round": 2,
            "max_completion_length": 10,
            "pilot_steps": 2,
            "pilot_learning_rate": 1e-2,
        }
        return SelfRefineConfig(**(settings | overrides))

    return make


@pytest.fixture
def trusted(rows):
    return Dataset.from_list(rows[40:80])


@pytest.fixture
def build(refine_config, tiny_model, train_rows, trusted, tokenizer):
    def make(train=None, validation=None, callbacks=None, adapter=True, **overrides):
        datasets = {k: overrides.pop(k) for k in list(overrides) if k.endswith("_dataset")}
        return SelfRefineTrainer(
            tiny_model(),
            refine_config(**overrides),
            train_rows if train is None else train,
            trusted if validation is None else validation,
            processing_class=tokenizer,
            peft_config=LoraConfig(r=4, target_modules="all-linear") if adapter else None,
            callbacks=callbacks,
            **datasets,
        )

    return make


def facts(trainer):
    """The ledger without the wall time."""
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in trainer.ledger]


@pytest.mark.parametrize("adapter", [True, False], ids=["lora", "full"])
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
    lines = (tmp_path / "out" / "ledger.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == trainer.ledger
    table = pd.read_parquet(tmp_path / "out" / "responses" / "round-0001.parquet")
    assert len(table) == 16 and (table["prompt"].iloc[::4].values == table["prompt"].iloc[3::4].values).all()
    assert table["response"].str.len().gt(0).any()


def test_rewards_are_implicit_weights_of_the_chosen_questions(build, tmp_path):
    trainer = build(num_rounds=1, question_fraction=0.25)
    trainer.train()
    table = pd.read_parquet(tmp_path / "out" / "responses" / "round-0000.parquet")
    explicit = trainer.explicit_weights()
    ids = torch.tensor(table["sample_id"].values)
    assert set(ids.tolist()) <= set(explicit.argsort()[:10].tolist())
    weights = implicit_weights(torch.tensor(table["score"].values), 4, trainer.args.implicit_weight_temperature)
    weights = weights * question_weights(explicit[ids[::4]]).repeat_interleave(4)
    torch.testing.assert_close(torch.tensor(table["weight"].values), weights, atol=1e-5, rtol=1e-5, check_dtype=False)


def test_tokens_are_those_sampled_and_ratios_start_at_one(build):
    """Ragged prompts, padded on the left by TRL and on the right by us: the same log-probabilities."""
    found = {}

    class Watched(SelfRefineTrainer):
        def _score_responses(self, prompt_ids, completion_ids):
            with torch.no_grad():
                self.model.eval()
                collate = self.offline.trainer.data_collator
                rows = [
                    {"input_ids": [*p, *c], "labels": [-100] * len(p) + list(c), "sample_id": -1}
                    for p, c in zip(prompt_ids, completion_ids, strict=True)
                ]
                found["losses"] = self.offline.host.row_losses(collate(rows)).sums
                self.model.train()
            found["prompts"], found["completions"] = prompt_ids, completion_ids
            return super()._score_responses(prompt_ids, completion_ids)

        def _generate_and_score_completions(self, inputs):
            out = super()._generate_and_score_completions(inputs)
            found.setdefault("out", out)
            return out

    trainer = build(num_rounds=1)
    trainer.__class__ = Watched
    trainer.train()
    out = found["out"]
    lengths = {len(p) for p in found["prompts"]}
    assert len(lengths) > 1
    for row, (prompt, answer) in enumerate(zip(found["prompts"], found["completions"], strict=True)):
        assert out["prompt_ids"][row][out["prompt_mask"][row].bool()].tolist() == list(prompt)
        assert out["completion_ids"][row][out["completion_mask"][row].bool()].tolist() == list(answer)
    old = -(out["old_per_token_logps"] * out["completion_mask"]).sum(-1)
    torch.testing.assert_close(found["losses"], old, atol=1e-4, rtol=1e-5)
    ratio = torch.exp(-found["losses"] / out["completion_mask"].sum(-1) + old / out["completion_mask"].sum(-1))
    assert float((ratio - 1).abs().max()) < 1e-5


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
    class Nothing:
        def tensors(self):
            return {}

        def load_tensors(self, tensors):
            assert tensors == {}

    class Optimizer:
        state = {0: {"step": 3, "inner": {"m": torch.ones(2)}, "v": torch.zeros(2)}}

        def state_dict(self):
            return {"state": self.state, "param_groups": []}

        def load_state_dict(self, loaded):
            self.state = loaded["state"]

    optimizer, parameter = Optimizer(), torch.nn.Parameter(torch.ones(3))
    snapshot = Snapshot.take([parameter], optimizer, Nothing())
    optimizer.state[0]["inner"]["m"].add_(1)
    optimizer.state[0]["step"] = 4
    with torch.no_grad():
        parameter.zero_()
    snapshot.restore([parameter], optimizer, Nothing())
    assert parameter.tolist() == [1.0, 1.0, 1.0]
    assert optimizer.state[0]["step"] == 3 and optimizer.state[0]["inner"]["m"].tolist() == [1.0, 1.0]


def test_without_weights_and_without_validation_loss(build):
    trainer = build(weight_estimator="none", validation_loss_weight=0.0, num_rounds=1, question_strategy="random")
    trainer.train()
    assert torch.allclose(trainer.explicit_weights(), torch.ones(40))


def test_weights_that_hardly_differ_are_warned_of(build, caplog):
    trainer = build(num_rounds=1, implicit_weight_temperature=100.0)
    trainer.train()
    assert "hardly differ" in caplog.text and "`implicit_weight_temperature` is 100" in caplog.text
    assert trainer.ledger[0]["weight_std_within_group"] < 0.1


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("estimator", ["lookahead", "alignment"])
def test_continuous_batching_generates(build, estimator, bf16, tmp_path):
    trainer = build(use_transformers_continuous_batching=True, num_rounds=1, bf16=bf16, response_estimator=estimator)
    dtypes = {name: p.dtype for name, p in trainer.model.named_parameters()}
    before = [p.detach().clone() for p in trainer.model.parameters() if not p.requires_grad]
    trainer.train()
    assert {name: p.dtype for name, p in trainer.model.named_parameters()} == dtypes
    after = [p for p in trainer.model.parameters() if not p.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    table = pd.read_parquet(tmp_path / "out" / "responses" / "round-0000.parquet")
    assert len(table) == 16 and table["score"].notna().all() and table["tokens"].between(1, 10).all()


def test_patience_ends_the_run(build):
    trainer = build(num_rounds=5, patience=2, learning_rate=3.0, adapter=False)
    trainer.train()
    assert [entry["kept"] for entry in trainer.ledger] == [False, False]


@pytest.mark.parametrize("generations", [1, 2])
def test_weights_over_the_whole_round(build, generations, tmp_path):
    """One response per question, on request: the responses of the round are compared with each other."""
    trainer = build(
        num_rounds=1,
        num_generations=generations,
        implicit_weight_scope="round",
        question_weighting=False,
        question_strategy="all",
    )
    found = {}

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            found.setdefault("advantages", torch.tensor(list(trainer._logs["advantages"])))

    trainer.add_callback(Watch())
    trainer.train()
    table = pd.read_parquet(tmp_path / "out" / "responses" / "round-0000.parquet")
    assert table["sample_id"].value_counts().tolist() == [generations] * (16 // generations)
    weights = 16 * torch.softmax(torch.tensor(table["score"].values) / 0.1, 0)
    torch.testing.assert_close(torch.tensor(table["weight"].values), weights, atol=1e-5, rtol=1e-5, check_dtype=False)
    torch.testing.assert_close(found["advantages"], weights - 1, atol=1e-4, rtol=1e-4, check_dtype=False)
    assert trainer.ledger[0]["questions"] == 16 // generations


def test_alignment_is_the_lookahead_to_first_order(build):
    """Gradients read off one backward against the difference of two forwards, after small steps."""
    prompts = [[5, 6, 7, 8], [9, 10], [11, 12, 13], [5, 6]]
    answers = [[20, 21, 22], [30, 31, 32, 33, 34], [40], [50, 51]]
    scores = {}
    for estimator in ("lookahead", "alignment"):
        trainer = build(response_estimator=estimator, pilot_learning_rate=1e-4, max_grad_norm=0.0)
        scores[estimator] = trainer._score_responses(prompts, answers)
        assert all(parameter.grad is None for parameter in trainer.model.parameters())
    spread = float(scores["lookahead"].std())
    assert spread > 1e-4
    torch.testing.assert_close(scores["alignment"], scores["lookahead"], rtol=0, atol=0.02 * spread)


@pytest.mark.parametrize("estimator", ["lookahead", "value_function", "alignment"])
@pytest.mark.parametrize("step", [1, 2, 3])
def test_resume_at_any_step_of_a_round(build, estimator, step, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, "response_estimator": estimator, "num_rounds": 2}
    whole = build(output_dir=str(tmp_path / "a"), **settings)
    whole.train()
    resumed = build(output_dir=str(tmp_path / "b"), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{step}"))
    assert facts(resumed) == facts(whole)
    assert all(torch.equal(a, b) for a, b in zip(parameters(resumed), parameters(whole), strict=True))
    assert torch.equal(resumed.explicit_weights(), whole.explicit_weights())


def test_resume_after_the_patience_has_ended(build, tmp_path):
    settings = {"num_rounds": 5, "patience": 2, "learning_rate": 3.0, "adapter": False}
    whole = build(output_dir=str(tmp_path / "a"), save_strategy="steps", save_steps=1, **settings)
    whole.train()
    last = max((tmp_path / "a").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    resumed = build(output_dir=str(tmp_path / "b"), **settings)
    resumed.train(resume_from_checkpoint=str(last))
    assert [entry["step"] for entry in whole.ledger] == [2, 4]
    assert facts(resumed) == facts(whole)
    assert all(torch.equal(a, b) for a, b in zip(parameters(resumed), parameters(whole), strict=True))
    # A run of its own starts with fresh patience.
    whole.train()
    assert len(whole.ledger) == 4


def test_resume_with_rounds_of_another_shape_is_refused(build, tmp_path):
    build(output_dir=str(tmp_path / "a"), save_strategy="steps", save_steps=1).train()
    other = build(output_dir=str(tmp_path / "b"), steps_per_round=4)
    with pytest.raises(ValueError, match="steps_per_round: 2 then, 4 now"):
        other.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1"))


def test_positional_arguments_of_train(build):
    trainer = build(num_rounds=1)
    trainer.train(None, None)
    assert len(trainer.ledger) == 1


def test_ratios_of_the_policy_loss_start_at_one(build, tiny_model, refine_config, train_rows, trusted, tokenizer):
    """Token by token, with adapters that have dropout, in the first micro-batch after generation."""
    trainer = SelfRefineTrainer(
        tiny_model(),
        refine_config(num_rounds=1),
        train_rows,
        trusted,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.3, init_lora_weights=False),
    )
    found = []
    forward = trainer._get_per_token_logps_and_entropies

    def watch(model, ids, mask, keep, **kwargs):
        out = forward(model, ids, mask, keep, **kwargs)
        found.append((ids, out[0].detach()))
        return out

    trainer._get_per_token_logps_and_entropies = watch
    batches = []
    generate = trainer._generate_and_score_completions

    def remember(inputs):
        batches.append(generate(inputs))
        found.clear()
        return batches[-1]

    trainer._generate_and_score_completions = remember
    trainer.train()
    ids, logps = found[0]
    whole = torch.cat([batches[0]["prompt_ids"], batches[0]["completion_ids"]], 1)
    old = batches[0]["old_per_token_logps"]
    assert len(ids) == 4
    for row, logp in zip(ids, logps, strict=True):
        match = (whole[:, -len(row) :] == row).all(1).nonzero()[0, 0]
        mask = batches[0]["completion_mask"][match][: len(logp)].bool()
        assert float(((logp - old[match][: len(logp)])[mask].exp() - 1).abs().max()) < 1e-5


def test_the_gradient_of_a_step_is_that_of_the_objective(build):
    """Written out from logits: lambda L_val + (1 - lambda) ((1 - rho) L_offline + rho L_responses)."""
    lam, rho, found = 0.3, 0.6, {}

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            found["gradients"] = [p.grad.clone() for p in trainer.model.parameters() if p.requires_grad]

    trainer = build(
        num_rounds=1,
        steps_per_round=1,
        validation_loss_weight=lam,
        online_loss_weight=rho,
        max_grad_norm=0.0,
        learning_rate=1e-9,
        callbacks=[Watch()],
        implicit_weight_temperature=0.01,
    )
    generate = trainer._generate_and_score_completions

    def remember(inputs):
        found["responses"] = generate(inputs)
        return found["responses"]

    trainer._generate_and_score_completions = remember
    trainer.train()

    def token_losses(ids, mask, labels):
        logits = trainer.model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")
        return losses, labels[:, 1:] != -100

    def mean(batches):
        parts = [token_losses(b["input_ids"], b["attention_mask"], b["labels"]) for b in batches]
        return sum((x * m).sum() for x, m in parts) / sum(m.sum() for _, m in parts)

    data = found["responses"]
    ids = torch.cat([data["prompt_ids"], data["completion_ids"]], 1)
    mask = torch.cat([data["prompt_mask"], data["completion_mask"]], 1)
    labels = torch.cat([torch.full_like(data["prompt_ids"], -100), data["completion_ids"]], 1)
    losses, scored = token_losses(ids, mask, labels.masked_fill(mask == 0, -100))
    policy = (data["advantages"].unsqueeze(1) * losses * scored).sum() / scored.sum()
    window = trainer.offline.window(0)
    drawn = trainer.offline.validation.step_batch(0, len(window), 0, 1).batches
    objective = lam * mean(drawn) + (1 - lam) * ((1 - rho) * mean(window) + rho * policy)
    assert float(data["advantages"].abs().max()) > 0.1
    parameters_ = [p for p in trainer.model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(objective, parameters_)
    for one, other in zip(found["gradients"], expected, strict=True):
        torch.testing.assert_close(one, other, atol=2e-6, rtol=2e-3)


def test_given_weights_are_used(build, train_rows):
    weights = torch.linspace(0.1, 1.9, len(train_rows))
    trainer = build(train=train_rows.add_column("data_weight", weights.tolist()), num_rounds=1, pilot_steps=None)
    trainer.train()
    torch.testing.assert_close(trainer.explicit_weights(), weights / weights.mean(), atol=1e-4, rtol=1e-4)


def test_goes_on_from_a_bilevel_run(
    config, refine_config, tiny_model, train_rows, validation_rows, trusted, tokenizer
):
    first = BilevelSFTTrainer(
        tiny_model(),
        config(pilot_steps=2),
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


def test_conversations_and_questions_without_answers(build, rows):
    def convert(row):
        return {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"]}],
        }

    chats = [convert(row) for row in rows[:80]]
    trainer = build(
        train=Dataset.from_list(chats[:40]),
        validation={"a": Dataset.from_list(chats[40:60]), "b": Dataset.from_list(chats[60:])},
        prompt_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in chats[40:50]]),
        question_strategy="all",
        num_rounds=1,
    )
    trainer.train()
    assert trainer.ledger[0]["questions"] == 4


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_generations": 1}, "implicit_weight_scope='round'"),
        ({"implicit_weight_scope": "batch"}, "implicit_weight_scope"),
        ({"implicit_weight_scope": "round", "use_vllm": True, "vllm_mode": "server"}, "once per group"),
        (
            {
                "num_generations": 1,
                "implicit_weight_scope": "round",
                "per_device_train_batch_size": 1,
                "steps_per_round": 1,
                "gradient_accumulation_steps": 1,
            },
            "compares nothing",
        ),
        ({"temperature": 0.7}, "temperature=0.7"),
        ({"top_p": 0.9}, "top_p=0.9"),
        ({"top_k": 20}, "top_k=20"),
        ({"top_k": None}, "top_k=None"),
        ({"generation_kwargs": {"do_sample": False}}, "'do_sample'"),
        ({"generation_kwargs": {"no_repeat_ngram_size": 2}}, "'no_repeat_ngram_size'"),
        ({"disable_dropout": False}, "disable_dropout"),
        ({"eval_strategy": "steps", "eval_steps": 1}, "eval_strategy"),
        ({"remove_unused_columns": True}, "remove_unused_columns"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs"),
        ({"response_estimator": "value_function", "validation_loss_weight": 0.0}, "no say in the scores"),
        ({"repetition_penalty": 1.2}, "repetition_penalty=1.2"),
        ({"generation_kwargs": {"top_k": 5}}, "top_k=5"),
        ({"max_steps": 7}, "contradicts `num_rounds`"),
        ({"steps_per_generation": 3}, "follow from `steps_per_round`"),
        ({"num_rounds": 0}, "`num_rounds` must be at least 1"),
        ({"question_strategy": "best"}, "must be one of"),
        ({"question_fraction": 0.0}, "question_fraction"),
        ({"selection_split": 1.0}, "selection_split"),
        ({"implicit_weight_temperature": 0.0}, "implicit_weight_temperature"),
        ({"scale_rewards": "group"}, "scale_rewards"),
        ({"num_iterations": 2}, "num_iterations=2"),
        ({"response_estimator": "loss"}, "response_estimator"),
        ({"fp16": True, "use_cpu": False}, "fp16|half-precision"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, "multi_objective_aggregation"),
    ],
)
def test_bad_settings_are_refused(refine_config, overrides, message):
    with pytest.raises(ValueError, match=message):
        refine_config(**overrides)


def test_bad_data_is_refused(build, rows, train_rows, trusted):
    cases = [
        ({"validation": trusted.select(range(12))}, "too few to split"),
        ({"train": Dataset.from_list([{"text": "a"}] * 20)}, "has no column 'prompt'"),
        ({"train": train_rows.add_column("data_weight", [-1.0] * 40)}, "`data_weight`"),
        ({"prompt_dataset": train_rows.select_columns(["prompt"])}, "lowest_weight"),
        ({"selection_dataset": trusted.select(range(3))}, "select the model"),
    ]
    for overrides, message in cases:
        with pytest.raises(ValueError, match=message):
            build(**overrides)
    with pytest.raises(TypeError, match="`train_dataset` must be"):
        build(train=rows)


def test_vllm_and_templates_that_are_missing(build, refine_config, tiny_model, train_rows, trusted, tokenizer):
    with pytest.raises(ImportError, match="vLLM is not installed"):
        build(use_vllm=True)
    bare = tokenizer.__class__(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>", pad_token="<|pad|>"
    )
    chats = Dataset.from_list(
        [{"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}] * 40
    )
    with pytest.raises(ValueError, match="chat template"):
        SelfRefineTrainer(tiny_model(), refine_config(), chats, trusted, processing_class=bare)


def test_reward_functions_are_not_taken(refine_config, tiny_model, train_rows, trusted, tokenizer):
    with pytest.raises((ValueError, TypeError), match="reward_funcs"):
        SelfRefineTrainer(
            tiny_model(),
            refine_config(),
            train_rows,
            trusted,
            processing_class=tokenizer,
            reward_funcs=lambda **_: [1],
        )
