"""docs/claims.md, README.md and the pages of the kept results: they are those of the results' values."""

import json

import pytest

from benchmarks.compare.causes import report as causes
from benchmarks.compare.claims import tables as claims
from benchmarks.compare.emulated import report as emulated
from benchmarks.compare.measured import report as measured
from benchmarks.compare.measured.records import read
from benchmarks.compare.memory import records as memory_records
from benchmarks.compare.memory import report as memory_report
from benchmarks.compare.outside import page as outside
from benchmarks.compare.scale import report as scale
from benchmarks.compare.simulated import report as simulated
from tests.benchmarks.test_compare import a_bench, a_run

DIRECTIONS = "federation.method.perturbations=2"
LOSSES = {0: (4.0, 2.0), 1: (4.0, 3.0, 2.0)}


def test_tables_are_those_of_the_results():
    for path, tables in claims.tables().items():
        page = path.read_text(encoding="utf-8")
        assert claims.filled(page, tables) == page, f"{path}: run `python -m fedspeed bench claims`"


def values_of(name):
    return json.loads((claims.RESULTS / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("name", "page"),
    [
        ("quick/bench", lambda path: measured.page(read(path))),
        ("target/bench", lambda path: measured.page(read(path))),
        ("memory", lambda path: memory_report.page(memory_records.read(path))),
        ("simulated", lambda _: simulated.page(values_of("simulated"))),
        ("emulated", lambda _: emulated.page(values_of("emulated"))),
        ("scale", lambda _: scale.page(values_of("scale"))),
        ("causes", lambda _: causes.page(values_of("causes"))),
        ("outside", lambda _: outside.page(values_of("outside"))),
    ],
)
def test_a_kept_page_is_that_of_its_values(name, page):
    path = claims.RESULTS / f"{name}.json"
    assert page(path) == path.with_suffix(".md").read_text(encoding="utf-8")


def emulated_run(way, compute, *settings, rest=0.0):
    """A run of two local steps that took so many seconds together, and of as long a rest of its round."""
    facts = {"model": f"x-{claims.TARGET_MODEL}", "time_scale": 1.0, "local_steps": 2}
    emulated = {"compute": compute, "round": compute + rest}
    return {"way": way, "settings": list(settings), "emulated": emulated, **facts}


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
    """Ours needs 10 and 20 steps, SPRY 30 and 60. In ten steps, with its two directions, SPRY computes for
    40 s and we for 20 s; the rest of a round, of any length, takes it 2 s and us 1 s.
    """
    ours = [a_run(seed=s, losses=losses, arguments=("train.local_steps=10",)) for s, losses in LOSSES.items()]
    curves = {0: (9.0, 5.0, 4.0, 1.0), 1: (9.0, 5.0, 4.0, 3.0, 3.0, 3.0, 1.0)}
    theirs = [
        a_run("spry", seed, curve, arguments=("train.local_steps=10", DIRECTIONS))
        for seed, curve in curves.items()
    ]
    bench = a_bench([*ours, *theirs], target=2.0)
    runs = [
        emulated_run("fedspeed", 4.0, rest=1.0),
        emulated_run("spry", 3.0, rest=9.0),
        emulated_run("spry", 8.0, DIRECTIONS, rest=2.0),
    ]
    text = claims.target_table(bench, {"runs": runs})
    assert "| SPRY | 45 | 3x, 3 to 3 | 2.00x | 6x, 6 to 6 | not reached |" in text
    assert claims.steps_to_target(bench, "spry") == {0: 30.0, 1: 60.0}


def test_no_ratio_is_of_the_seeds_that_reach_the_target_only():
    ours = [a_run(seed=s, losses=losses, arguments=("train.local_steps=10",)) for s, losses in LOSSES.items()]
    theirs = [
        a_run("spry", seed, curve, arguments=("train.local_steps=10",))
        for seed, curve in {0: (9.0, 1.0), 1: (9.0, 8.0)}.items()
    ]
    runs = [emulated_run("fedspeed", 4.0), emulated_run("spry", 3.0)]
    text = claims.target_table(a_bench([*ours, *theirs], target=2.0), {"runs": runs})
    assert "| SPRY | 10; 1 of 2 seeds never | - | 0.75x | - | not reached by all seeds |" in text


def test_a_goal_within_an_interval_is_reached_by_the_mean_only():
    found = [claims._sure_verdict(claims.Interval(20.0, low, 30.0), 17.0) for low in (18.0, 5.0, None)]
    assert found == ["reached", *["reached by the mean, not by the whole interval"] * 2]
    assert claims._sure_verdict(claims.Interval(16.0, 5.0, 30.0), 17.0) == "not reached"
    assert claims._sure_verdict(None, 17.0) == "-"
