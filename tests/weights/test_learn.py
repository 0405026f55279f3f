"""`learn_weights`: a function of model, rows, trusted rows and settings; what it refuses, and what it gives back."""

import json

import pytest
import torch
from datasets import Dataset, DatasetDict, load_dataset
from peft import LoraConfig, get_peft_model
from sklearn.metrics import roc_auc_score

from tests.weights.conftest import LAZY
from trl_bilevel import RowWeights, WeightSettings, learn_weights
from trl_bilevel.core.statistics import effective_sample_size

QUICK = {"max_length": 128, "disable_tqdm": True}
PILOT = {"weight_estimator": "value_function", "pilot_steps": 8, "pilot_learning_rate": 1e-2}


@pytest.fixture
def learn(tiny_model, tokenizer, mixed, rows):
    def run(train=mixed, trusted=None, model=None, **settings):
        trusted = rows[40:60] if trusted is None else trusted
        as_rows = lambda given: Dataset.from_list(given) if isinstance(given, list) else given  # noqa: E731
        sets = {k: as_rows(v) for k, v in trusted.items()} if type(trusted) is dict else as_rows(trusted)
        return learn_weights(
            tiny_model() if model is None else model,
            as_rows(train),
            sets,
            processing_class=tokenizer,
            **(QUICK | settings),
        )

    return run


def test_weights_scores_and_facts(learn, mixed):
    found = learn()
    assert isinstance(found, RowWeights) and len(found) == len(mixed)
    for values in (found.values, found.scores):
        assert values.dtype == torch.float32 and values.shape == (80,) and values.device.type == "cpu"
        assert bool(torch.isfinite(values).all())
    assert float(found.values.mean()) == pytest.approx(1, abs=1e-5) and float(found.values.min()) >= 0
    assert roc_auc_score([n % 2 == 0 for n in range(80)], found.values) > 0.9
    for name in (
        "model",
        "settings",
        "rows",
        "rows_kept",
        "fingerprint",
        "validation",
        "versions",
        "steps",
        "seconds",
    ):
        assert name in found.facts, name
    assert found.facts["steps"] == 0 and found.facts["rows_scored"] == 80
    json.dumps(found.facts)
    assert LAZY not in json.dumps(found.facts) and mixed[0]["completion"] not in json.dumps(found.facts)


def test_the_same_arguments_give_the_same_bits(learn):
    first, second, other = learn(), learn(), learn(seed=1)
    assert torch.equal(first.values, second.values) and torch.equal(first.scores, second.scores)
    assert not torch.equal(first.values, other.values)
    torch.rand(7)
    assert torch.equal(learn().values, first.values)


@pytest.mark.parametrize("settings", [{}, PILOT, PILOT | {"weight_estimator": "both"}], ids=["probe", "pilot", "both"])
def test_permuted_rows_give_permuted_weights(settings, learn, mixed):
    order = torch.randperm(len(mixed), generator=torch.Generator().manual_seed(3)).tolist()
    first, second = learn(**settings), learn([mixed[n] for n in order], **settings)
    assert torch.equal(second.values, first.values[order])
    assert torch.equal(second.scores.nan_to_num(9.0), first.scores[order].nan_to_num(9.0))


def test_the_model_is_left_as_it_was(learn, tiny_model):
    model = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.2)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wanted = [p.requires_grad for p in model.parameters()]
    state = torch.get_rng_state()
    learn(model=model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == wanted and model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


def test_the_same_for_a_plain_model_and_with_a_fresh_adapter(learn, tiny_model):
    adapted = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules="all-linear"))
    assert torch.equal(learn(model=adapted).values, learn().values)


def test_models_by_folder(learn, tiny_model, tokenizer, tmp_path, mixed, rows):
    tiny_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    named = learn_weights(
        str(tmp_path / "model"), Dataset.from_list(mixed), Dataset.from_list(rows[40:60]), **QUICK, bf16=False
    )
    assert torch.equal(named.values, learn().values)
    assert named.facts["model"] == "model"


