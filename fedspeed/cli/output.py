"""What a command prints: what it was asked for, and how it ended."""

import os
import sys
import traceback
from typing import TextIO

from fedspeed.cluster.discover import current_rank_identity
from fedspeed.cluster.failures import record_failure
from fedspeed.cluster.once import claim_report, report_error, run_once_per_host
from fedspeed.errors import EXIT_USAGE, FedSpeedError, Preempted
from fedspeed.log import LOG
from fedspeed.monitor.stdout import write_refusal
from fedspeed.session.ending import Ending


def say(text: str) -> None:
    """Print what a command was asked for. A reader that has seen enough (`| head`) is no fault; a full disk
    is one.
    """
    try:
        print(text, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the interpreter flushes once more when it ends
        if not isinstance(error, BrokenPipeError):
            raise FedSpeedError(
                f"standard output cannot be written ({error.strerror}); send it elsewhere"
            ) from error


def report_ending(ending: Ending, json_out: TextIO | None) -> int:
    """Say how a command ended, as far as that is not said yet; return its exit code.

    What a user can mend is one message on stderr, and where `json_out` is given bad input is an object there
    too. An unexpected error is told with its traceback, and noted for the supervisor of local ranks.
    """
    sys.stdout.flush()
    if isinstance(ending.error, FedSpeedError):
        _tell_error(ending.error, json_out)
    elif ending.error is not None:
        traceback.print_exception(ending.error)
        record_failure(ending.error)
    elif ending.note:
        LOG.info(ending.note)
    return ending.exit_code


def _tell_error(error: FedSpeedError, json_out: TextIO | None) -> None:
    if isinstance(error, Preempted) and not claim_report(os.environ):
        return  # all ranks are asked to end alike, perhaps for bad input that another one has told of
    report_error(error)
    if json_out is not None and error.exit_code == EXIT_USAGE and not error.printed_as_json:
        print_error_as_json(error, json_out)


def print_error_as_json(error: FedSpeedError, json_out: TextIO) -> None:
    """Tell bad input in the words of `--json`, before the ranks have met: of those on this host, which may
    all have found the same, one speaks.
    """
    run_once_per_host(lambda: write_refusal(json_out, error), current_rank_identity())
