"""Tables of results on other pages are those of the results."""

import pytest

from benchmarks.report import quoted_tables, with_table


@pytest.mark.parametrize("page", list(quoted_tables()), ids=lambda page: page.name)
def test_quoted_tables_are_up_to_date(page):
    name, content = quoted_tables()[page]
    text = page.read_text()
    assert with_table(text, name, content) == text, f"{page.name} is out of date: run `python -m benchmarks.report`."


def test_a_page_without_a_place_is_told():
    with pytest.raises(ValueError, match="No place for the table 'headline'"):
        with_table("text", "headline", "| a |")
