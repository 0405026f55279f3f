"""Reports in a real browser, without a network: no dialog, no error, no injected element, no accessibility fault.

Screenshots go to `test_artifacts/report`.
"""

import pytest

from tests.report.conftest import HOSTILE
from tests.report.test_page import add_rounds
from trl_bilevel.report import write_report

LAYOUTS = {
    "light": {"scheme": "light"},
    "dark": {"scheme": "dark"},
    "narrow": {"scheme": "light", "width": 380, "height": 800},
}


@pytest.fixture(scope="session")
def axe():
    """The source of axe-core."""
    package = pytest.importorskip("axe_core_python", reason="axe-core-python is not installed")
    return (__import__("pathlib").Path(package.__file__).parent / "axe.min.js").read_text()


def faults_of(page, axe):
    """Serious and critical findings of axe-core, as `rule: element`."""
    page.evaluate(axe)
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
    return [
        f"{rule['id']}: {node['html'][:160]}"
        for rule in found
        if rule["impact"] in ("serious", "critical")
        for node in rule["nodes"]
    ]


@pytest.fixture
def full_report(make_run):
    folder = make_run("refined", kind="refine")
    add_rounds(folder, ["Ask again", "And this", *(f"response {n}" for n in range(6))])
    return write_report(folder, baseline=make_run("uniform"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_accessible_in_every_layout(full_report, open_report, axe, layout):
    with open_report(full_report, **LAYOUTS[layout]) as report:
        report.page.get_by_role("button", name="Why: row").first.click()
        report.page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true })")
        report.shot(layout)
        assert faults_of(report.page, axe) == [] and report.faults == []
        # Nothing sticks out to the side.
        assert report.page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_hostile_rows_are_only_text(make_run, open_report):
    texts = HOSTILE
    folder = make_run("hostile", texts=texts, sources=HOSTILE[:4])
    add_rounds(folder, texts)
    with open_report(write_report(folder)) as report:
        page = report.page
        page.select_option("#size", "100")
        for button in page.get_by_role("button", name="Why: row").all()[:12]:
            button.click()
        page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true })")
        report.shot("hostile")
        assert report.faults == [] and page.evaluate("window.pwned") is None
        assert page.locator("img, iframe, object, embed, form, base, link").count() == 0
        assert page.locator("script").count() == 2 and page.locator("main script, main a[href^=java]").count() == 0
        assert page.get_by_text("<script>alert(1)</script>").count() > 0
        assert page.get_by_text("a⟨U+202E⟩gnp.exe").count() > 0
        # A text from right to left is isolated: what follows it keeps its direction.
        assert page.locator(".texts .text").first.evaluate("e => getComputedStyle(e).unicodeBidi") == "isolate"


def test_the_policy_stops_what_would_get_through(make_run, open_report):
    with open_report(write_report(make_run())) as report:
        markup = '<img src=x onerror="window.pwned = 1"><b style="color: red">'
        report.page.evaluate("(markup) => document.body.insertAdjacentHTML('beforeend', markup)", markup)
        report.page.wait_for_timeout(100)
        assert report.page.evaluate("window.pwned") is None
        assert any("Content Security Policy" in fault for fault in report.faults)


def weights_shown(page):
    return [float(text) for text in page.locator("#table tbody td.weight").all_inner_texts()]


def test_table_searches_sorts_and_pages(make_run, open_report):
    from playwright.sync_api import expect

    with open_report(write_report(make_run(rows=300))) as report:
        page, status = report.page, report.page.locator("#status")
        first = weights_shown(page)
        assert len(first) == 25 and first == sorted(first, reverse=True)
        page.get_by_role("button", name="Next").click()
        assert page.locator("#page").inner_text() == "Page 2 of 12" and weights_shown(page)[0] <= first[-1]
        page.get_by_role("button", name="Weight", exact=True).click()
        assert weights_shown(page) == sorted(weights_shown(page)) and weights_shown(page)[0] <= first[-1]
        assert page.get_by_role("columnheader", name="Weight").get_attribute("aria-sort") == "ascending"
        page.get_by_role("button", name="source", exact=True).click()
        assert page.locator("#table tbody .label").first.inner_text() == "books"
        page.get_by_label("Search text and row numbers").fill("ANSWER 299")
        expect(status).to_contain_text("2 rows")
        page.get_by_label("Search text and row numbers").fill("no such text")
        expect(status).to_have_text("No row found.")
        page.get_by_label("Search text and row numbers").fill("")
        expect(status).to_contain_text("300 rows")
        page.get_by_label("Show").select_option("low")
        assert weights_shown(page)[0] == min(weights_shown(page))
        page.get_by_label("Show").select_option("scored")
        assert page.locator("#status").inner_text().startswith("150 rows")
        assert report.faults == []


def test_why_names_the_nearest_trusted_rows(make_run, open_report):
    # Trusted rows score 0, 0.1, ... 1.1; every second row has no score.
    with open_report(write_report(make_run(trusted=12))) as report:
        page = report.page
        page.get_by_label("Show").select_option("scored")
        button = page.get_by_role("button", name="Why: row").first
        score = float(page.locator("#table tbody tr").first.locator("td").nth(2).inner_text().replace("−", "-"))
        button.press("Enter")
        assert button.get_attribute("aria-expanded") == "true"
        below = sum(0.1 * n < score for n in range(12))
        more = page.locator("tr.more")
        assert f"higher than {below} of the 12 trusted rows" in more.inner_text()
        nearest = sorted((0.1 * n for n in range(12)), key=lambda s: abs(s - score))[:3]
        assert [f"score {s:+.3f}" in more.inner_text() or s == 0 for s in nearest] == [True] * 3
        button.press("Enter")
        assert page.locator("tr.more").count() == 0
        page.get_by_label("Show").select_option("all")
        rows = page.locator("#table tbody tr").filter(has_text="none").first
        rows.get_by_role("button", name="Why: row").click()
        assert "This row was not scored." in page.locator("tr.more").inner_text()


def test_theme_can_be_chosen(full_report, open_report):
    with open_report(full_report, scheme="light") as report:
        ground = "getComputedStyle(document.body).backgroundColor"
        light = report.page.evaluate(ground)
        button = report.page.get_by_role("button", name="Theme")
        button.click()
        assert button.inner_text() == "Theme: light" and report.page.evaluate(ground) == light
        button.click()
        assert button.inner_text() == "Theme: dark" and report.page.evaluate(ground) != light
        assert report.faults == []


def test_keyboard_reaches_the_report(full_report, open_report):
    with open_report(full_report) as report:
        report.page.keyboard.press("Tab")
        assert report.page.evaluate("document.activeElement.textContent") == "Skip to the report"
        report.page.keyboard.press("Enter")
        assert report.page.url.endswith("#main")


def test_a_hundred_thousand_rows(make_run, open_report, axe):
    path = write_report(make_run("hundred thousand", rows=100_000, texts=[f"{n} " + 60 * "word " for n in range(7)]))
    with open_report(path) as report:
        report.shot("hundred_thousand_rows")
        assert report.page.locator("#table tbody tr").count() == 25
        report.page.get_by_label("Show").select_option("random")
        assert report.page.locator("#status").inner_text().startswith("500 rows")
        assert faults_of(report.page, axe) == [] and report.faults == []


def test_without_scripts_it_says_what_is_missing(full_report, browser):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(full_report.as_uri())
    assert page.get_by_text("needs JavaScript").is_visible() and page.get_by_role("img").count() > 5
    context.close()
