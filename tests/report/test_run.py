"""Reading of runs: whole ones, what is left of others, and folders that hold none."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.report.conftest import write_json
from trl_bilevel.report import write_report
from trl_bilevel.report.findings import facts_of, notes
from trl_bilevel.report.run import load_run


def missing(run):
    return [note.text for note in notes("finding", facts_of(run)) if note.title == "Not in this report"]


def test_a_whole_run(make_run):
    run = load_run(make_run())
    assert run.finished and run.learned and not missing(run)
    assert len(run.weights) == 60 and run.weights.mean() == pytest.approx(1, abs=1e-5)
    assert np.isfinite(run.scores[::2]).all() and np.isnan(run.scores[1::2]).all()
    assert run.ranks[np.nanargmax(run.weights)] == 0
    assert run.points("eval_loss")[-1] == (40, pytest.approx(3.5))
    assert run.validation_points() == [(0, 4.0), (40, 3.5)]


def test_rows_that_were_dropped_rank_last(make_run):
    folder = make_run(rows=4, pilot=False)
    values = pa.array([1.0, None, 2.0, 0.0], pa.float32())
    pq.write_table(pa.table({"data_weight": values}), folder / "_record" / "weights.parquet")
    run = load_run(folder)
    assert run.ranks.tolist() == [1, 3, 0, 2] and run.live.tolist() == [1.0, 2.0, 0.0]


def test_without_a_record_the_weighted_rows_are_read(make_run):
    run = load_run(make_run(record=False, pilot=False))
    assert len(run.weights) == 60 and run.rows_file is not None and "no record" in missing(run)[0]


def test_an_interrupted_run(make_run):
    run = load_run(make_run(weighted=False, finished=False))
    assert not run.finished and run.rows_file is None and "weighted.parquet" in missing(run)[0]


def test_rows_of_another_run_are_not_shown_as_this_ones(make_run):
    folder, other = make_run(), make_run("other", rows=10)
    run = load_run(folder, other / "weighted.parquet")
    assert run.rows_file is None and "has 10 rows, the run had 60" in missing(run)[0]
    (folder / "weighted.parquet").write_bytes(b"PAR1 cut off")
    assert "cannot be read" in missing(load_run(folder))[0]


def test_a_damaged_record_is_as_good_as_none(make_run):
    folder = make_run()
    (folder / "_record" / "run.json").write_text('{"format": 1, "log')
    run = load_run(folder)
    assert run.record == {} and run.weights is not None


@pytest.mark.parametrize(
    ("prepare", "error", "message"),
    [
        (lambda path: None, FileNotFoundError, "There is no run folder"),
        (lambda path: path.write_text("x"), FileNotFoundError, "It is a file: give the folder"),
        (lambda path: path.mkdir(), ValueError, "holds no run"),
        (lambda path: write_json(path / "_record" / "run.json", {"format": 99}), ValueError, "has format 99"),
    ],
)
def test_what_is_no_run_is_refused(tmp_path, prepare, error, message):
    prepare(tmp_path / "x")
    with pytest.raises(error, match=message):
        write_report(tmp_path / "x")


def test_mistakes_in_arguments(make_run, tmp_path):
    folder = make_run()
    with pytest.raises(FileNotFoundError, match="nowhere.parquet"):
        write_report(folder, rows_file=tmp_path / "nowhere.parquet")
    with pytest.raises(FileNotFoundError, match="nowhere.jsonl"):
        write_report(folder, rows_file=tmp_path / "nowhere.jsonl")
    (tmp_path / "rows.jsonl").write_text("")
    with pytest.raises(ValueError, match="`rows_file` .* must be a .parquet file .* got '.*rows.jsonl'"):
        write_report(str(folder), rows_file=tmp_path / "rows.jsonl")
    with pytest.raises(FileNotFoundError, match="There is no run folder"):
        write_report(folder, baseline=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="ends in .html"):
        write_report(folder, output=tmp_path / "report.pdf")
    with pytest.raises(TypeError, match="got `int`"):
        write_report(3)


def test_a_ledger_with_a_cut_off_line(make_run):
    folder = make_run()
    (folder / "ledger.jsonl").write_text(json.dumps({"round": 0, "kept": True}) + '\n{"round": 1, "ke')
    assert load_run(folder).ledger == [{"round": 0, "kept": True}]


def test_weights_tell_the_rows_of_an_earlier_run(make_run, tmp_path):
    """As many rows in a folder that was used before: their texts must not stand beside this run's weights."""
    folder = make_run(texts=["new"])
    elsewhere = tmp_path / "elsewhere.parquet"
    (folder / "weighted.parquet").rename(elsewhere)
    stale = pq.read_table(elsewhere).drop_columns("data_weight")
    stale = stale.append_column("data_weight", pa.array(np.linspace(0, 2, 60), pa.float32()))
    pq.write_table(stale, folder / "weighted.parquet")
    run = load_run(folder)
    assert run.rows_file is None and "weighted.parquet has other weights than this run" in missing(run)[0]
    assert load_run(folder, elsewhere).rows_file == elsewhere and not missing(load_run(folder, elsewhere))
    # The file that the run noted comes after one that is not its own.
    record = json.loads((folder / "_record" / "run.json").read_text()) | {"rows_file": str(elsewhere)}
    write_json(folder / "_record" / "run.json", record)
    run = load_run(folder)
    assert run.rows_file == elsewhere and "its rows are left out" in missing(run)[0].lower()
    write_json(folder / "_record" / "run.json", record | {"rows_file": "w.jsonl"})
    assert "The rows of this run are in w.jsonl" in missing(load_run(folder))[1]
    pq.write_table(stale.drop_columns("data_weight"), folder / "weighted.parquet")
    assert "has no column data_weight" in missing(load_run(folder))[0]


