"""Every example runs as written, on a tiny model."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from trl import SFTTrainer

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
    assert len(Dataset.from_parquet("out/drop_in/_rows/weighted.parquet")) == 64
    assert (folder / "out/drop_in/adapter_model.safetensors").is_file()


def quality(names, folder):
    weighs(names["trainer"], 64)
    assert set(names["aucs"]) == {"lazy", "swapped", "salad"} and set(names["losses"]) == {"none", "probe"}


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
    assert len(names["weighted"]) == 64
    assert min(row["data_weight"] for row in names["weighted"]) >= 0


def several_objectives(names, folder):
    weighs(names["trainer"], 64)
    losses = names["losses"]
    assert losses["total"] == pytest.approx(0.75 * losses["facts"] + 0.25 * losses["manners"])


def export_subset(names, folder):
    assert sorted(names["best"]["data_rank"]) == list(range(20))
    assert torch.equal(names["again"].values, names["weights"].values)


def rank_and_train(names, folder):
    values = names["weights"].values
    assert len(Dataset.from_parquet("ranked.parquet")) == len(values) == len(names["drawn"]) == 64
    torch.testing.assert_close(values.mean(), torch.tensor(1.0))
    # A row comes the floor or the ceiling of its expected number of times.
    times = torch.bincount(torch.tensor(names["drawn"]["sample_id"]), minlength=64)
    assert ((times - values).abs() < 1 + 1e-4).all()
    assert type(names["trainer"]) is SFTTrainer and names["trainer"].state.global_step == 8


def test_the_shortest_way_is_short():
    """At most twelve lines of code, docstring and comments aside, without a trainer of ours."""
    code = (EXAMPLES / "rank_and_train.py").read_text().split('"""')[2]
    lines = [line for line in code.splitlines() if line.strip() and not line.startswith("#")]
    assert len(lines) <= 12 and "Bilevel" not in code


def tomorrow(names, folder):
    assert len(Dataset.from_parquet("later.parquet")) == len(names["later"]) == 32
    assert {path.name for path in (folder / "scorer").iterdir()} == {"scorer.json", "scorer.safetensors"}


def small_to_large(names, folder):
    torch.testing.assert_close(names["large"].sample_weights(), names["weights"].values)
    assert names["large"].mode.resamples


def self_refine(names, folder):
    assert names["refiner"].ledger and (folder / "out/refined/_rows/ledger.jsonl").is_file()


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
        rank_and_train,
        tomorrow,
        small_to_large,
        self_refine,
    )
}


def test_every_example_is_checked():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*CHECKS, "setting", "ray_map_batches"}


@pytest.mark.parametrize("name", CHECKS)
def test_example(name, place):
    CHECKS[name](runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__"), place)


def test_ray_map_batches(place):
    """On a local cluster of two workers. In a process of its own: Ray pickles the worker's class by its module."""
    pytest.importorskip("ray", reason="Ray is not installed (`pip install 'ray[data]'`)")
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "ray_map_batches.py")], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "64 rows, mean weight" in done.stdout


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
