"""Two processes give what one gives with the same global batch (gloo, CPU)."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Without the last, incomplete batch: accelerate fills it up with rows from the start, one process does not.
PACKED = {"packing": True, "max_length": 64, "dataloader_drop_last": True}
PILOT = {"pilot_steps": 8, "pilot_learning_rate": 1e-2}
METHODS = {
    "default": {},
    "pilot": {"weight_estimator": "value_function"} | PILOT,
    "loss_weighted": {"selector_weighting": "loss", "validation_loss_weight": 0.5},
    "both": {"weight_estimator": "both"} | PILOT,
    "fast": {"selector_preset": "fast"},
    "sparse_centred": {"selector_preset": "sparse_centred"},
    "seal": {"selector_preset": "seal"},
    "stream": {"stream": True, "stream_sample_rows": 40},
    "packed": PACKED,
    "packed_sparse_centred": PACKED | {"selector_preset": "sparse_centred"},
}
# Weights move with every step, by what the processes exchange.
MOVING = ("sparse_centred", "seal", "packed_sparse_centred")


def launch(folder, processes, overrides, worker="worker"):
    folder.mkdir(exist_ok=True)
    launcher = []
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *launcher, "-m", f"tests.distributed.{worker}"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*command, str(folder), json.dumps(overrides)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=environment,
        timeout=600,
    )


def train(folder, processes, overrides):
    return train_all(folder, processes, {"run": overrides})["run"]


def train_all(folder, processes, runs):
    """What came of several runs, by name."""
    done = launch(folder, processes, runs)
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: json.loads((folder / name / "result.json").read_text()) for name in runs}


def refine(folder, processes, overrides):
    done = launch(folder, processes, overrides, "refine_worker")
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "result.json").read_text())


# A start of the processes for several methods.
@pytest.mark.parametrize(
    "names",
    [
        pytest.param(["default", "pilot"], marks=pytest.mark.compat),
        pytest.param(MOVING, marks=pytest.mark.slow),
        pytest.param([n for n in METHODS if n not in (*MOVING, "default", "pilot")], marks=pytest.mark.slow),
    ],
    ids=["default", "moving", "chosen"],
)
def test_two_processes_equal_one(names, tmp_path):
    runs = {name: METHODS[name] | {"max_steps": 20} for name in names}
    one, two = (train_all(tmp_path / str(n), n, runs) for n in (1, 2))
    for name in names:
        assert two[name]["losses"] == pytest.approx(one[name]["losses"], rel=1e-5), name
        if name in MOVING:
            assert two[name]["weights"] == pytest.approx(one[name]["weights"], abs=1e-5, nan_ok=True), name
            # Even of an adapter as small as this one's, whose gradients are exchanged too.
            assert 0 < two[name]["selector_share_of_traffic"] < 0.01, name
        else:
            assert two[name]["weights"] == one[name]["weights"], name
        if one[name]["learned"] is not None:
            assert two[name]["learned"] == one[name]["learned"] == one[name]["weights"], name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "drop_last"), [("default", True), ("sparse_centred", True), ("loss_weighted", False)]
)
def test_four_processes_and_rows_that_do_not_divide(name, drop_last, tmp_path):
    """With a full last batch as one process; else accelerate repeats rows to fill it up, and all stay together."""
    settings = METHODS[name] | {"rows": 43, "max_steps": 20, "dataloader_drop_last": drop_last}
    one, four = (train(tmp_path / str(n), n, settings) for n in (1, 4))
    assert len(four["losses"]) == 20 and all(map(math.isfinite, four["losses"] + four["weights"]))
    if drop_last:
        assert four["losses"] == pytest.approx(one["losses"], rel=1e-5)
        assert four["weights"] == pytest.approx(one["weights"], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["default", "sparse_centred"])
def test_a_killed_process(name, tmp_path):
    """The run stops; resumed from its last checkpoint, it ends as one that was left alone."""
    saving = METHODS[name] | {"save_strategy": "steps", "save_steps": 2}
    whole = train(tmp_path / "whole", 2, saving)
    assert launch(tmp_path / "killed", 2, {"run": saving | {"accident": "killed"}}).returncode != 0
    assert not (tmp_path / "killed" / "run" / "result.json").exists()
    resumed = train(tmp_path / "killed", 2, saving | {"resume": True})
    assert (resumed["losses"], resumed["weights"]) == (whole["losses"], whole["weights"])


@pytest.mark.parametrize(
    ("overrides", "questions"),
    [
        ({"gradient_accumulation_steps": 2}, 4),
        # One question over both processes: with the same random numbers they would give it the same two responses.
        ({"gradient_accumulation_steps": 1, "steps_per_round": 1}, 1),
    ],
    ids=["several_questions", "shared_question"],
)
def test_self_refining_processes_stay_together(overrides, questions, tmp_path):
    result = refine(tmp_path / "run", 2, overrides)
    assert result["processes"] == 2 and result["apart"] == 0
    assert [entry["questions"] for entry in result["ledger"]] == [questions] * 3
    assert all(entry["responses"] == 4 * questions for entry in result["ledger"])
    assert result["duplicates"] == 0
    assert all(entry["trained_loss"] <= entry["incoming_loss"] for entry in result["ledger"] if entry["kept"])


def test_two_self_refining_processes_equal_one(tmp_path):
    """With the same responses: scores, weights, losses of each round and the final parameters."""
    overrides = {
        "given_responses": True,
        "gradient_accumulation_steps": 2,
        "steps_per_round": 1,
        "num_rounds": 6,
    }
    one, two = (refine(tmp_path / str(n), n, overrides) for n in (1, 2))
    assert (one["processes"], two["processes"]) == (1, 2)
    for first, second in zip(one["ledger"], two["ledger"], strict=True):
        for name in ("questions", "responses", "kept"):
            assert first[name] == second[name]
        for name in ("score_mean", "score_std", "weight_std_within_group", "incoming_loss", "trained_loss"):
            assert second[name] == pytest.approx(first[name], abs=3e-5)
    assert two["parameters"] == pytest.approx(one["parameters"], abs=1e-4)
