"""The systems that are compared, a file each: what is installed, and the commands."""

from collections.abc import Collection

from benchmarks.compare.outside.system import System
from benchmarks.compare.outside.systems.accelerate import ACCELERATE
from benchmarks.compare.outside.systems.appfl import APPFL
from benchmarks.compare.outside.systems.fedspeed import FEDSPEED, FEDSPEED_ALONE, PLAIN
from benchmarks.compare.outside.systems.flower import DEPLOYMENT, SIMULATION
from benchmarks.compare.outside.systems.nvflare import NVFLARE
from benchmarks.compare.outside.systems.roundpipe import ROUNDPIPE

OURS = (PLAIN, FEDSPEED, FEDSPEED_ALONE)
OTHERS = (SIMULATION, DEPLOYMENT, NVFLARE, APPFL, ACCELERATE, ROUNDPIPE)


def chosen(names: Collection[str]) -> list[System]:
    """Return FedSpeed, the plain loop and the named systems, in the order of the table."""
    return [*OURS, *(system for system in OTHERS if system.name in names)]
