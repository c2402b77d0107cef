"""The end of all ranks at a failure of one: bad input is reported once on `--json`, and an MPI job is
aborted.
"""

import traceback
from typing import Protocol, TextIO, runtime_checkable

from fedspeed.cluster.rendezvous import Store
from fedspeed.errors import EXIT_USAGE, FedSpeedError
from fedspeed.log import LOG
from fedspeed.monitor import stdout
from fedspeed.session.ending import error_ending

REPORTED = "refusal reported"  # key in the store: the refusal is on stdout
REPORT_S = 30.0  # for the first rank to report it; after that another rank does


@runtime_checkable
class AbortableTransport(Protocol):
    """A transport that can end all ranks of its job, as MPI's can."""

    def abort(self, exit_code: int) -> None: ...


def report_refusal(error: BaseException, json_out: TextIO | None, store: Store) -> None:
    """Write bad input as a JSON object to stdout, on the first rank that finds it.

    The other ranks return once it is written, because the end of any rank may end all of them.
    """
    if json_out is None or not isinstance(error, FedSpeedError) or error.exit_code != EXIT_USAGE:
        return
    if store.is_first("refused") or (
        store.wait([REPORTED], REPORT_S) and store.is_first("refused, but not reported")
    ):
        stdout.write_refusal(json_out, error)
        store.try_put(REPORTED, "")
    error.printed_as_json = True


def abort(error: BaseException, transport: AbortableTransport) -> None:
    """Report an error and end all ranks of an MPI job: they may wait in calls that only MPI can interrupt."""
    if isinstance(error, FedSpeedError):
        LOG.error(str(error))
    else:
        traceback.print_exception(error)
    transport.abort(error_ending(error).exit_code)