def test_settings_as_a_whole_and_by_name(learn):
    settings = WeightSettings(filter_rate=0.25)
    whole = learn(settings=settings)
    assert torch.equal(whole.values, learn(filter_rate=0.25).values)
    assert torch.equal(learn(settings=settings, filter_rate=0.0).values, learn().values)
    # What the caller gave is not filled in.
    assert settings == WeightSettings(filter_rate=0.25)
    # Rows of the same weight are treated alike.
    assert 10 < int((whole.values == 0).sum()) <= 20
    assert float(whole.values.mean()) == pytest.approx(1, abs=1e-5)


def test_dropped_rows_have_no_weight(learn, mixed):
    """Rows whose prompts fill `max_length`: NaN, missing in the export; all others are as without them."""
    long = {"prompt": "long " * 200, "completion": "x"}
    data = [long, *mixed[:40], long, *mixed[40:], long]
    found = learn(data)
    assert found.values.isnan().nonzero().flatten().tolist() == [0, 41, 82]
    kept = ~found.values.isnan()
    assert torch.equal(found.values[kept], learn().values)
    table = found.to_dataset()
    assert table["data_weight"][0] is None and len(found.to_dataset(top_k=82)) == 80


def test_groups_share_their_mean(learn, mixed):
    sources = ["abc"[n % 3] for n in range(80)]
    alone = learn()
    data = [row | {"source": source} for row, source in zip(mixed, sources, strict=True)]
    grouped = learn(data, selector_group_column="source")
    for name in "abc":
        places = [n for n, source in enumerate(sources) if source == name]
        assert len(set(grouped.values[places].tolist())) == 1
        assert float(grouped.values[places[0]]) == pytest.approx(float(alone.values[places].mean()), rel=1e-5)
    assert float(grouped.values.mean()) == pytest.approx(1, abs=1e-5)


def test_sharper_weights_are_fewer(learn):
    sizes = [effective_sample_size(learn(calibration_sharpness=sharpness).values) for sharpness in (0.0, 0.5, 1, 5)]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 0.99


def test_several_trusted_sets_with_weights(learn, rows, mixed):
    good = rows[40:60]
    lazy = [row | {"completion": LAZY} for row in rows[100:120]]
    found = {}
    for weight in (0.0, 1.0):
        sets = {"good": good, "lazy": lazy}
        weights = {"good": 1 - weight, "lazy": weight}
        found[weight] = learn(trusted=sets, validation_weights=weights)
    shares = [float(found[w].values[::2].sum() / 80) for w in (0.0, 1.0)]
    assert shares[0] > 0.95 and shares[1] < 0.05
    told = found[0.0].facts["validation"]
    assert told == {"good": {"rows": 20, "weight": 1.0}, "lazy": {"rows": 20, "weight": 0.0}}
    # Equal by default.
    assert learn(trusted=sets).facts["validation"]["lazy"]["weight"] == 0.5


def test_equal_weights_without_an_estimator(learn, mixed):
    found = learn([*mixed[:20], {"prompt": "long " * 200, "completion": "x"}], weight_estimator="none")
    assert found.values[:20].tolist() == [1.0] * 20 and bool(found.values[20].isnan())
    assert bool(found.scores.isnan().all())


def test_columns_of_an_earlier_choice_are_replaced(learn, mixed, caplog):
    first = learn()
    again = learn(first.to_dataset())
    assert torch.equal(first.values, again.values) and "are replaced" in caplog.text
    assert again.to_dataset().column_names.count("data_weight") == 1


def test_the_export(learn, mixed):
    found = learn()
    table = found.to_dataset()
    assert table.column_names == ["prompt", "completion", "sample_id", "data_weight", "data_rank"]
    assert table["completion"][:] == [row["completion"] for row in mixed]
    torch.testing.assert_close(torch.tensor(table["data_weight"][:]), found.values)
    order = torch.argsort(torch.tensor(table["data_rank"][:]))
    assert bool((found.values[order].diff() <= 0).all())
    best = found.to_dataset(top_k=5)
    assert sorted(best["data_rank"]) == list(range(5)) and best["sample_id"][:] == sorted(best["sample_id"])
    for odd in (0, 81):
        with pytest.raises(ValueError, match="`top_k`"):
            found.to_dataset(top_k=odd)


