"""The line about work that takes long, and what a run that is asked to end was at."""

import io
import signal

import numpy as np
import pytest

from fedspeed import activity
from fedspeed.errors import ConfigError, Preempted
from fedspeed.monitor.activity_line import MIN_SHOWN_S, ActivityLine
from fedspeed.session.coordination import StopFlag
from tests.monitor.test_progress import ManualTime, Terminal


@pytest.fixture
def clock(monkeypatch):
    clock = ManualTime()
    monkeypatch.setattr(activity.time, "monotonic", clock)
    return clock


def test_a_log_says_what_takes_long_once_and_then_once_a_minute(clock):
    stream = io.StringIO()
    activity_line = ActivityLine(stream, clock)
    with activity.during("the evaluation before round 1", 40, "batch"):
        for second in range(130):
            clock.now = float(second)
            activity_line.update()
            if second % 5 == 4:
                activity.advance()
    assert stream.getvalue().splitlines() == [
        "evaluation before round 1  batch 2 of 40  ETA 3m 15s",
        "evaluation before round 1  batch 14 of 40  ETA 2m 15s",
        "evaluation before round 1  batch 26 of 40  ETA 1m 15s",
    ]


def test_what_is_short_is_not_shown(clock):
    stream = io.StringIO()
    activity_line = ActivityLine(stream, clock)
    for _ in range(10):
        with activity.during("the loading of the base", 3, "part"):
            clock.now += MIN_SHOWN_S - 0.1
            activity_line.update()
    with activity.during("round 1", 10, "local step", quiet=True):
        clock.now += 1000
        activity_line.update()
    assert stream.getvalue() == ""


def test_work_of_unknown_length_says_how_long_it_has_taken(clock):
    stream = io.StringIO()
    with activity.during("the export of the model"):
        clock.now = 7.0
        ActivityLine(stream, clock).update()
    assert stream.getvalue() == "export of the model  7.0s so far\n"


def test_a_terminal_has_one_line_that_goes_away(clock, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal(80)
    activity_line = ActivityLine(terminal.stream, clock)
    with activity.during("the loading of the base", 4, "part"):
        activity.advance(2)
        for clock.now in (6.0, 8.0):
            activity_line.update()
        assert terminal.shown() == ["loading of the base  ████████░░░░░░░░  part 3 of 4  ETA 8.0s"]
    activity_line.update()
    assert terminal.shown() == [""]
    terminal.close()


def test_it_looks_by_itself_and_ends(monkeypatch):
    monkeypatch.setattr("fedspeed.monitor.activity_line.POLL_S", 0.01)
    monkeypatch.setattr("fedspeed.monitor.activity_line.MIN_SHOWN_S", 0.0)
    stream = io.StringIO()
    with ActivityLine(stream) as activity_line, activity.during("the report"):
        while not stream.getvalue():
            activity_line._ended.wait(0.01)
    assert stream.getvalue().startswith("report  ") and not activity_line._thread.is_alive()


def test_counted_work_ends_with_its_items_and_with_an_error():
    seen = [(item, activity.describe_current()) for item in activity.counted("ab", "the loading", "part")]
    assert (
        seen == [("a", "the loading, part 1 of 2"), ("b", "the loading, part 2 of 2")]
        and activity.describe_current() == ""
    )
    with pytest.raises(ValueError), activity.during("the outer", 3, "step"), activity.during("the inner"):
        assert activity.describe_current() == "the inner"
        raise ValueError
    assert activity.current() is None


@pytest.fixture
def stop():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield StopFlag()
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_run_that_is_asked_to_end_before_its_rounds_says_where_it_was(stop):
    with activity.during("the evaluation before round 1", 40, "batch"):
        activity.advance(11)
        with pytest.raises(
            Preempted,
            match="asked to end during the evaluation before round 1, batch 12 of 40; the same command goes "
            "on",
        ):
            signal.raise_signal(signal.SIGTERM)
    with pytest.raises(Preempted, match="asked to end before a round had begun"):
        signal.raise_signal(signal.SIGUSR1)


def test_a_run_that_is_asked_to_end_in_a_round_tells_it_once(stop):
    told = []
    stop.in_rounds = True
    stop.on_request = told.append
    with activity.during("round 3", 10, "local step", quiet=True):
        for _ in range(2):
            signal.raise_signal(signal.SIGTERM)
    assert told == ["round 3, local step 1 of 10"] and stop()


def test_an_audit_shows_how_far_it_is(monkeypatch):
    from fedspeed.config.run import RunConfig
    from fedspeed.routing.audit.adversary import Coalition
    from fedspeed.session import audit

    seen = []
    observe = audit.observe
    monkeypatch.setattr(
        audit, "observe", lambda *args: seen.append(activity.describe_current()) or observe(*args)
    )
    updates = [np.random.default_rng(i).standard_normal((3, 12)).astype(np.float32) for i in range(3)]
    audit.play_all("mix", updates, Coalition(frozenset(range(3))), RunConfig(), 0)
    assert (
        seen == [f"the exchange by mix, round {i} of 3" for i in (1, 2, 3)]
        and activity.describe_current() == ""
    )
    with pytest.raises(ConfigError, match="no cells in two consecutive rounds"):
        audit.play_all("mix", updates[:1], Coalition(frozenset(range(3))), RunConfig(), 0)
