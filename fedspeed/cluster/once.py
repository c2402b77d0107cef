"""One voice for many local ranks: a usage error that all of them find is printed by the first one only."""

import os
import sys
from collections.abc import Mapping

from fedspeed.errors import EXIT_USAGE, FedSpeedError

ONCE_VARIABLE = "FEDSPEED_ONCE"


def report(error: FedSpeedError, env: Mapping[str, str] = os.environ) -> None:
    """Prints an error without a traceback.

    Bad input looks the same from every rank of a machine, so under our own supervisor only one of them prints it. A lost peer is what a
    rank alone can tell; each says what it saw.
    """
    if error.exit_code != EXIT_USAGE or first_to_speak(env):
        print(f"fedspeed: error: {error}", file=sys.stderr, flush=True)


def first_to_speak(env: Mapping[str, str]) -> bool:
    """True for one process per attempt of the local supervisor; always True under any other launcher."""
    path = env.get(ONCE_VARIABLE)
    if not path:
        return True
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    except OSError:
        # The supervisor and its folder are gone; better said twice than not at all.
        return True
    return True
