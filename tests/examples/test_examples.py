"""Every example runs as written, on a tiny model."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from datasets import Dataset

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory, tokenizer):
    from tests.conftest import make_tiny_model

    folder = tmp_path_factory.mktemp("tiny")
    make_tiny_model(tokenizer, num_hidden_layers=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def place(tiny_folder, tmp_path, monkeypatch):
    """An empty folder to run in, as the examples see it."""
    monkeypatch.setenv("TRL_BILEVEL_MODEL", str(tiny_folder))
    monkeypatch.setenv("TRL_BILEVEL_LARGE_MODEL", str(tiny_folder))
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.syspath_prepend(EXAMPLES)
    # It reads the model's name when it is imported.
    monkeypatch.delitem(__import__("sys").modules, "setting", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def weighs(trainer, rows=None):
    """A weight for each row, of mean one, and not all the same."""
    weights = trainer.sample_weights()
    assert torch.isfinite(weights).all() and weights.std() > 0
    torch.testing.assert_close(weights.mean(), torch.tensor(1.0))
    assert rows is None or len(weights) == rows


def drop_in(names, folder):
    weighs(names["trainer"], 64)
    assert len(Dataset.from_parquet("out/drop_in/weighted.parquet")) == 64
    assert (folder / "out/drop_in/adapter_model.safetensors").is_file()


def quality(names, folder):
    weighs(names["trainer"], 64)
    assert set(names["aucs"]) == {"lazy", "swapped", "salad"} and set(names["losses"]) == {"none", "value_function"}


def safety(names, folder):
    weighs(names["trainer"], 48)
    assert len(names["unseen"]) == 6
    used = [row["prompt"][0]["content"] for part in ("mixed", "trusted") for row in names[part]]
    assert not set(used) & set(names["unseen"])


def fixed_weights(names, folder):
    weights = names["trainer"].sample_weights()
    good = torch.tensor([kind == "good" for kind in names["mixed"]["kind"]])
    torch.testing.assert_close(weights[good].mean() / weights[~good].mean(), torch.tensor(10.0))


def per_source_weights(names, folder):
    weighs(names["trainer"], 64)
    assert len(set(names["trainer"].sample_weights().tolist())) <= 3 == len(names["weight_of"])


def streaming(names, folder):
    # The tiny model tells rows apart hardly or not at all; tests/trainer/test_streams.py looks at the weights.
    assert len(names["weighted"]) == 64 and len(names["seen"]) > 32
    assert min(row["data_weight"] for row in names["seen"]) >= 0


def several_objectives(names, folder):
    weighs(names["trainer"], 64)
    losses = names["losses"]
    assert losses["total"] == pytest.approx(0.75 * losses["facts"] + 0.25 * losses["manners"])


def export_subset(names, folder):
    assert len(names["best"]) == 20 and names["plain"].state.global_step == 4
    ranks = [json.loads(line)["data_rank"] for line in Path("out/export/best.jsonl").read_text().splitlines()]
    assert sorted(ranks) == list(range(20))


def small_to_large(names, folder):
    torch.testing.assert_close(names["large"].sample_weights(), names["small"].sample_weights())
    assert names["large"].resamples


def self_refine(names, folder):
    assert names["refiner"].ledger and (folder / "out/refined/ledger.jsonl").is_file()


CHECKS = {
    check.__name__: check
    for check in (
        drop_in,
        quality,
        safety,
        fixed_weights,
        per_source_weights,
        streaming,
        several_objectives,
        export_subset,
        small_to_large,
        self_refine,
    )
}


def test_every_example_is_checked():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*CHECKS, "setting"}


@pytest.mark.parametrize("name", CHECKS)
def test_example(name, place):
    CHECKS[name](runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__"), place)


def test_notebook(place):
    """Its code cells, one after the other, in one namespace."""
    notebook = json.loads((EXAMPLES / "drop_in_to_report.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code")
    names = {}
    for number, cell in enumerate(cells):
        exec(compile(cell, f"cell {number}", "exec"), names)
    weighs(names["trainer"], 64)
    assert len(Dataset.from_parquet("out/notebook/_rows/weighted.parquet")) == 64
    assert (place / "out/notebook/_rows/report.html").is_file()
