"""Starts the Flower app: `python -m ...flower_run FOLDER ACTORS THREADS`; see flower_app."""

import sys
from pathlib import Path

from benchmarks.compare.outside.apps.flower_app import simulate

if __name__ == "__main__":
    simulate(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
