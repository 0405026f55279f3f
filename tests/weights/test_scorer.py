"""A scorer that is kept: the same measure tomorrow, on rows that were not there."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from sklearn.metrics import roc_auc_score

from tests.weights.conftest import LAZY
from trl_bilevel import RowScorer, learn_weights


@pytest.fixture
def folder(tiny_model, tokenizer, tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def learned(folder, mixed, rows):
    trusted = Dataset.from_list(rows[40:60])
    return learn_weights(folder, Dataset.from_list(mixed), trusted, max_length=128, bf16=False, disable_tqdm=True)


@pytest.fixture
def new(rows):
    """40 rows that were not there; the second half is lazy."""
    return Dataset.from_list([*rows[100:120], *(row | {"completion": LAZY} for row in rows[100:120])])


def test_it_weighs_new_rows_by_the_same_measure(learned, new, mixed, tmp_path):
    learned.scorer.save(tmp_path / "scorer")
    scorer = RowScorer.load(tmp_path / "scorer")
    found = scorer.weigh(new, disable_tqdm=True)
    assert found.values.dtype == found.scores.dtype == torch.float32 and len(found) == 40
    assert roc_auc_score([True] * 20 + [False] * 20, found.values) > 0.9
    assert found.to_dataset()["data_rank"][:20] and found.facts["rows"] == 40
    # The rows that it was made from weigh what they did, but for fits that have now seen them.
    again = scorer.weigh(Dataset.from_list(mixed), disable_tqdm=True)
    assert torch.corrcoef(torch.stack([again.values, learned.values]))[0, 1] > 0.9
    assert float(again.values.mean()) == pytest.approx(1, abs=0.15)


def test_a_function_of_a_batch_says_the_same(learned, new, tmp_path):
    learned.scorer.save(tmp_path / "scorer")
    scorer = RowScorer.load(tmp_path / "scorer")
    whole = scorer.weigh(new, disable_tqdm=True)
    mapped = new.map(scorer, batched=True, batch_size=7)
    torch.testing.assert_close(torch.tensor(mapped["data_weight"][:]), whole.values, atol=1e-4, rtol=1e-3)
    assert mapped["completion"][:] == new["completion"][:]


def test_chats_may_come_as_arrays(folder, mixed, rows):
    """As Ray Data has them: arrays of objects, which hold arrays of dicts."""

    def chat(row):
        names = (("prompt", "user"), ("completion", "assistant"))
        return {name: [{"role": role, "content": row[name]}] for name, role in names}

    mixed, trusted = (Dataset.from_list(list(map(chat, part))) for part in (mixed, rows[40:60]))
    learned = learn_weights(folder, mixed, trusted, max_length=128, bf16=False, disable_tqdm=True)
    arrays = {name: np.empty(8, dtype=object) for name in ("prompt", "completion")}
    for name, column in arrays.items():
        for place in range(8):
            column[place] = np.array(mixed[place][name], dtype=object)
    whole = learned.scorer.weigh(mixed.select(range(8)), disable_tqdm=True)
    found = learned.scorer(arrays)
    np.testing.assert_allclose(found["data_weight"], whole.values, atol=1e-4)
    assert found["prompt"] is arrays["prompt"]


def test_rows_without_a_token_to_score_have_no_weight(learned, new):
    rows = Dataset.from_list([{"prompt": "long " * 200, "completion": "x"}, *new])
    found = learned.scorer.weigh(rows, disable_tqdm=True)
    assert bool(found.values[0].isnan()) and bool(found.values[1:].isfinite().all())
    (weight,) = learned.scorer({name: values[:1] for name, values in rows[:].items()})["data_weight"]
    assert weight != weight


def test_rows_unlike_any_that_it_has_seen_are_told(learned, new, caplog):
    caplog.set_level("WARNING")
    assert learned.scorer.weigh(new, disable_tqdm=True).facts["far_share"] <= 0.1 and not caplog.records
    odd = Dataset.from_list([{"prompt": "@" * 20 + str(n), "completion": "}" * 30} for n in range(20)])
    assert learned.scorer.weigh(odd, disable_tqdm=True).facts["far_share"] > 0.5
    assert "unlike the rows that the scorer was made from" in caplog.text


def test_another_model_is_refused(learned, tiny_model, tokenizer):
    other = tiny_model()
    other.lm_head.weight.data += 1e-3
    with pytest.raises(ValueError, match="has other weights.*Give that model, in the same dtype"):
        learned.scorer.use(other, tokenizer)
    learned.scorer.use(tiny_model(), tokenizer)


def test_no_text_of_a_row_is_kept(learned, mixed, tmp_path):
    learned.scorer.save(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} >= {"scorer.json", "scorer.safetensors"}
    content = (tmp_path / "scorer.json").read_text()
    assert LAZY not in content and mixed[0]["completion"] not in content


@pytest.mark.parametrize("damage", ["format", "parts", "json", "tensors", "missing"])
def test_files_that_cannot_be_loaded(damage, learned, tmp_path):
    path = tmp_path / "scorer"
    learned.scorer.save(path)
    told = json.loads((path / "scorer.json").read_text())
    error, message = ValueError, "cannot be read"
    if damage == "format":
        (path / "scorer.json").write_text(json.dumps(told | {"format": 9}))
        message = "format 9, this version reads 1"
    elif damage == "parts":
        (path / "scorer.json").write_text("{}")
    elif damage == "json":
        (path / "scorer.json").write_text("{")
    elif damage == "tensors":
        (path / "scorer.safetensors").write_bytes(b"no tensors")
    else:
        (path / "scorer.json").unlink()
        error, message = FileNotFoundError, "has no scorer"
    with pytest.raises(error, match=message):
        RowScorer.load(path)


def test_what_has_no_scorer(folder, mixed, rows):
    given = (folder, Dataset.from_list(mixed), Dataset.from_list(rows[40:60]))
    common = {"max_length": 128, "bf16": False, "disable_tqdm": True}
    assert learn_weights(*given, weight_estimator="value_function", pilot_steps=2, **common).scorer is None
    own = learn_weights(*given, formatting_func=lambda row: row["prompt"] + row["completion"], **common)
    assert own.scorer is None
