"""Which exceptions ended the ranks of an attempt: each leaves a note for the supervisor, who would meet the
same ones again.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path

FAILURE_VARIABLE = "FEDSPEED_FAULT"  # where a rank's note goes, less the rank
_LONGEST = 4000


def record_failure(error: BaseException, env: Mapping[str, str] = os.environ) -> None:
    """Leaves word of an exception that ends this rank; nothing under other launchers, which start no rank
    again.
    """
    if path := env.get(FAILURE_VARIABLE):
        try:
            Path(f"{path}-{env.get('RANK', '')}").write_text(_text(error), encoding="utf-8", errors="replace")
        except OSError:
            pass  # the supervisor and its folder are gone


def recorded_failures(path: Path) -> frozenset[str]:
    """What the ranks of one attempt have left under this path."""
    return frozenset(note.read_text(encoding="utf-8") for note in path.parent.glob(f"{path.name}-*"))


def _text(error: BaseException) -> str:
    """Equal for what happens again: type, text and notes, without addresses of memory, which differ in every
    process.
    """
    text = " ".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())])
    return re.sub(r"\b0x[0-9a-f]{6,}\b", "0x...", text)[:_LONGEST]