def test_save_and_load(learn, mixed, tmp_path):
    found = learn()
    found.save(tmp_path / "weights")
    names = {file.name for file in (tmp_path / "weights").iterdir()}
    assert names == {"weights.safetensors", "weights.json"}
    text = (tmp_path / "weights" / "weights.json").read_text()
    assert mixed[0]["completion"] not in text and LAZY not in text
    again = RowWeights.load(tmp_path / "weights", Dataset.from_list(mixed))
    assert torch.equal(again.values, found.values)
    assert torch.equal(again.scores.nan_to_num(9.0), found.scores.nan_to_num(9.0))
    assert again.facts == json.loads(json.dumps(found.facts, default=str))
    assert again.to_dataset().to_dict() == found.to_dataset().to_dict()
    with pytest.raises(ValueError, match=r"RowWeights\.load\(folder, rows\)"):
        RowWeights.load(tmp_path / "weights").to_dataset()


def test_files_that_cannot_be_loaded(learn, mixed, tmp_path):
    folder = tmp_path / "weights"
    with pytest.raises(FileNotFoundError, match="has no weights"):
        RowWeights.load(folder)
    found = learn()
    found.save(folder)
    with pytest.raises(ValueError, match="80 other rows than the 79 given"):
        RowWeights.load(folder, Dataset.from_list(mixed[1:]))
    changed = [mixed[0] | {"completion": "other"}, *mixed[1:]]
    with pytest.raises(ValueError, match="of 80 other rows"):
        RowWeights.load(folder, Dataset.from_list(changed))
    told = json.loads((folder / "weights.json").read_text())
    (folder / "weights.json").write_text(json.dumps(told | {"format": 2}))
    with pytest.raises(ValueError, match="format 2, this version reads 1"):
        RowWeights.load(folder)
    for name in ("weights.json", "weights.safetensors"):
        found.save(folder)
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match="are damaged"):
            RowWeights.load(folder)
    for name, content in (("weights.json", "[]"), ("weights.json", '{"format": 1}')):
        found.save(folder)
        (folder / name).write_text(content)
        with pytest.raises(ValueError, match="damaged"):
            RowWeights.load(folder)


