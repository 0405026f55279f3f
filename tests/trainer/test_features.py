"""What a user asks of the trainer beyond a loss curve."""

import dataclasses
import json

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig

from tests.conftest import base_arguments, losses, parameters
from trl_bilevel import BilevelSFTConfig, BilevelSFTTrainer


@pytest.fixture
def build(tiny_model, config, train_rows, validation_rows, tokenizer):
    def make(train=train_rows, validation=validation_rows, adapter=False, **overrides):
        return BilevelSFTTrainer(
            tiny_model(),
            config(**overrides),
            train_dataset=train,
            validation_dataset=validation,
            processing_class=tokenizer,
            peft_config=LoraConfig(r=4, target_modules="all-linear") if adapter else None,
        )

    return make


def token_losses(model, tokenizer, rows):
    """Summed loss and token count of each row, row by row, without the trainer."""
    out = []
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = tokenizer(row["prompt"] + row["completion"] + tokenizer.eos_token)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        scored = range(len(prompt), len(ids))
        out.append((-sum(float(logits[t - 1, ids[t]]) for t in scored), len(scored)))
    return out


@pytest.mark.compat
def test_first_loss_is_the_objective_computed_by_hand(build, tiny_model, tokenizer, train_rows, validation_rows):
    weight = 0.3
    trainer = build(
        train=train_rows.select(range(8)),
        validation=validation_rows.select(range(8)),
        selector_weighting="loss",
        validation_loss_weight=weight,
        max_steps=1,
    )
    trainer.train()
    # A quarter as many trusted rows as training rows.
    (draws,) = trainer._objective.trusted.draws.values()
    drawn = draws.rows(0)
    assert len(drawn) == 2
    trusted = validation_rows.select(drawn)
    train = token_losses(tiny_model(), tokenizer, trainer.data.rows)
    validation = token_losses(tiny_model(), tokenizer, trusted)
    weights = trainer.sample_weights().tolist()
    expected = (
        (1 - weight)
        * sum(w * s for w, (s, _) in zip(weights, train, strict=True))
        / sum(w * n for w, (_, n) in zip(weights, train, strict=True))
    )
    expected += weight * sum(s for s, _ in validation) / sum(n for _, n in validation)
    assert losses(trainer)[0] == pytest.approx(expected, abs=2e-4)
    assert trainer.state.log_history[0]["validation_loss"] == pytest.approx(
        sum(s / n for s, n in validation) / 2, abs=1e-4
    )


def test_row_losses_are_per_row_means(build, tiny_model, tokenizer, train_rows):
    trainer = build()
    expected = [s / n for s, n in token_losses(tiny_model(), tokenizer, train_rows)]
    torch.testing.assert_close(trainer.row_losses(train_rows), torch.tensor(expected), atol=1e-4, rtol=1e-4)


def test_weights_have_mean_one_and_rank_as_exported(build, train_rows, tmp_path):
    trainer = build()
    trainer.train()
    weights = trainer.sample_weights()
    assert weights.dtype == torch.float32 and weights.shape == (40,)
    assert float(weights.mean()) == pytest.approx(1, abs=1e-5)
    table = trainer.weighted_dataset()
    assert table.column_names == [*train_rows.column_names, "sample_id", "data_weight", "data_rank"]
    assert table["prompt"][:] == train_rows["prompt"][:]
    assert table["sample_id"][:] == list(range(40))
    torch.testing.assert_close(torch.tensor(table["data_weight"][:]), weights)
    best = trainer.weighted_dataset(top_k=5)
    assert sorted(best["data_rank"]) == list(range(5))
    assert min(best["data_weight"]) >= sorted(weights.tolist())[-5] - 1e-6
    table.to_parquet(tmp_path / "weighted.parquet")
    again = Dataset.from_parquet(str(tmp_path / "weighted.parquet"))
    assert again["data_weight"][:] == table["data_weight"][:]
    with pytest.raises(ValueError, match="`top_k` must lie between 1 and"):
        trainer.weighted_dataset(top_k=41)


