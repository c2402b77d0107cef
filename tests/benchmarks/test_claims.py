"""docs/claims.md: its tables are those of the kept results."""

import pytest

from benchmarks.compare import claims


def test_tables_are_those_of_the_results():
    page = claims.PAGE.read_text(encoding="utf-8")
    assert claims.filled(page, claims.tables()) == page, "run `python -m fedspeed bench claims`"


def test_a_table_goes_between_its_marks():
    page = "a\n<!-- x -->\nold\n<!-- end of x -->\nb <!-- y --><!-- end of y -->"
    assert claims.filled(page, {"x": r"new \1"}) == page.replace("old", r"new \1")
    with pytest.raises(AssertionError, match="no place for the table z"):
        claims.filled(page, {"z": "new"})


def test_a_goal_is_reached_from_its_value_on():
    assert claims.verdict(17.0, 17.0) == "reached"
    assert claims.verdict(16.999, 17.0) == "not reached"
    assert claims.verdict(None, 17.0) == "-"
