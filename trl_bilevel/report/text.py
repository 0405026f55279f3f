"""Text of unknown origin, made fit to be shown: rows and responses are hostile input."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from markupsafe import Markup

# Characters that change how the text around them is shown, or show nothing: written out, so that a reader sees them.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u202a-\u202e\u2028\u2029\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ufdd0-\ufdef\ufffe\uffff\U000e0000-\U000e007f]"
)
_SURROGATES = re.compile("[\ud800-\udfff]")
_SCRIPT = str.maketrans({c: f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"})
# Columns that hold text of a row, in the order of preference.
CONVERSATIONS = ("messages", "conversations")


def clean(text: Any, limit: int | None = None) -> str:
    """Text with hidden characters written out (`U+202E` in angle brackets), of at most `limit` characters, `…` added.

    Half a surrogate pair, which no file can hold, becomes U+FFFD.
    """
    text = str(text).replace("\r\n", "\n")
    if limit is not None and len(text) > limit:
        text = text[:limit].rstrip() + " …"
    return _HIDDEN.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", _SURROGATES.sub("\ufffd", text))


def script_json(value: Any) -> Markup:
    """A value as JSON for a `<script type="application/json">` element: no text in it can end the element.

    NaN and infinity become null; texts are cleaned.
    """
    from markupsafe import Markup

    plain = json.dumps(_plain(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Markup(plain.translate(_SCRIPT))


def _plain(value: Any) -> Any:
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        # Four digits are more than a reader compares, and half the file.
        return float(f"{float(value):.5g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {clean(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return clean(value)


def content(part: Any) -> str:
    """A prompt or completion as text: text, or messages, whose contents may come in parts."""
    if part is None:
        return ""
    if isinstance(part, Mapping):
        inner = part.get("content", part.get("value", part.get("text")))
        return content(inner) if inner is not None else ""
    if isinstance(part, list | tuple):
        return "\n".join(text for text in map(content, part) if text)
    return str(part)


def turns(messages: list[Any]) -> str:
    """Messages as text, each with its role; of a single one the content alone."""
    if len(messages) == 1:
        return content(messages[0])
    return "\n".join(f"{m.get('role', m.get('from', '?'))}: {content(m)}" for m in messages if isinstance(m, Mapping))


def question_and_answer(row: Mapping[str, Any], text_field: str = "text") -> tuple[str, str]:
    """What a training row asks and what it answers; either may be empty."""
    for name in CONVERSATIONS:
        messages = row.get(name)
        if isinstance(messages, list) and messages:
            return turns(messages[:-1]) if len(messages) > 1 else "", content(messages[-1])
    if "completion" in row:
        prompt = row.get("prompt")
        asked = turns(prompt) if isinstance(prompt, list) else content(prompt)
        return asked, content(row["completion"])
    if text_field in row:
        return "", content(row[text_field])
    texts = {name: value for name, value in row.items() if isinstance(value, str)}
    if texts:
        return "", "\n".join(f"{name}: {value}" for name, value in texts.items())
    return "", "(no text in this row)"
