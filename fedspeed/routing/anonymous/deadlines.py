"""How long a member waits for the others in each phase of its attempts. Pure.

A member that waits in vain for one that lies is late for the others, who may be in the next phase by then.
They must wait longer than it does, else honest members would take each other for lost. So each wait is longer
than the one before it. Members need not make the same phases: all that are in an attempt recover together, so
a recovery begins a new count of waits, and so does an attempt.

One case is not covered: a member that waits for another one to begin a sum (`deadline_s`) is late for those
that have heard this one, by more than they wait. They do not go on without it, but end the run, as wherever a
member is silent and its process is not known to be gone (`attempts`).
"""

_PATIENCE = 1 / 64  # of a deadline, by which each wait is longer than the one before
# How many waits there may be at most: until an attempt first recovers, and from one recovery to the next.
_BEFORE_RECOVERY = 14
_PER_RECOVERY = 6
_PER_ATTEMPT = _BEFORE_RECOVERY + _PER_RECOVERY


class Deadlines:
    """The waits of one member, for one sum after the other."""

    def __init__(self, step_deadline_s: float, deadline_s: float):
        """Begin before the first sum.

        Args:
            step_deadline_s: the shortest wait. deadline_s: how long others may take until they begin a sum.
        """
        self._step_deadline_s = step_deadline_s
        self._deadline_s = deadline_s
        self._longest_s = 0.0  # of this sum
        self._late_s = 0.0  # how late others may have left the sum before
        self._attempts = 0
        self._recoveries = 0  # of all attempts of this sum
        self._waits = 0

    def begin_sum(self) -> None:
        """Begin another sum."""
        self._late_s = self._longest_s
        self._longest_s = 0.0
        self._attempts = 0
        self._recoveries = 0

    def next(self, phase: str, *, first: bool) -> float:
        """Return the seconds to wait in the phase that begins.

        Args:
            first: whether others may not have begun this sum.
        """
        self._waits += 1
        if phase == "announce":
            self._attempts += 1
            self._waits = 0
        elif phase == "recover":
            self._recoveries += 1
            self._waits = _BEFORE_RECOVERY
        waits = _PER_ATTEMPT * self._attempts + _PER_RECOVERY * self._recoveries + self._waits
        wait_s = self._step_deadline_s * (1 + waits * _PATIENCE)
        self._longest_s = max(self._longest_s, wait_s)
        return self._deadline_s + self._late_s if first else wait_s

    def longest_sum_s(self, attempts: int, members: int) -> float:
        """Return the seconds that no sum exceeds once all have begun it, even if liars use up each wait.

        Args:
            attempts: at most. members: how many there are. An attempt recovers at most twice for each member,
                in at most two rounds more than there are members.
        """
        recoveries = attempts * 2 * members * (members + 2)
        waits = attempts * _PER_ATTEMPT + recoveries * _PER_RECOVERY
        return waits * self._step_deadline_s * (1 + (waits + _PER_ATTEMPT) * _PATIENCE)
