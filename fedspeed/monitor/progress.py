"""The progress line on stderr: round, step, losses, speed and remaining time.

On a terminal the line is rewritten in place. In a log (a file, a pipe, a scheduler) each round is one line,
and a long round writes a line every minute. Nothing here may stop a run: a closed terminal ends the display,
not the training.
"""

import math
import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import TextIO

from fedspeed.monitor.metrics.metric import UNITS
from fedspeed.monitor.records import RoundRecord
from fedspeed.units import count_text, loss_text, seconds_text

TERMINAL_INTERVAL_S = 0.1
LOG_INTERVAL_S = 60.0
RECENT_ROUNDS = 7
BAR_CELLS = 16
DEFAULT_COLUMNS = 80


def remaining_seconds(
    recent_s: list[float], rounds_left: int, elapsed_s: float, done_share: float
) -> float | None:
    """Estimate the seconds to the end of the run; None if there is nothing to estimate them from.

    The median of recent rounds is not affected by a first round that compiles or by a round that waited for a
    late client. Before any round has finished, the finished local steps of the first round are extrapolated.

    Args:
        recent_s: wall seconds of the last rounds of this start.
        rounds_left: unfinished rounds, including the current one.
        elapsed_s: seconds since the current round began.
        done_share: share of the current round's local steps that is finished, in [0, 1].
    """
    if recent_s:
        per_round_s = statistics.median(recent_s)
    elif done_share > 0.0:
        per_round_s = elapsed_s / done_share
    else:
        return None
    return max(0.0, per_round_s * rounds_left - min(elapsed_s, per_round_s))


def bar_text(share: float, filled: str, empty: str) -> str:
    """Draw a bar of BAR_CELLS characters, a share in [0, 1] of which is filled."""
    cells = min(BAR_CELLS, math.floor(share * BAR_CELLS + 1e-9))
    return filled * cells + empty * (BAR_CELLS - cells)


def fit_columns(parts: list[tuple[int, str]], columns: int) -> str:
    """Join texts by two spaces; while the result is wider than `columns`, drop the least important text.

    Args:
        parts: (importance, text).
    """
    kept = list(parts)
    while len(kept) > 1 and len("  ".join(text for _, text in kept)) > columns:
        kept.remove(min(kept, key=lambda part: part[0]))
    return "  ".join(text for _, text in kept)[:columns]


