"""What MkDocs cannot know by itself: files outside of docs/, and the way Hugging Face's docstrings name things."""

import re
from typing import Any

# [`Name`] and [`~module.Name`], as code.
REFERENCE = re.compile(r"\[<code>~?(?:[\w.]+\.)?(\w+)</code>\]")
# The same and other marks inside of a parameter's type.
TYPE = re.compile(r"<code>([^<]*`[^<]*)</code>")
MARKS = (
    (r"\[`~?(?:[\w.]+\.)?(\w+)`\]", r"\1"),
    (r"`\), (\w+) \(`", r", \1: "),
    (r"`|\*(?=optional)|(?<=optional)\*", ""),
)
# Links to files of the repository that are not part of the site.
OUTSIDE = re.compile(r"\[[^\]]+\]\(\.\./([^)]+)\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by MkDocs with the text of each page: paths in place of links that lead out of the site."""
    return OUTSIDE.sub(r"`\1`", markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Called by MkDocs with the HTML of each page."""
    return TYPE.sub(_plain, REFERENCE.sub(r"<code>\1</code>", html))


def _plain(found: re.Match[str]) -> str:
    text = found[1]
    for mark, plain in MARKS:
        text = re.sub(mark, plain, text)
    return f"<code>{text}</code>"