REFUSED = {
    "unknown estimator": ({"weight_estimator": "magic"}, ValueError, "`weight_estimator` must be one of.*'magic'"),
    "estimator that is gone": ({"weight_estimator": "alignment"}, ValueError, "'alignment'` is gone.*Use"),
    "published estimator": ({"weight_estimator": "loss"}, ValueError, "`selector_preset='seal'`"),
    "published preset": ({"selector_preset": "seal"}, ValueError, "`selector_preset='seal'`.*BilevelSFTTrainer"),
    "unknown preset": ({"selector_preset": "mine"}, ValueError, "`selector_preset` must be one of.*'mine'"),
    "no steps": (
        {"pilot_steps": 0, "weight_estimator": "both"},
        ValueError,
        "`pilot_steps` must be at least 1, got 0",
    ),
    "odd rate": ({"pilot_learning_rate": float("inf")}, ValueError, "`pilot_learning_rate` must be a finite number"),
    "negative sharpness": ({"calibration_sharpness": -1.0}, ValueError, "`calibration_sharpness` must be"),
    "steps without a pilot": ({"pilot_steps": 3}, ValueError, "`pilot_steps=3` has no meaning"),
    "setting that is gone": ({"pilot_scored_rows": 8}, TypeError, "`pilot_scored_rows` is gone"),
    "all filtered": ({"filter_rate": 1.0}, ValueError, r"`filter_rate` must lie in \[0, 1\), got 1.0"),
    "unknown setting": ({"pilot_step": 3}, TypeError, "pilot_step"),
    "no rows": ({"train": []}, ValueError, "`train_dataset` is empty"),
    "rows of another kind": ({"train": "rows.jsonl"}, TypeError, "`train_dataset` must be.*got `str`.*from_list"),
    "a dict of splits": ({"train": "splits"}, TypeError, "`DatasetDict` of .*pick one"),
    "no trusted rows": ({"trusted": []}, ValueError, "`validation_dataset` 'validation' is empty"),
    "no set of trusted rows": ({"trusted": {}}, ValueError, "empty dict"),
    "seven trusted rows": ({"trusted": 7}, ValueError, "has 7 usable rows; at least 8.*Give more trusted rows"),
    "unknown columns": ({"train": "odd"}, ValueError, r"`train_dataset` has the columns \['question'\].*Rename"),
    "unknown trusted columns": ({"trusted": "odd"}, ValueError, r"`validation_dataset` 'validation' has the columns"),
    "missing answer": ({"train": "hole"}, ValueError, r"`completion` of `train_dataset` is missing.*\[3\].*filter"),
    "trusted chats": ({"trusted": "chats"}, ValueError, r"`validation_dataset` 'validation'.*\['messages'\].*Split"),
    "unknown group column": ({"selector_group_column": "site"}, ValueError, "`selector_group_column='site'` is not"),
    "weights of no set": ({"validation_weights": {"a": 1.0}}, ValueError, "`validation_weights=.*'validation'"),
    "nothing to learn": ({"max_length": 4}, ValueError, "None of the 80 training rows.*`max_length`"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name, learn, mixed, rows):
    given, error, message = REFUSED[name]
    given = dict(given)
    odd = {
        "odd": [{"question": row["prompt"]} for row in mixed],
        "hole": [row | {"completion": None if n == 3 else row["completion"]} for n, row in enumerate(mixed)],
        "chats": [{"messages": [{"role": "user", "content": row["prompt"]}]} for row in mixed],
        "splits": DatasetDict({"train": Dataset.from_list(mixed)}),
    }
    for argument in ("train", "trusted"):
        value = given.get(argument)
        if isinstance(value, str):
            given[argument] = odd.get(value, value)
        if isinstance(value, int):
            given[argument] = rows[40 : 40 + value]
        if value == []:
            given[argument] = Dataset.from_list(mixed).select([])
    with pytest.raises(error, match=message):
        learn(**given)


def test_eight_trusted_rows_suffice(learn, rows):
    found = learn(trusted=rows[40:48])
    assert bool(found.values.isfinite().all())


def test_the_only_set_that_counts_has_one_row(learn, rows):
    with pytest.raises(ValueError, match=r"Every set .* that counts"):
        learn(trusted={"a": rows[40:41], "b": rows[41:60]}, validation_weights={"a": 1.0, "b": 0.0})


def test_rows_on_both_sides_are_told(learn, mixed, rows):
    with pytest.warns(UserWarning, match="3 of 23 rows of `validation_dataset` 'validation' are also training rows"):
        learn(trusted=[*rows[40:60], *mixed[::2][:3]])


def test_a_row_that_cannot_be_scored_is_named(learn, mixed, tiny_model, tokenizer):
    from trl_bilevel import NonFiniteScoreError

    data = [dict(row) for row in mixed]
    data[17]["completion"] += "\u00ff"
    token = tokenizer("\u00ff")["input_ids"][-1]
    model = tiny_model()

    def poison(module, inputs, output):
        return torch.where((inputs[0] == token).unsqueeze(-1) & (not torch.is_grad_enabled()), torch.nan, output)

    model.get_input_embeddings().register_forward_hook(poison)
    with pytest.raises(NonFiniteScoreError, match=r"training rows \(sample_id\) \[17\].*Look at these rows, or use"):
        learn(data, model=model)
    with pytest.raises(NonFiniteScoreError, match=r"training rows \(sample_id\) \[17\].*`pilot_learning_rate`"):
        learn(data, model=model, **PILOT)


def test_rows_in_another_format(learn, mixed, rows):
    plain = learn()
    for format in ("torch", "numpy"):
        train, trusted = (Dataset.from_list(each).with_format(format) for each in (mixed, rows[40:60]))
        assert torch.equal(learn(train, trusted).values, plain.values)
    texts = learn(Dataset.from_list(mixed).map(lambda row: {"more": 1}))
    assert torch.equal(texts.values, plain.values)


def test_rows_from_a_file(learn, mixed, tmp_path):
    Dataset.from_list(mixed).to_json(tmp_path / "rows.jsonl")
    read = load_dataset("json", data_files=str(tmp_path / "rows.jsonl"), split="train", cache_dir=str(tmp_path / "c"))
    assert torch.equal(learn(read).values, learn().values)


@pytest.mark.parametrize("seed", range(4))
def test_no_signal_in_no_weight_out(seed, learn, rows):
    """Trusted rows drawn like the training rows."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    drawn = [rows[n] for n in order]
    found = learn(drawn[:80], drawn[80:], seed=seed)
    size = effective_sample_size(found.values)
    print(seed, size)
    assert size > 0.8