def test_given_weights_are_known_by_their_proportions(make_run):
    """The file that they were given in: of another mean, and with weights of rows that were then dropped."""
    folder = make_run()
    own = load_run(folder).weights.copy()
    own[3] = np.nan
    values = pa.array(own, pa.float32(), from_pandas=True)
    pq.write_table(pa.table({"data_weight": values}), folder / "_record" / "weights.parquet")
    given = pa.table({"prompt": ["a"] * 60, "data_weight": 5 * np.nan_to_num(own, nan=9.0)})
    pq.write_table(given, folder / "weighted.parquet")
    run = load_run(folder)
    assert run.rows_file is not None and not missing(run)


def test_a_run_without_weights_takes_none_of_another(make_run):
    weights = {"learned": False, "given": False}
    folder = make_run(pilot=False, weights=weights)
    (folder / "_record" / "weights.parquet").unlink()
    run = load_run(folder)
    assert run.weights is None and run.rows_file is None and "weighted.parquet is not of this run" in missing(run)[0]
    page = write_report(folder).read_text()
    assert "all rows count the same" in page and "answer 1" not in page
    # Weights that were learned, and are lost.
    write_json(folder / "_record" / "run.json", json.loads(json.dumps(run.record | {"weights": {"learned": True}})))
    run = load_run(folder)
    assert run.weights is None and "The weights that this run learned are not in this folder" in missing(run)[0]


def test_what_an_earlier_run_left_is_not_mixed_into_a_later_one(make_run):
    folder = make_run()
    log = [{"step": step, "loss": 9.0} for step in range(1, 101)]
    write_json(folder / "checkpoint-100" / "trainer_state.json", {"log_history": log})
    assert load_run(folder).points("loss")[-1][0] == 40
    # The later one had come as far as its scores.
    for name in ("run.json", "weights.parquet"):
        (folder / "_record" / name).unlink()
    run = load_run(folder)
    assert not run.finished and run.weights is None and not run.history and run.rows_file is None
