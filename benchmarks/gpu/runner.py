"""A phase in a process of its own, which is killed at its limit; the results that it has written stay."""

import multiprocessing
import os
import signal
import sys
import tempfile
import traceback
from pathlib import Path

from benchmarks.gpu.phases import Phase
from benchmarks.gpu.record import Record, end_as, has_ended

GRACE_S = 3.0  # between asking a phase to end and killing it
GONE_S = 20.0  # for a killed phase to free page-locked memory


def run_phase(phase: Phase, out: Path, dry: bool, limit_s: float) -> None:
    """Run a phase and wait for it.

    Afterwards `out` has its file, with its ending, and none of its processes is left, whatever happens to the
    phase or to this process (except SIGKILL). A dry run forks this process, which has imported the libraries;
    on a card every phase starts afresh, since CUDA does not survive a fork.
    """
    path = out / f"{phase.name}.json"
    path.unlink(missing_ok=True)  # of an earlier campaign
    context = multiprocessing.get_context("fork" if dry else "spawn")
    with tempfile.TemporaryDirectory(prefix=f"{phase.name}-", dir=os.environ.get("BENCH_DIR")) as folder:
        process = context.Process(target=_enter, args=(phase, Path(folder), out, dry, limit_s))
        process.start()
        try:
            process.join(limit_s)
        except BaseException:  # this process is to end, which the phase's own session does not hear of
            _end(process)
            end_as(path, phase.name, "interrupted")
            raise
        late = process.is_alive()
        if late:
            _end(process)
    if late and not has_ended(path):  # it may have finished and be giving its memory back
        end_as(path, phase.name, f"ended at its limit of {limit_s:.0f} s")
    elif process.exitcode and not late:
        end_as(path, phase.name, f"failed: its process ended with {process.exitcode}")
    elif not has_ended(path):
        end_as(path, phase.name, "failed: its process ended without a result")


def _enter(phase: Phase, folder: Path, out: Path, dry: bool, limit_s: float) -> None:
    """Run in the child, in a session of its own, so that all processes it starts end with it."""
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    code = 1
    try:
        _work(phase, folder, out, dry, limit_s)
        code = 0
    except Exception:  # told by the exit code; the trace is for whoever watches
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # freeing page-locked memory at the end of a process takes seconds of the card's time


def _work(phase: Phase, folder: Path, out: Path, dry: bool, limit_s: float) -> None:
    record = Record(out, phase.name, limit_s)
    with record.guarded("phase"):
        from benchmarks.gpu import card
        from benchmarks.gpu.engines import Scene

        record.describe(**card.about(dry))
        phase.run(Scene(phase, record, folder, out, dry))
    record.finish()


def _end(process) -> None:
    """End a phase and all that it has started."""
    for word, wait_s in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, GONE_S)):
        try:
            os.killpg(process.pid, word)
        except ProcessLookupError:
            process.kill()
        process.join(wait_s)
        if not process.is_alive():
            return
