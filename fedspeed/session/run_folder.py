"""Checks of a run's folder, before anything is written to it."""

from pathlib import Path

from fedspeed.config.load import Loaded
from fedspeed.errors import FedSpeedError
from fedspeed.files import check_writable

# Files and folders of a run; something else may already have one of these names.
RUN_FILES = (
    "report.md",
    "report.png",
    "comparison.png",
    "timeline.png",
    "summary.json",
    "rounds.jsonl",
    "roster-epoch",
    "settled-sums.jsonl",
)
RUN_FOLDERS = ("journal", "tensorboard", "trace", "adapter", "adapter-last", "model", "model-last")


def check_run_folder(loaded: Loaded) -> None:
    """Check that the run's folder can be written.

    Raises:
        FedSpeedError: it cannot, or a file is where the run needs a folder, or the reverse.
    """
    out = Path(loaded.config.run.out)
    run = loaded.run_folder
    existing = next(place for place in (out, *out.absolute().parents) if place.exists())
    if not existing.is_dir():
        raise FedSpeedError(f"run.out={out}: {existing} is not a folder; choose another place for the runs")
    if run.exists() and not run.is_dir():
        raise FedSpeedError(
            f"{run}: is a file, but the run needs a folder of that name; move it, or choose another run.name"
        )
    try:
        check_writable(run)
    except OSError as error:
        raise FedSpeedError(
            f"run.out={out}: {run if run.is_dir() else existing} cannot be written to ({error.strerror}); "
            "mend its permissions, "
            "or choose another place"
        ) from error
    for names, is_other, kinds in (
        (RUN_FILES, Path.is_dir, "a folder, but the run writes a file of that name"),
        (RUN_FOLDERS, Path.is_file, "a file, but the run needs a folder of that name"),
    ):
        if found := next((run / name for name in names if is_other(run / name)), None):
            raise FedSpeedError(f"{found}: is {kinds}; move it away, or choose another run.name")
