"""Run folders made by hand, and a headless browser to open reports in."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ARTEFACTS = Path(__file__).parents[2] / "test_artifacts" / "report"

HOSTILE = [
    "<script>alert(1)</script>",
    "</script><script>window.pwned = 1</script>",
    '"><img src=x onerror="window.pwned = 2">',
    "<!--<script>",
    "]]></svg><a href='javascript:alert(3)'>x</a>",
    "a\u202egnp.exe\u202c b\u2066c\u2069",
    "line\u2028and\u2029paragraph, \x00\x01\x1b[31m\x7f\x85",
    "half a pair: \ud800 and \udfff",
    "{{ 7 * 7 }} {% raw %} ${x} \\u003c $\\frac{1}{2}$",
    "שלום عليكم 🙂 汉字",
    "javascript:alert(4)",
    "x" * 5000,
]


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def record_of(rows=60, **changes):
    """A `run.json` as `trainer/record.py` writes it."""
    history = [{"step": step, "loss": 4.0 - 0.02 * step, "selector/ess": 0.7} for step in range(2, 41, 2)]
    history += [{"step": step, "eval_loss": 3.9 - 0.01 * step} for step in (10, 20, 30, 40)]
    return {
        "format": 1,
        "kind": "sft",
        "finished": True,
        "versions": {"trl-bilevel": "0"},
        "model": "tiny",
        "device": "cpu",
        "processes": 1,
        "settings": {"learning_rate": 1e-3, "seed": 42},
        "steps": {"done": 40, "planned": 40},
        "data": {
            "rows": rows,
            "rows_trained_on": rows,
            "fingerprint": "aa",
            "validation_fingerprint": "validation bb",
            "validation": {"validation": {"rows": 40, "weight": 1.0}},
        },
        "weights": {"learned": True, "given": False, "by": "resample", "online": False, "asks_own_rows": None},
        "log_history": history,
        "seconds": {"selection": 2.0, "validation": 0.1, "total": 10.0},
        "validation": [
            {"step": step, "total": loss, "sets": {"validation": loss}, "rows": {"validation": [loss - 1, loss + 1]}}
            for step, loss in ((0, 4.0), (40, 3.5))
        ],
        "evaluation": {"losses": [3.4, 3.5, 3.6, 3.5], "rows": 4, "fingerprint": "cc"},
        "rows_file": None,
    } | changes  # fmt: skip


@pytest.fixture
def make_run(tmp_path):
    """Makes the folder of a run by hand: `rows` of text, weights, scores, record, pilot; returns it."""

    def make(name="run", rows=60, texts=None, record=True, pilot=True, weighted=True, trusted=12, **changes):
        folder, rng = tmp_path / name, np.random.default_rng(0)
        folder.mkdir()
        weights = rng.gamma(2.0, 1.0, rows)
        weights /= weights.mean()
        scores = np.log(weights) + 0.1 * rng.normal(size=rows)
        ranks = np.argsort(np.argsort(-weights))
        texts = texts or [f"answer {n}" for n in range(rows)]
        sources = changes.pop("sources", ["books", "forum", "web"])
        if record:
            write_json(folder / "_record" / "run.json", record_of(rows, **changes))
            table = {"data_weight": pa.array(weights, pa.float32()), "data_rank": ranks}
            pq.write_table(pa.table(table), folder / "_record" / "weights.parquet")
        if pilot:
            kept = [{"set": "validation", "score": 0.1 * n, "share": 1 / trusted} for n in range(trusted)]
            kept = [e | {"prompt": "asked", "answer": texts[n % len(texts)]} for n, e in enumerate(kept)]
            facts = {"format": 1, "seconds": 1.5, "steps": 8, "learning_rate": 1e-3, "rows_scored": rows // 2}
            write_json(folder / "_record" / "pilot.json", facts | {"trusted": kept})
            half = np.arange(0, rows, 2)
            table = {"sample_id": half, "score": pa.array(scores[half], pa.float32())}
            pq.write_table(pa.table(table), folder / "_record" / "scores.parquet")
        if weighted:
            columns = {
                "prompt": pa.array([texts[n % len(texts)].encode("utf-8", "replace").decode() for n in range(rows)]),
                "completion": [texts[(n + 1) % len(texts)].encode("utf-8", "replace").decode() for n in range(rows)],
                "source": [sources[n % len(sources)] for n in range(rows)],
                "sample_id": np.arange(rows),
                "data_weight": pa.array(weights, pa.float32()),
                "data_rank": ranks,
            }
            pq.write_table(pa.table(columns), folder / "weighted.parquet")
        return folder

    return make


def embedded(page):
    """What the page's script is given."""
    start = page.index('id="data">') + len('id="data">')
    return json.loads(page[start : page.index("</script>", start)])


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium of the system, driven by Playwright."""
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium is installed (Debian: apt-get install chromium)")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=path, headless=True, args=flags)
        yield chromium
        chromium.close()


class Opened:
    """A report in the browser, without a network; what went wrong is in `faults`."""

    def __init__(self, browser, path, scheme="light", width=1200, height=900):
        self.context = browser.new_context(
            color_scheme=scheme, viewport={"width": width, "height": height}, offline=True, reduced_motion="reduce"
        )
        self.page = self.context.new_page()
        self.faults = []
        self.page.on("console", lambda message: self.faults.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.faults.append(f"error: {error}"))
        self.page.on("dialog", lambda dialog: (self.faults.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        own = path.as_uri()
        self.page.on("request", lambda r: None if r.url == own else self.faults.append(f"request: {r.url}"))
        self.page.goto(own)

    def __enter__(self):
        return self

    def __exit__(self, *problem):
        self.context.close()

    def shot(self, name):
        """A screenshot of the whole page, for people."""
        ARTEFACTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=ARTEFACTS / f"{name}.png", full_page=True)


@pytest.fixture
def open_report(browser):
    return lambda path, **settings: Opened(browser, path, **settings)
