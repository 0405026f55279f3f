"""The summary in words, against numbers worked out by hand."""

import json

import numpy as np
import pytest

from tests.report.conftest import record_of
from trl_bilevel.report.findings import compare, facts_of, notes
from trl_bilevel.report.rows import categories_of
from trl_bilevel.report.run import Run, load_run
from trl_bilevel.report.text import duration


def made(weights=None, ledger=(), **changes):
    weights = np.array(weights if weights is not None else [0.1, 0.5, 1.4, 2.0], dtype=float)
    record = record_of(len(weights), **changes)
    return Run(None, record=record, history=record["log_history"], weights=weights, ledger=list(ledger))


def verdict(run, comparisons=(), baseline=None):
    return next(notes("verdict", facts_of(run, (), comparisons, baseline)))


def findings(run, categories=()):
    return list(notes("finding", facts_of(run, categories)))


def evaluated(*losses, fingerprint="cc"):
    return {"losses": list(losses), "rows": len(losses), "fingerprint": fingerprint}


@pytest.mark.parametrize(
    ("losses", "tone", "title"),
    [
        ((3.0, 3.1, 3.0, 3.1), "good", "Selection helped"),
        ((4.0, 4.1, 4.0, 4.1), "bad", "Selection did not help"),
        ((2.0, 5.0, 2.1, 4.95), "neutral", "No clear difference to uniform mixing"),
    ],
)
def test_did_selection_help(losses, tone, title):
    run, uniform = made(evaluation=evaluated(*losses)), made(evaluation=evaluated(3.5, 3.6, 3.5, 3.6))
    uniform.record["weights"]["learned"] = False
    found = verdict(run, compare(run, uniform), "uniform")
    assert (found.tone, found.title) == (tone, title)
    assert "which chose nothing" in found.text and "With care" not in found.text


def test_the_standard_error_is_paired():
    run, uniform = made(evaluation=evaluated(1.0, 2.0, 3.0)), made(evaluation=evaluated(1.1, 2.3, 3.2))
    first = compare(run, uniform)[0]
    assert first.difference == pytest.approx(-0.2)
    assert first.standard_error == pytest.approx(0.1 / 3**0.5)


def test_only_trusted_rows_to_compare_are_called_flattered():
    run, uniform = made(evaluation={}, log_history=[]), made(evaluation={}, log_history=[])
    run.record["validation"][-1] |= {"total": 3.0, "rows": {"validation": [2.0, 4.0]}}
    found = verdict(run, compare(run, uniform), "uniform")
    assert found.title == "Selection helped" and "flattered" in found.text


def test_runs_that_differ_are_compared_with_care():
    run, uniform = made(), made(steps={"done": 10, "planned": 10}, model="other")
    uniform.record["data"]["fingerprint"] = "zz"
    text = verdict(run, compare(run, uniform), "uniform").text
    assert "training rows differ" in text and "40 and 10" in text and "tiny and other" in text
    assert "The baseline has weights" in text


def test_other_rows_are_not_compared():
    run, uniform = made(log_history=[]), made(evaluation=evaluated(3.0, fingerprint="zz"), log_history=[])
    uniform.record["data"]["validation_fingerprint"] = "validation zz"
    assert compare(run, uniform) == []


def test_without_a_baseline_no_gain_is_claimed():
    run = made()
    run.folder = type("Folder", (), {"resolve": lambda self: type("P", (), {"name": "out"})})()
    found = verdict(run)
    assert "whether they helped is not measured" in found.title and "trl-bilevel report out --baseline" in found.text


def test_other_verdicts():
    run = made()
    run.record["weights"] = {"learned": False, "given": True}
    assert "No weights were learned" in verdict(run).title
    assert "Nothing was selected" in verdict(made(np.linspace(0.99, 1.01, 50))).title
    assert "interrupted at step 40" in verdict(made(finished=False)).title
    kept = {"round": 0, "kept": True, "incoming_loss": 2.0, "trained_loss": 1.0}
    kept |= {"difference": -1.0, "standard_error": 0.1}
    assert verdict(made(ledger=[kept, kept | {"kept": False}])).title == "1 of 2 rounds were kept"
    assert "None of 1 rounds" in verdict(made(ledger=[kept | {"kept": False}])).title
    assert "may be noise" in verdict(made(ledger=[kept | {"standard_error": 0.6}])).text


def test_what_to_look_at(make_run):
    folder = make_run(rows=600, trusted=5)
    run = load_run(folder)
    run.weights = np.array([9.5 if n % 3 == 0 else 0.01 for n in range(600)])
    run.history += [{"step": 50, "eval_loss": 9.0}]
    run.record["seconds"]["selection"] = 6.0
    run.record["finished"] = False
    starved = [f.text for f in findings(run, categories_of(run)) if f.title == "A kind of rows that counts little"]
    assert starved == [f"source = {name}: 33% of the rows, 0% of the weight." for name in ("forum", "web")]
    found = {f.title: f for f in findings(run, categories_of(run))}
    assert found["Few trusted rows"].tone == "warning"
    assert "step 40 (3.5000) and ended at 9.0000" in found["The eval loss rose again"].text
    assert "60% of the time" in found["Choosing the weights took long"].text
    assert {"The run did not finish", "Read the rows at both ends"} <= set(found)
    run.weights = np.array([600.0] + 598 * [0.0] + [np.nan])
    del run.__dict__["live"]
    found = {f.title: f.text for f in findings(run)}
    assert "0.2%" in found["Few rows carry the training"]
    assert "1 of 600 rows" in found["Rows were dropped in preparation"] and "598" in found["Rows without any weight"]


def test_cards_and_durations():
    values = {card.title: card.value for card in notes("card", facts_of(made()))}
    assert values["Rows that carry 80% of the weight"] == "2"
    assert values["Loss on trusted rows"] == "3.500" and values["Time"] == "10.0 s"
    assert [duration(s) for s in (59.9, 61, 7260)] == ["59.9 s", "1 min 1 s", "2 h 1 min"]


def test_a_record_is_plain_json():
    json.dumps(record_of(), allow_nan=False)
