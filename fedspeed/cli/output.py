"""Output of commands: their results on stdout, and how they ended."""

import os
import sys
import traceback
from typing import TextIO

from fedspeed.cluster.discover import current_rank_identity
from fedspeed.cluster.failures import record_failure
from fedspeed.cluster.once_per_host import claim_report, report_error, run_once_per_host
from fedspeed.errors import EXIT_USAGE, FedSpeedError, Preempted
from fedspeed.log import LOG
from fedspeed.monitor.stdout import write_refusal
from fedspeed.session.ending import Ending


def print_result(text: str) -> None:
    """Print the result of a command.

    A reader that closes the pipe (`| head`) is no error; a full disk is one.

    Raises:
        FedSpeedError: standard output cannot be written.
    """
    try:
        print(text, flush=True)
    except OSError as error:
        # The interpreter flushes stdout once more when it ends, which must not fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if not isinstance(error, BrokenPipeError):
            raise FedSpeedError(
                f"standard output cannot be written ({error.strerror}); send it elsewhere"
            ) from error


def report_ending(ending: Ending, json_out: TextIO | None) -> int:
    """Print how a command ended, unless that was printed before; return its exit code.

    An error that a user can remedy is one message on stderr; bad input is also an object in `json_out`. An
    unexpected error is printed with its traceback, and recorded for the supervisor of local ranks.

    Args:
        ending: of the command.
        json_out: where `--json` writes; None without it.
    """
    sys.stdout.flush()
    if isinstance(ending.error, FedSpeedError):
        _report_error(ending.error, json_out)
    elif ending.error is not None:
        traceback.print_exception(ending.error)
        record_failure(ending.error)
    elif ending.note:
        LOG.info(ending.note)
    return ending.exit_code


def _report_error(error: FedSpeedError, json_out: TextIO | None) -> None:
    if isinstance(error, Preempted) and not claim_report(os.environ):
        # All ranks are asked to end, perhaps because of bad input that another rank has reported.
        return
    report_error(error)
    if json_out is not None and error.exit_code == EXIT_USAGE and not error.printed_as_json:
        print_error_as_json(error, json_out)


def print_error_as_json(error: FedSpeedError, json_out: TextIO) -> None:
    """Print bad input as an object on `json_out`, once per host: all its ranks may have found the same error.

    For errors before the ranks have met.
    """
    run_once_per_host(lambda: write_refusal(json_out, error), current_rank_identity())
