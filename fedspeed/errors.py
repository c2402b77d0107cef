"""Errors that are reported to the user, and the exit code of each.

A message says what was wrong, where, and what to do about it. Mistakes of the user derive from
`FedSpeedError`; a broken invariant of this program is an `assert`.
"""

import re
from collections.abc import Iterable, Sequence

EXIT_OK = 0
# An unexpected error: a bug of this program or of a library.
EXIT_FAILED = 1
# Bad input: configuration, hostfile, data, model or journal.
EXIT_USAGE = 2
# EX_TEMPFAIL: a rank was lost or the job was preempted. The same command resumes.
EXIT_RESUMABLE = 75


class FedSpeedError(Exception):
    """Base class of errors that are reported as one message without a traceback.

    Args:
        reason: what was wrong and where; and what to do about it, if `remedy` is empty.
        remedy: what to do about it. The message consists of both.

    Attributes:
        printed_as_json: whether `--json` has already printed it on stdout.
    """

    exit_code = EXIT_USAGE
    printed_as_json = False

    def __init__(self, reason: str = "", *, remedy: str = ""):
        super().__init__(f"{reason}; {remedy}" if remedy else reason)
        self.reason = str(reason)
        self.remedy = remedy


class ConfigError(FedSpeedError):
    """The run's configuration is wrong. Holds every problem found, not only the first.

    Args:
        problems: one line per problem, each with key or file, value and remedy.
    """

    def __init__(self, problems: str | Iterable[str]):
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
    """A task does not fit on the hardware, or too little is known of one of them.

    Args:
        changes: what would make it fit (planner.changes.Change), the smallest first.
    """

    def __init__(self, message: str, changes: Iterable = ()):
        super().__init__(message)
        self.changes = tuple(changes)


class JournalError(FedSpeedError):
    """The round journal is damaged or belongs to another run."""


class MissingPackage(FedSpeedError):
    """Packages that the run needs are not installed.

    Args:
        names: of the packages.
        python: path of the interpreter.
    """

    def __init__(self, names: Sequence[str], python: str):
        several = "are" if len(names) > 1 else "is"
        super().__init__(
            f"{', '.join(names)} {several} not installed for {python}; activate the virtual environment "
            "(source .venv/bin/activate) or start with .venv/bin/python (`python -m fedspeed doctor` lists "
            "all that is missing)"
        )


class LostPeerError(FedSpeedError):
    """Ranks or clients did not answer in time; the message names them. The same command resumes."""

    exit_code = EXIT_RESUMABLE


class Preempted(FedSpeedError):
    """A signal (SIGTERM) requested the end of the run; the last round is in the journal."""

    exit_code = EXIT_RESUMABLE


def connection_text(error: BaseException) -> str:
    """Return torch's message about a broken connection, without source file and advice to torch's
    developers.
    """
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return re.sub(r"^\[\S+:\d+\] ", "", line).partition(". This is typically")[0]
