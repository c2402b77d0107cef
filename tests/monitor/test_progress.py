import contextlib
import errno
import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest

from fedspeed.monitor.progress import BAR_CELLS, NotesOnly, Progress, bar_text, fit_columns, remaining_seconds
from tests.limits import LIMIT_S


class ManualTime:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Terminal:
    """A pseudo-terminal with `columns` columns; `shown()` returns the lines that a user sees at the end."""

    def __init__(self, columns):
        self._master, slave = pty.openpty()
        attributes = termios.tcgetattr(slave)
        attributes[1] &= ~termios.OPOST  # newlines arrive as they were written
        termios.tcsetattr(slave, termios.TCSANOW, attributes)
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.stream = open(slave, "w", encoding="utf-8")  # noqa: SIM115
        self.raw = ""

    def drain(self):
        os.set_blocking(self._master, False)
        try:
            while chunk := os.read(self._master, 65536):
                self.raw += chunk.decode()
        except OSError as error:
            if error.errno != errno.EAGAIN:
                raise
        return self.raw

    def shown(self):
        return [re.sub(r"\x1b\[K", "", line.rsplit("\r", 1)[-1]) for line in self.drain().split("\n")]

    def hang_up(self):
        os.close(self._master)
        self._master = None

    def close(self):
        with contextlib.suppress(OSError):  # what is still buffered has nowhere to go after a hang-up
            self.stream.close()
        if self._master is not None:
            os.close(self._master)


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    made = []

    def make(columns=120):
        made.append(Terminal(columns))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_eta_is_the_median_of_recent_rounds():
    assert remaining_seconds([300.0, 10.0, 12.0], rounds_left=5, elapsed_s=2.0, done_share=0.1) == 58.0


def test_eta_of_the_first_round_comes_from_its_steps():
    assert remaining_seconds([], rounds_left=4, elapsed_s=5.0, done_share=0.5) == 35.0
    assert remaining_seconds([], rounds_left=4, elapsed_s=5.0, done_share=0.0) is None


def test_eta_of_a_round_that_takes_too_long_never_goes_below_the_other_rounds():
    assert remaining_seconds([10.0], rounds_left=3, elapsed_s=500.0, done_share=0.9) == 20.0


