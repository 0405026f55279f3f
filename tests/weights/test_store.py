"""Notes on the way: a choice that is killed goes on, to the same bits, and only from notes of its own."""

import dataclasses

import pytest
import torch
from datasets import Dataset

from tests.weights.conftest import make_model
from trl_bilevel import learn_weights
from trl_bilevel.weights import choose as choosing
from trl_bilevel.weights import store as storing
from trl_bilevel.weights.pilot import Pilot
from trl_bilevel.weights.store import Store

PILOT = {"weight_estimator": "value_function", "pilot_steps": 2}


class Killed(Exception):
    pass


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    """A note after every batch of 8 rows."""
    monkeypatch.setattr(storing, "PAUSE", -1.0)
    monkeypatch.setattr(choosing, "BATCH_ROWS", 8)


@pytest.fixture
def learn(tokenizer, mixed, rows):
    def run(folder, train=mixed, trusted=rows[40:60], model=None, **settings):
        return learn_weights(
            make_model("llama", tokenizer) if model is None else model,
            Dataset.from_list(train),
            Dataset.from_list(trusted),
            processing_class=tokenizer,
            work_dir=folder,
            **(PILOT | {"max_length": 128, "disable_tqdm": True} | settings),
        )

    return run


@pytest.fixture
def counted(monkeypatch):
    """Batches that were scored, and pilots that were trained; killed where `limit` of them are."""
    calls = {"scores": 0, "trained": 0, "limit": None}
    scores, train = Pilot.scores, Pilot.train

    def counting(self, batch):
        if bool((batch["sample_id"] >= 0).all()):
            if calls["scores"] == calls["limit"]:
                raise Killed
            calls["scores"] += 1
        return scores(self, batch)

    def training(self, *args):
        calls["trained"] += 1
        return train(self, *args)

    monkeypatch.setattr(Pilot, "scores", counting)
    monkeypatch.setattr(Pilot, "train", training)
    return calls


def killed(learn, folder, counted, after, **settings):
    counted.update(scores=0, trained=0, limit=after)
    with pytest.raises(Killed):
        learn(folder, **settings)
    counted.update(scores=0, trained=0, limit=None)


def same(first, second):
    assert torch.equal(first.values, second.values)
    assert torch.equal(first.scores.nan_to_num(9.0), second.scores.nan_to_num(9.0))


@pytest.mark.parametrize("after", [0, 1, 7, 9])
def test_a_killed_choice_goes_on(after, learn, counted, tmp_path):
    whole = learn(None)
    assert counted["scores"] == 10
    killed(learn, tmp_path / "notes", counted, after)
    assert (tmp_path / "notes" / "pilot.safetensors").is_file()
    again = learn(tmp_path / "notes")
    assert counted["scores"] == 10 - after and counted["trained"] == 0
    same(whole, again)
    assert not (tmp_path / "notes").exists()


def test_killed_twice(learn, counted, tmp_path):
    whole = learn(None)
    killed(learn, tmp_path, counted, 3)
    killed(learn, tmp_path, counted, 4)
    again = learn(tmp_path)
    assert counted["scores"] == 3
    same(whole, again)


@pytest.mark.parametrize(
    "change",
    [
        {"train": "other"},
        {"train": "permuted"},
        {"trusted": "other"},
        {"pilot_steps": 9},
        {"pilot_learning_rate": 2e-3},
        {"weight_estimator": "both"},
        {"seed": 5},
        {"max_length": 100},
        {"model": "trained"},
        {"bf16": True},
    ],
    ids=lambda change: "-".join(map(str, next(iter(change.items())))),
)
def test_notes_of_another_run_are_not_used(change, learn, counted, tmp_path, mixed, rows, tokenizer, caplog):
    model = make_model("llama", tokenizer)
    model.lm_head.weight.data += 1e-3
    values = {
        ("train", "other"): [mixed[0] | {"completion": "Another answer."}, *mixed[1:]],
        ("train", "permuted"): mixed[::-1],
        ("trusted", "other"): rows[41:61],
        ("model", "trained"): model,
    }
    change = {name: values.get((name, value), value) for name, value in change.items()}
    whole = learn(None, **change)
    killed(learn, tmp_path, counted, 7)
    again = learn(tmp_path, **change)
    assert (counted["scores"], counted["trained"]) == (10, 1)
    assert "choosing starts from the beginning" in caplog.text
    same(whole, again)


@pytest.mark.parametrize("damage", ["cut", "empty", "text"])
@pytest.mark.parametrize("name", ["pilot", "pilot-scores-0"])
def test_damaged_notes_are_not_used(name, damage, learn, counted, tmp_path):
    whole = learn(None)
    killed(learn, tmp_path, counted, 7)
    file = tmp_path / f"{name}.safetensors"
    content = file.read_bytes()
    file.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "text": b"no tensors at all"}[damage])
    again = learn(tmp_path)
    assert (counted["scores"], counted["trained"]) == ((3, 1) if name == "pilot" else (10, 0))
    same(whole, again)


def test_a_changed_pilot_is_not_mixed_with_scores_of_another(learn, counted, tmp_path):
    """Without its pilot, scores that were noted are those of the same pilot, trained again."""
    whole = learn(None)
    killed(learn, tmp_path, counted, 7)
    (tmp_path / "pilot.safetensors").unlink()
    same(whole, learn(tmp_path))


def test_nothing_is_kept_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = Store(None, {})
    store.write("a", {"x": torch.zeros(1)})
    assert store.read("a") is None and not list(tmp_path.iterdir())
    store.remove()


def test_a_store(tmp_path, monkeypatch):
    store = Store(tmp_path / "a", {"rows": 3})
    assert store.read("x") is None
    store.write("x", {"value": torch.arange(3)})
    assert store.read("x")["value"].tolist() == [0, 1, 2]
    assert Store(tmp_path / "a", {"rows": 3}).read("x") is not None
    assert Store(tmp_path / "a", {"rows": 4}).read("x") is None
    monkeypatch.setattr(storing, "PAUSE", 1e9)
    store.write("x", {"value": torch.zeros(1)}, pause=True)
    assert store.read("x")["value"].tolist() == [0, 1, 2]
    store.write("x", {"value": torch.zeros(1)})
    assert store.read("x")["value"].tolist() == [0]
    (tmp_path / "a" / "x.safetensors").rename(tmp_path / "a" / "pilot.safetensors")
    store.remove()
    assert not (tmp_path / "a").exists()


def test_removing_notes_leaves_other_files(tmp_path):
    """`work_dir` is the user's, who may keep other things there."""
    (tmp_path / "mine.txt").write_text("keep")
    (tmp_path / "model.safetensors").write_text("keep")
    store = Store(tmp_path, {})
    for name in ("pilot", "pilot-scores-0", "probe-11"):
        store.write(name, {"value": torch.zeros(1)})
    store.remove()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["mine.txt", "model.safetensors"]


def test_the_key_holds_all_settings():
    """A setting that the key forgot would take scores of another run."""
    from trl_bilevel import WeightSettings

    names = {field.name for field in dataclasses.fields(WeightSettings)}
    first = Store(None, dict.fromkeys(names, 0)).key
    assert all(Store(None, dict.fromkeys(names, 0) | {name: 1}).key != first for name in names)