def test_resampling_visits_rows_by_weight(build):
    trainer = build(max_steps=5)
    number = {tuple(ids): n for n, ids in enumerate(trainer.rows.dataset["input_ids"])}
    assert len(number) == 40
    seen = []
    original = trainer.compute_loss

    def watch(model, inputs, *args, **kwargs):
        # Batches are TRL's own: nothing in them says which rows they are.
        rows = zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        seen.extend(number[tuple(ids[mask.bool()].tolist())] for ids, mask in rows)
        return original(model, inputs, *args, **kwargs)

    trainer.compute_loss = watch
    trainer.train()
    visits = torch.bincount(torch.tensor(seen), minlength=40)
    assert len(seen) == 40
    assert ((visits - trainer.sample_weights()).abs() < 1 + 1e-4).all()


def test_groups_share_a_weight(build, train_rows):
    sources = ["web" if i % 3 else "books" for i in range(40)]
    trainer = build(
        train=train_rows.add_column("source", sources),
        selector_group_column="source",
    )
    trainer.train()
    weights = trainer.sample_weights()
    by_source = {name: {float(w) for w, s in zip(weights, sources, strict=True) if s == name} for name in set(sources)}
    assert all(len(values) == 1 for values in by_source.values())
    assert float(weights.mean()) == pytest.approx(1, abs=1e-5)
    shares = {k: v for k, v in trainer.state.log_history[-2].items() if k.startswith("selector/share/")}
    assert set(shares) == {"selector/share/web", "selector/share/books"}
    assert sum(shares.values()) == pytest.approx(1)


def test_a_group_has_the_mean_weight_of_its_rows(build, train_rows):
    alone = build()
    alone.choose_weights()
    grouped = build(
        train=train_rows.add_column("source", [i % 4 for i in range(40)]),
        selector_group_column="source",
    )
    grouped.choose_weights()
    expected = alone.sample_weights().view(10, 4).mean(0).repeat(10)
    torch.testing.assert_close(grouped.sample_weights(), expected, atol=1e-4, rtol=1e-4)


def test_several_validation_sets(build, validation_rows):
    sets = {"a": validation_rows.select(range(10)), "b": validation_rows.select(range(10, 20))}
    trainer = build(validation=sets, validation_weights={"a": 3.0, "b": 1.0})
    trainer.train()
    loss = trainer.validation_loss()
    assert loss["total"] == pytest.approx(0.75 * loss["a"] + 0.25 * loss["b"])


def test_filter_rate_shuts_the_gate(build):
    trainer = build(filter_rate=0.5)
    trainer.train()
    weights = trainer.sample_weights()
    assert 15 <= int((weights == 0).sum()) <= 20
    assert float(weights.mean()) == pytest.approx(1, abs=1e-4)


def test_rows_without_a_scored_token_have_no_weight(build, train_rows, tokenizer):
    data = train_rows.map(lambda row: {"input_ids": tokenizer(row["prompt"] + row["completion"])["input_ids"]})
    labels = [[-100] * len(ids) if i in (3, 9) else ids for i, ids in enumerate(data["input_ids"])]
    trainer = build(train=data.select_columns("input_ids").add_column("labels", labels), max_length=None)
    trainer.train()
    weights = trainer.sample_weights()
    assert torch.isnan(weights).nonzero().squeeze(1).tolist() == [3, 9]


def test_row_losses_keep_the_order_of_the_rows(build, train_rows):
    torch.testing.assert_close(
        build(shuffle_dataset=True).row_losses(train_rows), build().row_losses(train_rows), atol=1e-5, rtol=1e-5
    )


def test_statistics_are_logged(build):
    trainer = build(validation_loss_weight=0.5)
    trainer.train()
    first = trainer.state.log_history[0]
    for key in ("validation_loss", "selector/ess", "selector/score_mean", "selector/score_std"):
        assert isinstance(first[key], float), key
    quantiles = [first[f"selector/weight_q{q:02d}"] for q in (5, 25, 50, 75, 95)]
    assert quantiles == sorted(quantiles)
    weights = trainer.sample_weights()
    assert first["selector/ess"] == pytest.approx(float(weights.sum() ** 2 / (weights**2).sum() / 40), rel=1e-4)


