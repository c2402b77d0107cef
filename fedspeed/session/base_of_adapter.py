"""The base of an exported adapter, where the adapter names it otherwise than this machine does."""

from pathlib import Path

from fedspeed.checkpoint.journal import Journal
from fedspeed.errors import FedSpeedError
from fedspeed.models.local_config import local_folder
from fedspeed.models.provenance import public_name

RUNS = Path("runs")  # default folder of runs, below the working folder


def find_base(name: str, adapter: Path) -> str:
    """Return the folder of a base on this machine; its name where it is nowhere but perhaps on the hub.

    Args:
        name: as the adapter has it. adapter: its folder. If it is in the folder of a run, the run's own base
            is taken where that is the one that is named.
    """
    if Path(name).is_dir() or local_folder(name) is not None:
        return name
    trained_on = run_config(adapter.parent).get("model", {}).get("base", "")
    if trained_on and Path(trained_on).is_dir() and name in (public_name(trained_on), Path(trained_on).name):
        return trained_on
    beside = RUNS / name
    return str(beside) if Path(name).name == name and beside.is_dir() else name


def run_config(folder: Path) -> dict:
    """Return the resolved configuration in the journal of a run's folder; empty if there is none."""
    try:
        entry = Journal(folder, 1).latest()
    except FedSpeedError:
        return {}
    return entry.config if entry else {}
