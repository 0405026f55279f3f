"""Reports of rows that were ranked: weights without any training; and of records that lack what they may lack."""

import json
import re

import pytest

from tests.report.conftest import embedded, write_json
from trl_bilevel.report import write_report
from trl_bilevel.report.findings import compare
from trl_bilevel.report.run import load_run

RECORD = {
    "format": 1,
    "kind": "rank",
    "finished": True,
    "model": "tiny",
    "weights": {"learned": True},
    "data": {"rows": 60},
    "seconds": {"selection": 8.0, "total": 10.0},
}


@pytest.fixture
def ranked(make_run):
    """The folder that `trl-bilevel rank` leaves: rows, weights, what choosing found, and no log."""

    def make(**changes):
        folder = make_run("ranked")
        (folder / "weighted.parquet").rename(folder / "ranked.parquet")
        write_json(folder / "_record" / "run.json", RECORD | {"rows_file": "ranked.parquet"} | changes)
        return folder

    return make


def words(page):
    return " ".join(re.sub(r"<script.*?</script>|<style.*?</style>|<[^>]+>", " ", page, flags=re.S).split())


def test_nothing_was_trained(ranked):
    page = write_report(ranked()).read_text()
    text = words(page)
    assert "The rows have weights; nothing was trained" in text
    assert "trl-bilevel sft --dataset_name ranked.parquet" in text
    assert "trl-bilevel export ranked.parquet --top-k N --output best.jsonl" in text
    assert "How the weights are spread" in text and "Where the scores lie" in text and "Weight by source" in text
    assert "Choosing the weights 8.0 s 80.0%" in text
    assert "Loading the model, reading and preparing the rows 2.0 s 20.0%" in text and "Total 10.0 s 100.0%" in text
    assert "Training 2.0 s" not in text and "took long" not in text and "before training" not in text
    assert "Not in this report" not in text and "interrupted" not in text
    assert embedded(page)["rows"]["answer"][0].startswith("answer ")


def test_equal_weights_are_told(ranked, monkeypatch):
    monkeypatch.setattr("trl_bilevel.report.findings.NEARLY_UNIFORM", 0.0)
    assert "The weights are nearly equal" in words(write_report(ranked()).read_text())


def test_a_ranking_that_was_stopped(ranked):
    text = words(write_report(ranked(finished=False)).read_text())
    assert "This run was interrupted" in text and "Give the command again" in text


def test_a_ranking_against_a_run_is_no_comparison(ranked, make_run):
    run, uniform = load_run(ranked()), load_run(make_run("uniform", weights={"learned": False}))
    assert compare(run, uniform) == []
    assert "nothing was trained" in write_report(run.folder, baseline=uniform.folder).read_text()


@pytest.mark.parametrize("missing", ["steps", "data", "validation", "evaluation", "seconds", "settings", "weights"])
def test_a_record_may_lack_any_part(make_run, missing):
    folder = make_run()
    file = folder / "_record" / "run.json"
    record = json.loads(file.read_text())
    write_json(file, {name: value for name, value in record.items() if name != missing})
    page = write_report(folder, baseline=make_run("whole")).read_text()
    assert "How the weights are spread" in page and "None" not in words(page)


def test_a_record_may_lack_nearly_everything(make_run):
    folder = make_run()
    write_json(folder / "_record" / "run.json", {"format": 1})
    write_json(folder / "_record" / "pilot.json", {"format": 1})
    assert "Where the scores lie" in write_report(folder).read_text()