class Progress:
    """The progress line of the reporting rank.

    Args:
        stream: a text stream; None: sys.stderr, and a process without one shows nothing.
        resume_round: rounds that were finished before this start.
        now: returns monotonic seconds.
    """

    def __init__(
        self,
        total_rounds: int,
        stream: TextIO | None = None,
        resume_round: int = 0,
        now: Callable[[], float] = time.monotonic,
    ):
        self._total_rounds = total_rounds
        self._stream = Stream(stream)
        self._now = now
        self._terminal = self._stream.is_terminal
        self._recent_s: deque[float] = deque(maxlen=RECENT_ROUNDS)
        self._began = now()
        self._drawn = -math.inf if self._terminal else now()
        self._position = (resume_round + 1, 0, 1)
        self._train_loss: float | None = None
        self._val_loss: float | None = None
        self._val_exact: float | None = None
        self._tokens_per_s: float | None = None
        self._line_open = False

    def step(self, round_number: int, local_step: int, local_steps: int, loss: float | None = None) -> None:
        """Show that `local_step` (from 1) of `local_steps` of this round is finished."""
        self._position = (round_number, local_step, local_steps)
        if loss is not None:
            self._train_loss = loss
        now = self._now()
        if now - self._drawn < (TERMINAL_INTERVAL_S if self._terminal else LOG_INTERVAL_S):
            return
        self._drawn = now
        self._draw(self._running_parts())

    def round(self, record: RoundRecord) -> None:
        """Show a finished round."""
        if record.round:
            self._recent_s.append(record.seconds)
            self._tokens_per_s = record.tokens_per_s
        self._began = self._now()
        self._drawn = self._began
        self._train_loss = record.train_loss if record.train_loss is not None else self._train_loss
        self._val_loss = record.val_loss if record.val_loss is not None else self._val_loss
        self._val_exact = record.val_exact if record.val_exact is not None else self._val_exact
        self._position = (record.round + 1, 0, 1)
        if self._terminal:
            self._draw(self._running_parts())
        else:
            self._draw(self._round_parts(record))

    def note(self, text: str) -> None:
        """Write a line that stays, above the progress line."""
        self._stream.write(f"\r\x1b[K{text}\n" if self._terminal else f"{text}\n")
        self._line_open = False

    def close(self) -> None:
        """Move the cursor to a new line."""
        if self._line_open:
            self._stream.write("\n")
            self._line_open = False

    def _remaining(self) -> list[tuple[int, str]]:
        round_number, local_step, local_steps = self._position
        rounds_left = self._total_rounds - round_number + 1
        left = remaining_seconds(
            list(self._recent_s), rounds_left, self._now() - self._began, local_step / max(1, local_steps)
        )
        return [] if left is None else [(80, f"ETA {seconds_text(left)}")]

    def _running_parts(self) -> list[tuple[int, str]]:
        round_number, local_step, local_steps = self._position
        share = (round_number - 1 + local_step / max(1, local_steps)) / self._total_rounds
        ended = round_number > self._total_rounds
        parts = [(100, f"round {min(round_number, self._total_rounds)}/{self._total_rounds}")]
        if self._terminal:
            parts.append((20, bar_text(share, *self._stream.bar_characters)))
        if local_step and not ended:
            parts.append((60, f"step {local_step}/{local_steps}"))
        parts += self._loss_parts()
        if self._tokens_per_s is not None:
            parts.append((40, f"{count_text(self._tokens_per_s)} tokens/s"))
        return parts if ended else parts + self._remaining()

    def _round_parts(self, record: RoundRecord) -> list[tuple[int, str]]:
        parts = [(100, f"round {record.round}/{self._total_rounds}"), *self._loss_parts()]
        if record.round:
            if record.tokens_per_s is not None:
                parts.append((40, f"{count_text(record.tokens_per_s)} tokens/s"))
            parts.append((40, seconds_text(record.seconds)))
        return parts if record.round >= self._total_rounds else parts + self._remaining()

    def _loss_parts(self) -> list[tuple[int, str]]:
        parts: list[tuple[int, str]] = []
        if self._train_loss is not None:
            parts.append((90, f"loss {loss_text(self._train_loss)}"))
        if self._val_loss is not None:
            parts.append((70, f"held-out {loss_text(self._val_loss)}"))
        if self._val_exact is not None:
            parts.append((30, f"exact {UNITS['accuracy'].text(self._val_exact)}"))
        return parts

    def _draw(self, parts: list[tuple[int, str]]) -> None:
        if self._terminal:
            # One column stays free: a character in the last one makes some terminals wrap, so that the line
            # could not be rewritten in place.
            self._stream.write("\r" + fit_columns(parts, self._stream.columns() - 1) + "\x1b[K")
            self._line_open = True
        else:
            self._stream.write("  ".join(text for _, text in parts) + "\n")


class NotesOnly:
    """The display with `monitor.progress=false`: no progress line, only notes that a user must not miss."""

    def __init__(self, stream: TextIO | None = None):
        self._stream = Stream(stream)

    def step(self, round_number: int, local_step: int, local_steps: int, loss: float | None = None) -> None:
        """Ignore a step."""

    def round(self, record: RoundRecord) -> None:
        """Ignore a round."""

    def note(self, text: str) -> None:
        """Write a line."""
        self._stream.write(f"{text}\n")

    def close(self) -> None:
        """Do nothing."""


class Stream:
    """A text stream that may be missing, closed or narrow, or lack characters. Writing to it never raises."""

    def __init__(self, stream: TextIO | None):
        self._stream: TextIO | None = sys.stderr if stream is None else stream

    @property
    def is_terminal(self) -> bool:
        """Tell whether a line on the stream can be rewritten in place."""
        if self._stream is None:
            return False
        try:
            return self._stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        except (AttributeError, OSError, ValueError):
            return False

    @property
    def bar_characters(self) -> tuple[str, str]:
        """Return the characters of a bar that the stream can encode: (filled, empty)."""
        try:
            "█░".encode(getattr(self._stream, "encoding", None) or "ascii")
        except (UnicodeEncodeError, LookupError):
            return "#", "-"
        return "█", "░"

    def columns(self) -> int:
        """Return the current width, since a window can be resized."""
        if self._stream is None:
            return DEFAULT_COLUMNS
        try:
            return os.get_terminal_size(self._stream.fileno()).columns or DEFAULT_COLUMNS
        except (AttributeError, OSError, ValueError):
            return DEFAULT_COLUMNS

    def write(self, text: str) -> None:
        """Write a text, and nothing more after the first failure."""
        if self._stream is None:
            return
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):  # closed, or it cannot encode a character
            self._stream = None