def test_lambda_zero_trains_on_no_validation_row(build, train_rows):
    """The model's parameters do not depend on the validation rows where weights are given."""
    settings = {"weight_estimator": "none", "validation_loss_weight": 0.0, "selector_weighting": "resample"}
    weighted = train_rows.add_column("data_weight", [n / 20 for n in range(40)])
    first = build(train=weighted, **settings)
    second = build(train=weighted, validation=train_rows.map(lambda r: {"completion": "x " + r["prompt"]}), **settings)
    first.train()
    second.train()
    assert all(torch.equal(a, b) for a, b in zip(parameters(first), parameters(second), strict=True))


def test_choosing_leaves_the_model_as_it_was(build, tiny_model):
    trainer = build()
    trainer.choose_weights()
    fresh = tiny_model().to(trainer.model.device)
    assert all(torch.equal(a, b) for a, b in zip(parameters(trainer), fresh.parameters(), strict=True))
    assert all(p.grad is None for p in trainer.model.parameters())


def test_a_plain_config_is_taken(tiny_model, train_rows, validation_rows, tokenizer, tmp_path):
    trainer = BilevelSFTTrainer(
        tiny_model(),
        SFTConfig(**base_arguments(tmp_path)),
        train_dataset=train_rows,
        validation_dataset=validation_rows,
        processing_class=tokenizer,
    )
    assert isinstance(trainer.args, BilevelSFTConfig)
    assert trainer.args.weight_estimator == "probe"


def test_the_validation_term_is_small(build):
    """A quarter as many trusted rows as training rows in every step."""
    trainer = build(validation_loss_weight=0.5)
    sizes = []
    training_step = trainer.training_step

    def step(model, inputs, *args):
        loss = training_step(model, inputs, *args)
        sizes.append([len(joined["input_ids"]) for joined in trainer._step.inputs])
        return loss

    trainer.training_step = step
    trainer.train()
    assert sizes == [[10]] * 6


def test_presets_set_what_they_say(config):
    balanced, fast, reliable = (config(selector_preset=name) for name in ("balanced", "fast", "reliable"))
    assert balanced == dataclasses.replace(config(), selector_preset="balanced")
    assert (balanced.weight_estimator, balanced.matches) == ("probe", True)
    assert (fast.weight_estimator, fast.matches) == ("probe", False)
    assert (reliable.weight_estimator, reliable.matches) == ("both", True)
    assert (balanced.selector_weighting, balanced.validation_loss_weight) == ("resample", 0.0)
    for name in ("paper", "seal", "sparse_centred"):
        moving = config(selector_preset=name)
        assert (moving.published, moving.selector_weighting, moving.validation_loss_weight) == (True, "loss", 0.5)
    # What is given by its own name wins.
    assert config(selector_preset="fast", weight_estimator="value_function").weight_estimator == "value_function"
    assert config(selector_preset="seal", validation_loss_weight=0.2).validation_loss_weight == 0.2


@pytest.mark.compat
def test_saved_files(build, tmp_path):
    trainer = build(adapter=True, save_strategy="steps", save_steps=3)
    trainer.train()
    trainer.save_model()
    for folder in (tmp_path / "out", tmp_path / "out" / "checkpoint-3"):
        assert (folder / "weights.safetensors").is_file()
        assert json.loads((folder / "weights.json").read_text())["identity"]["rows"] == 40
    assert not list((tmp_path / "out").rglob(".*.tmp"))
    assert "2511.21056" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_bf16_trains(build, adapter):
    trainer = build(adapter=adapter, bf16=True)
    trainer.train()
    assert torch.isfinite(torch.tensor(losses(trainer))).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_trains(build):
    trainer = build(adapter=True, use_cpu=False, bf16=True)
    trainer.train()
    assert torch.isfinite(torch.tensor(losses(trainer))).all()
    assert torch.isfinite(trainer.sample_weights()).all()


def test_the_model_card_tells_of_the_selection(build, tmp_path):
    trainer = build(hub_token="hf_secretsecretsecret")
    trainer.train()
    for _ in range(2):
        # Written anew at each checkpoint: one section, not one more each time.
        trainer.create_model_card(model_name="out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.count("## Data selection") == 1 and "| `probe` |" in card
    assert card.index("## Data selection") < card.index("## Citations")
    assert f"| validation loss, step {trainer.state.global_step} |" in card
    assert "arXiv:2511.21056" in card and "hf_secret" not in card
    assert trainer.rows.dataset[0]["input_ids"] and "What does" not in card
