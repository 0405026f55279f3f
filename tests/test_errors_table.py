"""The written table of bad input holds what the tests hold: each compares its own message, these look at the whole."""

from pathlib import Path

import pytest

from tests import errors_table


def test_no_row_is_left_of_a_test_that_is_gone():
    sources = {file for file in Path(__file__).parent.rglob("test_*.py") if "bad_input" in file.read_text()}
    if not sources <= errors_table.FILES | {Path(__file__)}:
        pytest.skip("a part of the tests is run")
    cases = set(errors_table.CASES)
    assert len(cases) == len(errors_table.CASES), "two cases of a section have the same description"
    left = [row for row in errors_table.table() if row not in cases]
    assert not left, f"docs/errors.md has rows of no test: {left}. Run `make errors-table`."


def test_the_table_is_long_enough_to_be_of_use():
    assert len(errors_table.table()) >= 100


def test_a_written_table_reads_back(tmp_path):
    file = tmp_path / "errors.md"
    errors_table.write_table(file, [("A", "x", "ValueError", "a \\| b"), ("B", "`y`", "exit 1", "no")])
    read = errors_table.table(file)
    assert read == {("A", "x"): ("ValueError", "a \\| b"), ("B", "`y`"): ("exit 1", "no")}
