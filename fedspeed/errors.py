"""Every error a user can meet, and the exit code it ends with.

A message says what was wrong, where, and what to do about it. `ValueError`-like faults of the user derive
from `FedSpeedError`; a broken invariant of ours stays an `assert`.
"""

import re

EXIT_OK = 0
EXIT_FAILED = 1  # an unexpected error: a bug of ours, or of a library
EXIT_USAGE = 2  # bad input: config, hostfile, data, model, journal
EXIT_RESUMABLE = 75  # EX_TEMPFAIL: a rank was lost or the job was preempted; the same command resumes


class FedSpeedError(Exception):
    """Base of all errors that are reported as one message without a traceback.

    Args:
        reason: what was wrong, where; and what to do about it, where that is not given apart.
        remedy: what to do about it. The message is both.
    """

    exit_code = EXIT_USAGE
    printed_as_json = False  # whether it was told on stdout already, as `--json` tells it

    def __init__(self, reason: str = "", *, remedy: str = ""):
        super().__init__(f"{reason}; {remedy}" if remedy else reason)
        self.reason = str(reason)
        self.remedy = remedy


class ConfigError(FedSpeedError):
    """The run's configuration is wrong. Carries every problem found, not only the first one.

    Args:
        problems: one line per problem, each naming its place, its value and its remedy.
    """

    def __init__(self, problems):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        head = "" if len(self.problems) == 1 else f"{len(self.problems)} problems in the configuration:\n  - "
        super().__init__(head + "\n  - ".join(self.problems))


class HostfileError(FedSpeedError):
    """The hostfile, or what the launcher says about the hosts, is wrong or contradictory."""


class DataError(FedSpeedError):
    """A data file is missing, unreadable or leaves a client without rows."""


class ModelError(FedSpeedError):
    """A model folder, a weight file, a tokenizer or an adapter is missing or does not fit."""


class PlanError(FedSpeedError):
    """No way to execute a task on the hardware, or too little is known of it.

    Args:
        changes: what would make it fit (planner.changes.Change), the smallest first.
    """

    def __init__(self, message, changes=()):
        super().__init__(message)
        self.changes = tuple(changes)


class JournalError(FedSpeedError):
    """The round journal is damaged or belongs to another run."""


class MissingPackage(FedSpeedError):
    """This Python lacks what the run needs.

    Args:
        names: of the packages.
    """

    def __init__(self, names, python: str):
        several = "are" if len(names) > 1 else "is"
        super().__init__(
            f"{', '.join(names)} {several} not installed for {python}; activate the virtual environment "
            "(source .venv/bin/activate) "
            "or start with .venv/bin/python (`python -m fedspeed doctor` lists all that is missing)"
        )


class LostPeerError(FedSpeedError):
    """A rank or client did not answer in time; names the missing ones. The same command resumes."""

    exit_code = EXIT_RESUMABLE


class Preempted(FedSpeedError):
    """The scheduler asked the run to end (SIGTERM); the last round is in the journal."""

    exit_code = EXIT_RESUMABLE


def connection_text(error: BaseException) -> str:
    """What torch says of a broken connection, without its source file and its advice to its own
    developers.
    """
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return re.sub(r"^\[\S+:\d+\] ", "", line).partition(". This is typically")[0]
