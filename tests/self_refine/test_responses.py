"""Responses and the step that trains on them: scores, weights, tokens, ratios, the gradient."""

import pandas as pd
import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback

from tests.conftest import first_ratios, watch_first_step
from trl_bilevel import SelfRefineTrainer
from trl_bilevel.core.implicit import implicit_weights, question_weights


def test_rewards_are_implicit_weights_of_the_chosen_questions(build, tmp_path):
    trainer = build(num_rounds=1, question_fraction=0.25)
    trainer.train()
    table = pd.read_parquet(tmp_path / "out" / "_rows" / "responses" / "round-0000.parquet")
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
                rows = [
                    {"input_ids": [*p, *c], "labels": [-100] * len(p) + list(c), "sample_id": -1}
                    for p, c in zip(prompt_ids, completion_ids, strict=True)
                ]
                found["losses"] = self._reader().row_losses(self.rows.collate(rows)).sums
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
    found = watch_first_step(trainer)
    trainer.train()
    ratios = first_ratios(found)
    assert len(found["ids"]) == 4 and len(ratios) > 4
    assert float((ratios - 1).abs().max()) < 1e-5


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
    offline = trainer.rows.batch(trainer.offline.places(0))
    draws = trainer.trusted.samplers(len(offline["labels"]), trainer.args.seed)
    trusted_rows = trainer.trusted.batch([("validation", place) for place in draws["validation"].rows(0)])
    assert len(offline["labels"]) == len(trusted_rows["labels"]) == 8
    objective = lam * mean([trusted_rows]) + (1 - lam) * ((1 - rho) * mean([offline]) + rho * policy)
    assert float(data["advantages"].abs().max()) > 0.1
    parameters_ = [p for p in trainer.model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(objective, parameters_)
    for one, other in zip(found["gradients"], expected, strict=True):
        torch.testing.assert_close(one, other, atol=2e-6, rtol=2e-3)


def test_weights_that_hardly_differ_are_warned_of(build, caplog):
    trainer = build(num_rounds=1, implicit_weight_temperature=100.0)
    trainer.train()
    assert "hardly differ" in caplog.text and "`implicit_weight_temperature` is 100" in caplog.text
    assert trainer.ledger[0]["weight_std_within_group"] < 0.1


@pytest.mark.parametrize("bf16", [False, True])
def test_continuous_batching_generates(build, bf16, tmp_path):
    # By default its cache takes most of the machine's memory.
    cache = {"num_blocks": 64, "max_batch_tokens": 256}
    trainer = build(
        use_transformers_continuous_batching=True,
        transformers_continuous_batching_config=cache,
        num_rounds=1,
        bf16=bf16,
    )
    dtypes = {name: p.dtype for name, p in trainer.model.named_parameters()}
    before = [p.detach().clone() for p in trainer.model.parameters() if not p.requires_grad]
    trainer.train()
    assert {name: p.dtype for name, p in trainer.model.named_parameters()} == dtypes
    after = [p for p in trainer.model.parameters() if not p.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    table = pd.read_parquet(tmp_path / "out" / "_rows" / "responses" / "round-0000.parquet")
    assert len(table) == 16 and table["score"].notna().all() and table["tokens"].between(1, 10).all()
