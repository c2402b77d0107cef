"""docs/claims.md: its tables are those of the kept results."""

import pytest

from benchmarks.compare.claims import tables as claims
from tests.benchmarks.test_compare import a_bench, a_run

LOSSES = {0: (4.0, 2.0), 1: (4.0, 3.0, 2.0)}


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


def test_time_to_a_target_is_steps_times_the_seconds_of_a_step():
    """Ours needs 10 and 20 steps; SPRY 30 and 60, each of two directions, which take half a step of ours."""
    ours = [a_run(seed=s, losses=losses, arguments=("train.local_steps=10",)) for s, losses in LOSSES.items()]
    curves = {0: (9.0, 5.0, 4.0, 1.0), 1: (9.0, 5.0, 4.0, 3.0, 3.0, 3.0, 1.0)}
    theirs = [
        a_run("spry", seed, curve, arguments=("train.local_steps=10", f"{claims.DIRECTIONS}=2"))
        for seed, curve in curves.items()
    ]
    bench = a_bench([*ours, *theirs], target=2.0)
    rates = {"fedspeed": 100.0, "spry": 200.0}
    methods = [{"method": name, "training_tokens_s": rate} for name, rate in rates.items()]
    case = {"model": f"x-{claims.TARGET_MODEL}", "methods": methods}
    text = claims.target_table(bench, {"cases": [case]})
    assert "| SPRY | 45 | 3x, 3 to 3 | 1.00x (2 directions) | 3x, 3 to 3 | not reached |" in text
    assert claims.steps_to_target(bench, "spry") == {0: 30.0, 1: 60.0}


def test_a_goal_within_an_interval_is_reached_by_the_mean_only():
    found = [claims._sure_verdict(claims.Interval(20.0, low, 30.0), 17.0) for low in (18.0, 5.0, None)]
    assert found == ["reached", *["reached by the mean, not by the whole interval"] * 2]
    assert claims._sure_verdict(claims.Interval(16.0, 5.0, 30.0), 17.0) == "not reached"
    assert claims._sure_verdict(None, 17.0) == "-"
