"""The HTML of reports: nothing escapes, nothing leaks, and large runs stay small."""

import json
import re
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.report.conftest import HOSTILE, embedded, write_json
from trl_bilevel.report import write_report
from trl_bilevel.report.rows import categories_of
from trl_bilevel.report.run import load_run


def add_rounds(folder, texts, rounds=2):
    entries = [
        {
            "round": n, "step": n, "questions": 2, "responses": 4, "responses_cut": 3, "score_mean": 0.1,
            "incoming_loss": 4.0, "trained_loss": 3.9, "standard_error": 0.01, "difference": -0.1, "kept": n == 0,
            "reason": texts[0], "eval_loss": None,
        }
        for n in range(rounds)
    ]  # fmt: skip
    (folder / "ledger.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))
    (folder / "responses").mkdir()
    safe = [text.encode("utf-8", "replace").decode() for text in texts]
    for n in range(rounds):
        table = {
            "prompt": [safe[i % 2] for i in (0, 0, 1, 1)],
            "response": [safe[i % len(safe)] for i in range(2, 6)],
            "cut": [True, False, False, False],
            "sample_id": [0, 0, 1, 1],
            "score": [0.1, float("nan"), 0.3, 0.2],
            "weight": [1.5, 0.5, 1.0, float("nan")],
            "question_weight": [0.1, 0.1, 0.2, 0.2],
        }
        pq.write_table(pa.table(table), folder / "responses" / f"round-{n:04d}.parquet")


class Elements(HTMLParser):
    """Elements of a page, names of their attributes, and addresses; titles of charts are not counted."""

    def __init__(self, page):
        super().__init__()
        self.count, self.attributes, self.addresses, self.open = Counter(), set(), [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.open.append(tag)
        self.count[tag] += tag != "title" or "svg" not in self.open
        self.attributes |= {name for name, _ in attributes}
        self.addresses += [value for name, value in attributes if name.endswith("href")]

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass


@pytest.fixture
def hostile_run(make_run):
    settings = {"learning_rate": "<b onclick=alert(1)>", "selector_group_column": "<i>"}
    folder = make_run("<b>run", texts=HOSTILE, sources=HOSTILE[:4], settings=settings, model="</title><script>")
    add_rounds(folder, HOSTILE)
    return folder


def test_hostile_rows_make_no_element(hostile_run, make_run):
    page = write_report(hostile_run, baseline=make_run("\"onload='x'")).read_text()
    found = Elements(page)
    assert found.count["script"] == 2 and found.count["title"] == 1
    assert not {"img", "iframe", "object", "embed", "base", "form", "link", "i"} & set(found.count)
    assert not [name for name in found.attributes if name.startswith("on") or name in ("style", "src", "srcset")]
    assert all(address.startswith("#") for address in found.addresses)
    assert not set(page) & set("\x00\x1b\u202e\u2028\u2066\x7f")
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    assert policy.startswith("default-src &#39;none&#39;;") or policy.startswith("default-src 'none';")
    assert "unsafe" not in policy and "http" not in policy
    data = embedded(page)
    assert len(data["rows"]["row"]) == 60 and data["rows"]["question"][0]


def test_nothing_is_loaded_from_elsewhere(make_run):
    page = write_report(make_run()).read_text()
    addresses = set(re.findall(r"""(?:src|href)=["']([^"'#][^"']*)""", page))
    assert not addresses and not re.search(r"url\((?!#)|@import", page)


def test_a_hundred_thousand_rows_are_sampled(make_run):
    folder = make_run(rows=100_000, texts=[f"{n} " + 300 * "word " for n in range(7)])
    target = write_report(folder)
    assert target.stat().st_size < 3_000_000
    page = target.read_text()
    rows = embedded(page)["rows"]
    ranks = rows["rank"]
    assert 1400 < len(ranks) <= 1500 and ranks == sorted(ranks)
    assert ranks[:500] == list(range(1, 501)) and ranks[-500:] == list(range(99_501, 100_001))
    assert sum(rows["random"]) == 500
    assert f"a sample, {len(ranks):,} of 100,000 rows" in page
    weights = load_run(folder).weights
    np.testing.assert_allclose(rows["weight"], weights[rows["row"]], rtol=1e-3)
    # Row n asks text n % 7.
    assert all(text.startswith(f"{row % 7} ") for row, text in zip(rows["row"], rows["question"], strict=True))


def test_categories(make_run):
    folder = make_run(rows=300)
    found = categories_of(load_run(folder))
    assert [c.column for c in found] == ["source"]
    weights = load_run(folder).weights
    assert len(found[0].shares) == 3
    for share in found[0].shares:
        rows = weights[{"books": 0, "forum": 1, "web": 2}[share.value] :: 3]
        assert share.rows == 100 and share.of_rows == pytest.approx(1 / 3)
        assert share.of_weight == pytest.approx(rows.sum() / weights.sum())
        assert share.mean == pytest.approx(rows.mean())


def test_many_values_are_summed_up_for_a_group_column(make_run):
    names = [f"site {n}" for n in range(50)]
    settings = {"selector_group_column": "source"}
    folder = make_run(rows=300, sources=names, settings=settings)
    (category,) = categories_of(load_run(folder))
    assert len(category.shares) == 13 and category.shares[-1].value == "(38 others)"
    assert sum(share.rows for share in category.shares) == 300
    assert categories_of(load_run(make_run("rows", rows=300, sources=names))) == []


@pytest.mark.parametrize(
    ("settings", "there", "missing"),
    [
        ({}, ["How the weights are spread", "Where the scores lie", "Eval loss", "Weight by source"], ["Rounds"]),
        ({"pilot": False}, ["How the weights are spread", "Eval loss"], ["Where the scores lie"]),
        (
            {"record": False, "pilot": False},
            ["How many rows carry the weight", "has no record"],
            ["Eval loss", "All settings"],
        ),
        ({"weighted": False}, ["The texts of the rows are not in this folder"], ["Weight by source"]),
        ({"log_history": [], "evaluation": {}}, ["Loss on trusted rows"], ["Eval loss"]),
        ({"finished": False}, ["This run was interrupted at step 40"], []),
    ],
)
def test_what_is_missing_is_left_out_or_told(make_run, settings, there, missing):
    page = re.sub(r"<script.*?</script>", "", write_report(make_run(**settings)).read_text(), flags=re.S)
    assert all(text in page for text in there) and not any(text in page for text in missing)


def test_a_baseline_is_drawn_and_named(make_run):
    uniform = make_run("uniform", weighted=False, pilot=False)
    page = write_report(make_run(), baseline=uniform).read_text()
    assert "No clear difference to uniform mixing" in page
    assert "With uniform weights 3.500 at step 40." in page and "<bdi>uniform</bdi>" in page


def test_rounds_stand_beside_the_offline_answers(make_run):
    folder = make_run(texts=[f"text {n}" for n in range(9)], kind="refine")
    add_rounds(folder, [f"text {n}" for n in range(9)])
    page = write_report(folder).read_text()
    assert "1 of 2 rounds were kept" in page and page.count('<article class="question">') == 4
    first = page[page.index('<article class="question">') :]
    # The row with sample_id 0 has completion "text 1"; the heaviest response comes first.
    assert first.index('class="text">text 1<') < first.index('class="text">text 2<') < first.index('text">text 3<')
    assert "score none, cut" not in first and "cut at the length limit" in first
    (folder / "weighted.parquet").unlink()
    assert "The offline answer is not in this folder" in write_report(folder).read_text()


def test_several_validation_sets_have_a_chart(make_run):
    sets = {name: {"rows": 10, "weight": 0.5} for name in ("<safety>", "quality")}
    losses = [{"step": s, "total": 3.0, "sets": dict.fromkeys(sets, 3.0), "rows": {}} for s in (0, 40)]
    folder = make_run()
    record = json.loads((folder / "_record" / "run.json").read_text())
    record["data"]["validation"], record["validation"] = sets, losses
    write_json(folder / "_record" / "run.json", record)
    page = write_report(folder).read_text()
    assert "Loss on each set of trusted rows" in page and "<safety>" not in page


def test_pngs_for_papers(make_run):
    folder = make_run()
    write_report(folder, png=True)
    names = {path.stem for path in (folder / "_rows" / "report_png").glob("*.png")}
    assert {"weights", "concentration", "scores", "eval_loss", "validation_loss", "loss", "category_0"} <= names
    assert (folder / "_rows" / "report_png" / "weights.png").read_bytes().startswith(b"\x89PNG")
    assert not list(folder.glob("**/.*.tmp"))
