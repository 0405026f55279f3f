"""Weights that move: kept apart, and their parts without a trainer."""

import ast
from pathlib import Path

import pytest
import torch

import trl_bilevel
from trl_bilevel.weights.language_model import LanguageModel
from trl_bilevel.weights.published import RECIPES, MovingWeights, Tracker
from trl_bilevel.weights.settings import PRESETS

PACKAGE = Path(trl_bilevel.__file__).parent


def imports_of(file):
    """(module, whether it is imported within a function) of every import of a file."""
    tree = ast.parse(file.read_text())
    lazy = {id(node) for part in ast.walk(tree) if isinstance(part, ast.FunctionDef) for node in ast.walk(part)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            for name in node.names:
                yield f"{node.module or ''}.{name.name}", id(node) in lazy
        elif isinstance(node, ast.Import):
            for name in node.names:
                yield name.name, id(node) in lazy


def test_nothing_depends_on_them():
    """Only where a trainer's weights are made are they known, when they are asked for."""
    found = {
        (str(file.relative_to(PACKAGE)), lazy)
        for file in PACKAGE.rglob("*.py")
        for module, lazy in imports_of(file)
        if "published" in module.split(".")
    }
    assert found == {("trainer/choosing.py", True)}


def test_choosing_needs_no_trainer():
    """`core` and `data` know nothing of `weights`, and that nothing of trainers and tools."""
    order = ["core", "data", "weights", "trainer"]
    for place, part in enumerate(order):
        later = {*order[place + 1 :], "cli", "report", "demo", "evaluation", "planning"}
        for file in (PACKAGE / part).rglob("*.py"):
            for module, _ in imports_of(file):
                assert part == "trainer" or module.split(".")[0] not in later, f"{file}: {module}"


def test_every_published_preset_has_a_recipe():
    assert set(RECIPES) == {name for name, preset in PRESETS.items() if preset.published}


def test_adam_moves_weights_by_losses():
    """Against the gradient of the weighted loss: rows of high loss fall, those that were not there rise."""
    weights = MovingWeights(torch.ones(6, dtype=torch.bool), {}, RECIPES["seal"])
    weights.update(torch.tensor([0, 1, 2]), torch.tensor([1.0, 2.0, 3.0]), None, 0, 10)
    found = weights.of(torch.arange(6))
    assert found[0] > found[2] and found[3] > found[1]
    assert float(found.mean()) == pytest.approx(1, abs=1e-5)


def test_sparse_updates_move_the_rows_of_the_batch_after_their_warmup():
    weights = MovingWeights(torch.ones(6, dtype=torch.bool), {}, RECIPES["sparse_centred"])
    ids, losses, reference = torch.tensor([0, 1, 2]), torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.5, 2.0, 2.5])
    weights.update(ids, losses, reference, 0, 100)
    assert weights.of(torch.arange(6)).tolist() == [1.0] * 6
    weights.update(ids, losses, reference, 17, 100)
    found = weights.of(torch.arange(6))
    assert found[0] > found[1] > found[2] and len(set(found[3:].tolist())) == 1
    assert {"score_mean", "score_std"} <= set(weights.facts)


def test_dropped_rows_and_a_round_trip(tmp_path):
    kept = torch.tensor([True, False, True, True])
    weights = MovingWeights(kept, {"rows": 4}, RECIPES["seal"])
    weights.update(torch.tensor([0, 2]), torch.tensor([1.0, 2.0]), None, 0, 10)
    weights.refresh()
    assert bool(weights.values[1].isnan()) and float(weights.values[kept].mean()) == pytest.approx(1, abs=1e-5)
    weights.save(tmp_path)
    other = MovingWeights(kept, {"rows": 4}, RECIPES["seal"])
    other.load(tmp_path)
    for name, value in weights.tensors().items():
        assert torch.equal(other.tensors()[name].nan_to_num(7.0), value.nan_to_num(7.0)), name
    with pytest.raises(ValueError, match="does not fit|belong to other"):
        MovingWeights(kept, {"rows": 4}, RECIPES["sparse_centred"]).load(tmp_path)


def test_the_lower_level_learns_beside_the_model(tiny_model, prepared):
    model = tiny_model().eval()
    parameters = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in parameters]
    tracker = Tracker(model, (0.9, 0.999), 1e-8, 0.0, 1.0)
    reader, batch = LanguageModel(model), prepared.batch(range(8))
    first = tracker.step([batch], torch.tensor(1 / 80), reader.row_losses, lambda value: value, 1e-3)[0]
    second = tracker.step([batch], torch.tensor(1 / 80), reader.row_losses, lambda value: value, 1e-3)[0]
    torch.testing.assert_close(first, reader.row_losses(batch).means())
    assert float(second.mean()) < float(first.mean())
    assert all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))
    assert all(p.grad is None for p in parameters)
    with tracker.swapped():
        assert float(reader.row_losses(batch).means().mean()) < float(second.mean())
    other = Tracker(model, (0.9, 0.999), 1e-8, 0.0, 1.0)
    other.load_tensors({name: value.clone() for name, value in tracker.tensors().items()})
    steps = [t.step([batch], torch.tensor(1 / 80), reader.row_losses, lambda v: v, 1e-3)[0] for t in (tracker, other)]
    assert torch.equal(*steps)
    assert all(torch.equal(a, b) for a, b in zip(tracker.values, other.values, strict=True))
