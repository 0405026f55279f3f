"""Runs of the benchmarks share work: each result once, needs before what needs them, a failure ends nothing else."""

import argparse
import json
from pathlib import Path

import pytest

from benchmarks.evidence import jobs
from benchmarks.jobs import METHOD, Job, is_done, run_jobs


def note(folder, name, fails=False):
    order = Path(folder) / "order"
    with order.open("a") as file:
        file.write(f"{name}\n")
    if fails:
        raise RuntimeError("on purpose")
    return {"name": name}


def options(**given):
    return argparse.Namespace(**({"force": False, "jobs": 1, "minutes": None} | given))


@pytest.mark.parametrize("processes", [1, 2])
def test_runs_what_has_no_result_and_waits_for_what_it_needs(tmp_path, processes, capsys):
    folder = str(tmp_path)
    (tmp_path / "there.json").write_text("{}")
    work = [
        Job(tmp_path / "last.json", note, (folder, "last"), needs=tmp_path / "first.json"),
        Job(tmp_path / "there.json", note, (folder, "there")),
        Job(tmp_path / "bad.json", note, (folder, "bad", True)),
        Job(tmp_path / "first.json", note, (folder, "first")),
        Job(tmp_path / "alone.json", note, (folder, "alone"), needs=tmp_path / "nobody makes this.json"),
    ]
    with pytest.raises(SystemExit, match="1 runs failed"):
        run_jobs(work, options(jobs=processes))
    order = (tmp_path / "order").read_text().split()
    assert sorted(order) == ["alone", "bad", "first", "last"]
    assert order.index("first") < order.index("last")
    assert json.loads((tmp_path / "last.json").read_text()) == {"name": "last"}
    assert not (tmp_path / "bad.json").exists() and not list(tmp_path.glob("*.tmp"))


def test_no_time_no_runs(tmp_path, capsys):
    run_jobs([Job(tmp_path / "a.json", note, (str(tmp_path), "a"))], options(minutes=1e-9))
    assert "1 runs were not begun" in capsys.readouterr().out and not (tmp_path / "a.json").exists()


def test_weights_of_other_defaults_are_learned_again(tmp_path):
    target = tmp_path / "a.json"
    for record, done in (
        ({"good_share": 0.5, "arm": "bilevel", "method": METHOD}, True),
        ({"good_share": 0.5, "arm": "bilevel", "method": METHOD - 1}, False),
        ({"good_share": 0.5, "arm": "bilevel", "method": 1}, False),
        ({"good_share_scored": 0.5}, False),
        # Weights that are not the default's, or none at all.
        ({"good_share": 0.5, "arm": "seal"}, True),
        ({"good_share": 0.5, "arm": "pilot", "method": METHOD - 1}, True),
        ({"test_loss": 3.0, "arm": "uniform"}, True),
    ):
        target.write_text(json.dumps(record))
        assert is_done(target) == done


def test_the_evidence_has_each_result_once_and_all_needs():
    every = list(jobs())
    targets = {job.target for job in every}
    assert len(targets) == len(every)
    assert {job.needs for job in every if job.needs} <= targets
