"""RoundPipe streams layers to a GPU: on a machine without one it is installed, and its own words are kept."""

import os
import subprocess
from pathlib import Path

from benchmarks.compare.outside.pins import pinned
from benchmarks.compare.outside.system import System

LIMIT_S = 300


def refusal(python: Path) -> str:
    """Return how its import ends here."""
    try:
        done = subprocess.run(
            [str(python), "-c", "import roundpipe"],
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
    except subprocess.TimeoutExpired:
        return f"`import roundpipe` does not end within {LIMIT_S} s"
    if done.returncode == 0:
        return "it can be imported here, and is measured on a GPU"
    return f"`import roundpipe` fails: {where_and_what(done.stderr)}"


def where_and_what(traceback: str) -> str:
    """Return the function of a traceback's last frame, and the error."""
    lines = [line.strip() for line in traceback.strip().splitlines()]
    frames = [line.rsplit(", in ", 1)[1] for line in lines if line.startswith("File ") and ", in " in line]
    return f"{lines[-1]} (in {frames[-1]})" if frames else (lines or ["no message"])[-1]


ROUNDPIPE = System(
    "roundpipe",
    "roundpipe",
    environment="roundpipe",
    installs=(("roundpipe==0.1.1", pinned("torch"), pinned("transformers")),),
    refusal=refusal,
    elsewhere="python -m benchmarks.gpu roundpipe-14b-24gib",
)
