"""Exceptions that ended ranks: each rank records its own, so that the supervisor can recognise a repeated
one.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path

# Holds the path of a rank's record, without the rank's number.
FAILURE_VARIABLE = "FEDSPEED_FAULT"
_MAX_CHARACTERS = 4000


def record_failure(error: BaseException, env: Mapping[str, str] = os.environ) -> None:
    """Record the exception that ends this rank, if the local supervisor has started it.

    Other launchers start no rank again, so nothing is recorded under them.
    """
    if path := env.get(FAILURE_VARIABLE):
        try:
            Path(f"{path}-{env.get('RANK', '')}").write_text(_text(error), encoding="utf-8", errors="replace")
        except OSError:
            pass  # the supervisor and its folder are gone


def recorded_failures(path: Path) -> frozenset[str]:
    """Return what the ranks of one attempt have recorded under this path."""
    return frozenset(record.read_text(encoding="utf-8") for record in path.parent.glob(f"{path.name}-*"))


def _text(error: BaseException) -> str:
    """Return type, text and notes of an exception, without memory addresses, which differ per process."""
    text = " ".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())])
    return re.sub(r"\b0x[0-9a-f]{6,}\b", "0x...", text)[:_MAX_CHARACTERS]
