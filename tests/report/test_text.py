"""Hostile text: cleaned, and embedded without a way out."""

import json
import math

import pytest

from tests.report.conftest import HOSTILE
from trl_bilevel.report.text import clean, script_json


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("a\tb\nc\r\nd", "a\tb\nc\nd"),
        ("\x00\x1b[31m", "⟨U+0000⟩⟨U+001B⟩[31m"),
        ("a\u202eb", "a⟨U+202E⟩b"),
        ("\ud800x", "\ufffdx"),
        ("שלום 🙂", "שלום 🙂"),
        (None, "None"),
    ],
)
def test_hidden_characters_are_written_out(text, cleaned):
    assert clean(text) == cleaned


def test_long_text_is_cut_and_says_so():
    assert clean("word " * 100, 10) == "word word …"
    assert clean("short", 10) == "short"


def test_json_in_a_script_element_keeps_every_value():
    value = {"rows": HOSTILE, "nan": math.nan, "inf": -math.inf, "n": 3, "b": True, "x": None, "</script>": [1.5]}
    text = script_json(value)
    assert not set(text) & set("<>&\u2028\u2029") and all(ord(c) >= 32 for c in text)
    text.encode("utf-8")
    found = json.loads(text)
    assert found["rows"] == [clean(part) for part in HOSTILE]
    assert found["nan"] is None and found["inf"] is None and found["</script>"] == [1.5]