@pytest.mark.parametrize(
    ("share", "cells"),
    [(0.0, 0), (0.5, BAR_CELLS // 2), (0.999, BAR_CELLS - 1), (1.0, BAR_CELLS), (1.2, BAR_CELLS)],
)
def test_bar(share, cells):
    assert bar_text(share, "#", "-") == "#" * cells + "-" * (BAR_CELLS - cells)


def test_fit_drops_the_least_important_first_and_keeps_the_order():
    parts = [(9, "round"), (1, "bar"), (5, "loss"), (3, "speed")]
    assert fit_columns(parts, 30) == "round  bar  loss  speed"
    assert fit_columns(parts, 22) == "round  loss  speed"
    assert fit_columns(parts, 12) == "round  loss"
    assert fit_columns(parts, 3) == "rou"


def test_terminal_shows_one_line_that_rewrites_itself(terminal, make_round):
    time = ManualTime()
    screen = terminal()
    progress = Progress(4, screen.stream, now=time)
    for step in range(1, 11):
        time.now += 1.0
        progress.step(1, step, 10, loss=2.0)
    assert screen.shown() == ["round 1/4  " + "█" * 4 + "░" * 12 + "  step 10/10  loss 2.0000  ETA 30s"]
    progress.round(make_round(1))
    time.now += 4.0
    progress.step(2, 5, 10, loss=1.25)
    assert screen.shown() == [
        "round 2/4  "
        + "█" * 6
        + "░" * 10
        + "  step 5/10  loss 1.2500  held-out 1.6000  300 tokens/s  ETA 26s"
    ]
    progress.close()
    assert screen.shown()[1:] == [""]


def test_terminal_shows_the_end_without_an_eta(terminal, make_round):
    screen = terminal()
    progress = Progress(1, screen.stream)
    progress.round(make_round(1))
    assert screen.shown() == ["round 1/1  " + "█" * 16 + "  loss 1.5000  held-out 1.6000  300 tokens/s"]


@pytest.mark.parametrize("columns", [100, 60, 40, 20, 5])
def test_no_line_reaches_the_last_column(terminal, make_round, columns):
    screen = terminal(columns)
    progress = Progress(1000, screen.stream)
    progress.round(make_round(998))
    progress.step(999, 10, 10, loss=1.0)
    for drawn in re.split(r"\r|\x1b\[K", screen.drain()):
        assert len(drawn) < columns
    assert screen.shown()[0].startswith("round 999/1000"[: columns - 1])


def test_steps_are_throttled(terminal):
    time = ManualTime()
    screen = terminal()
    progress = Progress(4, screen.stream, now=time)
    for step in range(1, 1001):
        time.now += 0.001
        progress.step(1, step, 1000)
        # The buffer of a terminal is small: without throttling the writer would wait here forever.
        screen.drain()
    assert 5 <= screen.drain().count("\r") <= 11


def test_a_note_stays_above_the_live_line(terminal, make_round):
    screen = terminal()
    progress = Progress(4, screen.stream)
    progress.round(make_round(1))
    progress.note("something to remember")
    progress.round(make_round(2))
    lines = screen.shown()
    assert lines[0] == "something to remember"
    assert lines[1].startswith("round 3/4")


def test_a_dumb_terminal_gets_plain_lines(terminal, make_round, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    screen = terminal()
    Progress(4, screen.stream).round(make_round(1))
    assert "\r" not in screen.drain()
    assert screen.drain().endswith("\n")


def test_a_log_gets_one_line_per_round(make_round):
    log = io.StringIO()
    progress = Progress(2, log)
    for number in (1, 2):
        for step in range(1, 11):
            progress.step(number, step, 10, loss=9.0)
        progress.round(make_round(number, val_exact=0.125 if number == 2 else None))
    progress.close()
    assert log.getvalue() == (
        "round 1/2  loss 1.5000  held-out 1.6000  300 tokens/s  10s  ETA 10s\n"
        "round 2/2  loss 1.0000  held-out 1.0667  exact 12.5 %  300 tokens/s  10s\n"
    )


def test_a_log_hears_of_a_long_round_once_a_minute():
    log = io.StringIO()
    time = ManualTime()
    progress = Progress(2, log, now=time)
    for step in range(1, 151):
        time.now += 1.0
        progress.step(1, step, 300, loss=2.5)
    assert (
        log.getvalue()
        == "round 1/2  step 60/300  loss 2.5000  ETA 9m 00s\nround 1/2  step 120/300  loss 2.5000  ETA 8m "
        "00s\n"
    )


def test_a_resumed_run_counts_on(terminal):
    screen = terminal()
    Progress(10, screen.stream, resume_round=5).step(6, 1, 2)
    assert screen.shown()[0].startswith("round 6/10  " + "█" * 8)


def test_losses_before_training_are_no_round(make_round):
    log = io.StringIO()
    Progress(3, log).round(make_round(0, train_loss=None, val_loss=4.0, tokens=0, seconds=99.0))
    assert log.getvalue() == "round 0/3  held-out 4.0000\n"


class Broken(io.StringIO):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, text):
        raise self.error


@pytest.mark.parametrize(
    "error",
    [
        BrokenPipeError(),
        OSError(errno.EIO, "gone"),
        ValueError("I/O operation on closed file"),
        UnicodeEncodeError("ascii", "x", 0, 1, "no"),
    ],
)
def test_a_stream_that_fails_never_stops_the_run(error, make_round):
    for display in (Progress(3, Broken(error)), NotesOnly(Broken(error))):
        display.round(make_round(1))
        display.note("hello")
        display.step(2, 1, 1)
        display.close()


def test_a_closed_stream_and_no_stream_at_all(make_round, monkeypatch):
    closed = io.StringIO()
    closed.close()
    Progress(3, closed).round(make_round(1))
    monkeypatch.setattr(sys, "stderr", None)
    Progress(3).round(make_round(1))


def test_a_terminal_that_hangs_up(terminal, make_round):
    screen = terminal()
    progress = Progress(3, screen.stream)
    progress.round(make_round(1))
    screen.hang_up()
    with pytest.raises(OSError, match="Input/output error"):
        print("anything", file=screen.stream, flush=True)
    progress.round(make_round(2))
    progress.close()


def test_an_ascii_terminal_gets_an_ascii_bar():
    code = "from fedspeed.monitor.progress import Progress; Progress(2).step(1, 1, 1, loss=1.0)"
    master, slave = pty.openpty()
    try:
        environment = os.environ | {"PYTHONIOENCODING": "ascii:strict", "TERM": "xterm"}
        subprocess.run(
            [sys.executable, "-c", code], stderr=slave, check=True, timeout=LIMIT_S, env=environment
        )
        assert b"########--------" in os.read(master, 4096)
    finally:
        os.close(slave)
        os.close(master)
