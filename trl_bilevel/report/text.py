"""Text of unknown origin, made fit to be shown: rows and responses are hostile input. And the report's own words."""

import json
import re
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from ..data.files import finite

FOLDER = Path(__file__).parent / "templates"
# Characters that change how the text around them is shown, or show nothing: written out, so that a reader sees them.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u202a-\u202e\u2028\u2029\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ufdd0-\ufdef\ufffe\uffff\U000e0000-\U000e007f]"
)
# Half a pair, which no file can hold.
_SURROGATES = re.compile("[\ud800-\udfff]")
_SCRIPT = str.maketrans({c: f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"})


def clean(text: Any, limit: int | None = None) -> str:
    """Text with hidden characters written out (⟨U+202E⟩), of at most `limit` characters, `…` added."""
    text = str(text).replace("\r\n", "\n")
    if limit is not None and len(text) > limit:
        text = text[:limit].rstrip() + " …"
    return _HIDDEN.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", _SURROGATES.sub("\ufffd", text))


def script_json(value: Any) -> Markup:
    """A value as JSON, texts cleaned, for a `<script type="application/json">` element: none of them can end it."""
    plain = json.dumps(finite(value, clean), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Markup(plain.translate(_SCRIPT))


def signed(value: float, digits: int = 4) -> str:
    """A difference with its sign; the minus is one."""
    return f"{value:+.{digits}f}".replace("-", "−")


def duration(seconds: float) -> str:
    """Seconds in words."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


# HTML: all values are cleaned and escaped.
TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(FOLDER),
    autoescape=True,
    finalize=lambda value: clean(value) if type(value) is str else value,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)
TEMPLATES.filters |= {"f": format, "clean": clean, "signed": signed, "duration": duration}
TEMPLATES.filters["said"] = lambda value, sentence: None if value is None else sentence.format(value)
# Plain text: cleaned, and escaped where it becomes part of the page.
SENTENCES = TEMPLATES.overlay(autoescape=False, trim_blocks=False)


def fill(text: str, facts: dict[str, Any]) -> str:
    """A text of `words.toml` with its facts filled in, on one line."""
    return " ".join(SENTENCES.from_string(text).render(facts).split())
