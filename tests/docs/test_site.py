"""The documentation site builds without a warning, and without a network; README's links lead somewhere."""

import re
import runpy
import subprocess
import sys

import pytest

from tests.docs.blocks import FENCE, PAGES, ROOT

LINK = re.compile(r"\]\(([^)\s]+)\)")


def slugs(text):
    """Anchors of a page's headings, as GitHub and MkDocs make them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.M)
    return {re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md", "CHANGELOG.md"])
def test_relative_links(page):
    text = (ROOT / page).read_text()
    for link in LINK.findall(FENCE.sub("", text)):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), f"{page}: {link}"
        assert not anchor or anchor in slugs(target.read_text()), f"{page}: {link} has no such heading"


def test_site_builds(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings_handlers.python")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pages = {path.name: path.read_text() for path in (tmp_path / "site").glob("*.html")}
    assert len(pages) >= len(PAGES)
    for name, text in pages.items():
        # Nothing is loaded from elsewhere; links that a reader follows may lead there.
        assert not re.findall(r'<(?:script|img|link rel="stylesheet")[^>]+(?:src|href)="https?://', text), name
    for name in ("BilevelSFTTrainer", "SelfRefineConfig", "validation_loss_weight", "num_rounds"):
        assert name in pages["api.html"]
    assert "[<code>" not in pages["api.html"]


def test_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    script = runpy.run_path(str(ROOT / "docs/pictures/method.py"))
    script["main"](tmp_path / "method.svg")
    assert (tmp_path / "method.svg").read_text().startswith("<?xml")
    assert (ROOT / "docs/pictures/method.svg").is_file()
