"""`trl-bilevel rank` with a scorer: kept once, used on rows that come later."""

import pytest
from datasets import Dataset

from trl_bilevel.cli import rank


@pytest.fixture
def files(tiny_model, tokenizer, rows, tmp_path, monkeypatch):
    """A model's folder, training rows, trusted rows and later rows, in the working directory."""
    monkeypatch.chdir(tmp_path)
    tiny_model().save_pretrained("model")
    tokenizer.save_pretrained("model")
    lazy = [row | {"completion": "I do not know, sorry."} if n % 2 else row for n, row in enumerate(rows)]
    for name, part in (("mixed", lazy[:40]), ("trusted", rows[40:60]), ("later", lazy[60:80])):
        Dataset.from_list(part).to_json(f"{name}.jsonl")
    return tmp_path


RANK = ["mixed.jsonl", "--trusted", "trusted.jsonl", "--model_name_or_path", "model", "--report", "False"]


def test_a_scorer_is_kept_and_used(files, capsys):
    rank.run([*RANK, "--save_scorer", "scorer", "--output", "ranked.parquet"])
    assert "rank NEW_ROWS --scorer scorer" in capsys.readouterr().out
    rank.run(["later.jsonl", "--scorer", "scorer", "--output", "later.parquet"])
    found = Dataset.from_parquet("later.parquet")
    assert len(found) == 20 and sorted(found["data_rank"]) == list(range(20))
    assert "Ranked rows: later.parquet" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["later.jsonl"], "either trusted rows .* or a saved scorer"),
        ([*RANK, "--scorer", "scorer"], "either trusted rows .* or a saved scorer"),
        (
            [*RANK, "--save_scorer", "s", "--weight_estimator", "both"],
            "`save_scorer` needs `weight_estimator='probe'`",
        ),
        (["later.jsonl", "--scorer", "nowhere"], "nowhere has no scorer"),
        (["later.jsonl", "--scorer", "s", "--model_name_or_path", "model"], "has its own model"),
        (["later.jsonl", "--scorer", "s", "--save_scorer", "t"], "has its own model"),
    ],
)
def test_what_cannot_work(arguments, message, files):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        rank.run(arguments)
