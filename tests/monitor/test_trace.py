"""Traces: spans of the requested rounds in the format of Perfetto, and their picture."""

import json

from fedspeed.monitor import plots
from fedspeed.monitor.clock import StageClock
from fedspeed.monitor.trace import Trace, read_spans


def traced(folder, rank, rounds, trained):
    trace = Trace(folder, rank, rounds)
    clock = StageClock(trace=trace)
    for number in range(1, trained + 1):
        trace.round(number)
        with clock.stage("compute"):
            with clock.stage("gather"):
                pass
            trace.span("compute", f"forward {number}", 10.0 + number, 10.5 + number)
    trace.close()


def test_the_first_rounds_are_kept(tmp_path):
    traced(tmp_path, 3, rounds=2, trained=5)
    events = json.loads((tmp_path / "trace" / "rank-3.json").read_text())["traceEvents"]
    assert [e["name"] for e in events if e.get("cat") == "compute"] == ["forward 1", "forward 2"]
    assert all(e["pid"] == 3 and e["ph"] in "XM" for e in events)
    assert sorted(e["name"] for e in events if e.get("cat") == "stage") == [
        "compute",
        "compute",
        "gather",
        "gather",
    ]


def test_a_run_that_ends_earlier_leaves_what_there_is(tmp_path):
    traced(tmp_path, 0, rounds=9, trained=1)
    traced(tmp_path, 1, rounds=9, trained=2)
    (tmp_path / "trace" / "rank-7.json").write_text("{")
    spans = read_spans(tmp_path)
    assert list(spans) == [0, 1] and min(begin for own in spans.values() for _, _, begin, _ in own) == 0.0
    assert plots.png(plots.timeline_figure(spans))[:4] == b"\x89PNG"


def test_without_rounds_nothing_is_written(tmp_path):
    assert read_spans(tmp_path) == {}
    traced(tmp_path, 0, rounds=1, trained=0)
    assert not (tmp_path / "trace").exists()
