"""The end of a rank for all ranks: bad input is told once in the words of `--json`, and an MPI job is
ended.
"""

import traceback
from typing import TextIO

from fedspeed.cluster.rendezvous import Store
from fedspeed.errors import EXIT_USAGE, FedSpeedError
from fedspeed.log import LOG
from fedspeed.monitor import stdout
from fedspeed.routing.transport import Transport
from fedspeed.session.ending import error_ending

TOLD = "refusal told"  # the key that says so
TOLD_S = 30.0  # for the first to know to say it; then another one does


def report_refusal(error: BaseException, json_out: TextIO | None, store: Store) -> None:
    """Tell bad input in the words of `--json`, once for all ranks, by whichever is the first to know. The
    others come back when it is told: the end of any rank may be that of all.
    """
    if json_out is None or not isinstance(error, FedSpeedError) or error.exit_code != EXIT_USAGE:
        return
    if store.is_first("refused") or (store.wait([TOLD], TOLD_S) and store.is_first("refused, but not told")):
        stdout.write_refusal(json_out, error)
        store.try_put(TOLD, "")
    error.printed_as_json = True


def abort(error: BaseException, transport: Transport) -> None:
    """Say the error and end all ranks of an MPI job: the others may wait in calls that only MPI can end."""
    if isinstance(error, FedSpeedError):
        LOG.error(str(error))
    else:
        traceback.print_exception(error)
    transport.abort(error_ending(error).exit_code)
