"""`trl-bilevel sanity`: what it damages, what it concludes, how it exits."""

import json
import math

import numpy as np
import pytest
import torch
from datasets import Dataset

from tests.errors_table import bad_input, note
from trl_bilevel.cli import sanity
from trl_bilevel.cli.main import main
from trl_bilevel.core.statistics import auc_standard_error
from trl_bilevel.data.assets import docstrings
from trl_bilevel.weights import learn
from trl_bilevel.weights.result import RowWeights

SANITY = "`trl-bilevel sanity`"


def chats(rows):
    return [
        {
            "messages": [
                {"role": "user", "content": f"What does `{row['name']}` do?"},
                {"role": "assistant", "content": row["description"]},
            ]
        }
        for row in rows
    ]


@pytest.fixture
def files(tmp_path):
    Dataset.from_list(chats(docstrings()[:90])).to_json(tmp_path / "clean.jsonl")
    Dataset.from_list(chats(docstrings()[80:100])).to_json(tmp_path / "trusted.jsonl")
    return tmp_path


def arguments(files, *more):
    return ["sanity", "--dataset", f"{files}/clean.jsonl", "--validation", f"{files}/trusted.jsonl", *more]


@pytest.fixture
def weigh(monkeypatch):
    """Weights without a model: a function of each answer. Returns what was weighed."""
    seen = {}

    def set_to(weight):
        def learn_weights(model, rows, validation, **settings):
            seen.update(rows=rows, validation=validation)
            return RowWeights(torch.tensor([weight(row["completion"][-1]["content"]) for row in rows]), None)

        monkeypatch.setattr(learn, "learn_weights", learn_weights)
        return seen

    return set_to


def test_good_weights_pass_and_are_written(files, weigh, capsys):
    right = {row["description"] for row in docstrings()}
    seen = weigh(lambda answer: 1.5 if answer in right else 0.5)
    assert (
        main(
            arguments(
                files,
                "--model",
                "none",
                "--damage",
                "lazy",
                "truncated",
                "--rate",
                "0.25",
                "--json",
                f"{files}/out.json",
            )
        )
        == 0
    )
    result = json.loads((files / "out.json").read_text())
    assert result["passed"] and result["settings"]["rate"] == 0.25
    assert {kind: (entry["auc"], entry["rows"]) for kind, entry in result["kinds"].items()} == {
        "lazy": (1.0, 10),
        "truncated": (1.0, 10),
        "all": (1.0, 20),
    }
    # Ten of the ninety rows ask what trusted rows ask; the truth stays out of the model's sight.
    assert (len(seen["rows"]), len(seen["validation"])) == (80, 20)
    assert seen["rows"].column_names == ["prompt", "completion"] == seen["validation"].column_names
    assert len(seen["rows"][0]["completion"]) == 1
    out = capsys.readouterr().out
    assert "Found: Weights can be trusted" in out and "Next: trl-bilevel sft" in out


def test_inverted_weights_fail(files, weigh, capsys):
    """Short answers preferred, as a loss-based selector does: boilerplate wins."""
    weigh(lambda answer: 1 / (1 + len(answer)))
    assert main(arguments(files, "--model", "none", "--damage", "lazy", "swapped", "--json", f"{files}/out.json")) == 1
    kinds = json.loads((files / "out.json").read_text())["kinds"]
    assert kinds["lazy"]["verdict"] == "inverted" and kinds["swapped"]["verdict"] == "not told apart"
    assert "do not trust the weights" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        bad_input(SANITY, "`--rows 20`", ["--rows", "20"], "`--rows` must be at least 32, got 20"),
        bad_input(SANITY, "`--estimator none`", ["--estimator", "none"], "there is nothing to measure"),
        bad_input(
            SANITY, "`--json nowhere/x.json`", ["--json", "nowhere/x.json"], "folder of `--json` does not exist"
        ),
    ],
)
def test_mistakes_are_told_before_anything_is_loaded(more, message, files, monkeypatch, capsys, request):
    monkeypatch.chdir(files)
    monkeypatch.setattr(sanity, "_load", None)
    assert main(arguments(files, *more)) == 1
    error = capsys.readouterr().err
    assert message in error
    note(request, "exit 1", error)


def test_rows_without_weight_do_not_count():
    weights = [1.0, 2.0, float("nan"), 0.5, 0.4]
    result = sanity.judge(weights, ["good", "good", "good", "lazy", "lazy"])
    assert result["good_rows"] == 2 and result["kinds"]["lazy"]["auc"] == 1.0
    assert result["good_share"] == pytest.approx(3 / 3.9)


@pytest.mark.parametrize(
    ("auc", "error", "verdict"),
    [
        (0.95, 0.02, "found"),
        (0.8, 0.02, "mostly found"),
        (0.6, 0.04, "weakly found"),
        (0.57, 0.04, "not told apart"),
        (0.45, 0.04, "not told apart"),
        (0.3, 0.04, "inverted"),
    ],
)
def test_verdicts(auc, error, verdict):
    assert sanity.verdict_of(auc, error) == verdict


def test_standard_error_of_an_area():
    # Exact for exponential scores: those of one class four times the others' in the mean give an area of .8.
    rng = np.random.default_rng(0)
    good, bad = rng.exponential(4.0, (4000, 20)), rng.exponential(1.0, (4000, 30))
    areas = (good[:, :, None] > bad[:, None, :]).mean((1, 2))
    assert areas.mean() == pytest.approx(0.8, abs=0.005)
    assert auc_standard_error(0.8, 20, 30) == pytest.approx(areas.std(), rel=0.05)
    # At chance it is that of the rank sum statistic: (n + m + 1) / 12 n m.
    assert auc_standard_error(0.5, 30, 70) == pytest.approx(math.sqrt(101 / (12 * 30 * 70)))
    assert auc_standard_error(1.0, 5, 5) == 0
    with pytest.raises(ValueError, match="Both classes"):
        auc_standard_error(0.8, 5, 0)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--damage", "rotten"], "must be some of lazy"),
        (["--rate", "1.5"], "`rate` must lie between 0 and 1"),
        (["--max-length", "15"], "are longer than --max-length 15"),
        (["--dataset", "nowhere.jsonl"], "no data file nowhere.jsonl"),
    ],
)
def test_mistakes_are_told(more, message, files, capsys):
    assert main(arguments(files, *more)) == 1
    assert message in capsys.readouterr().err


def test_with_a_model(files, tiny_model, tokenizer, capsys):
    tiny_model().save_pretrained(files / "model")
    tokenizer.save_pretrained(files / "model")
    settings = ["--model", f"{files}/model", "--rows", "32", "--json", f"{files}/out.json"]
    code = main(arguments(files, *settings, "--damage", "lazy"))
    result = json.loads((files / "out.json").read_text())
    assert code == (0 if result["kinds"]["lazy"]["auc"] >= 0.5 else 1)
    assert result["rows"] == {"clean": 32, "validation": 20, "left_out_as_too_long": 0}
    assert result["good_rows"] == 16 and "32 rows, 50% of them damaged (lazy)" in capsys.readouterr().out
