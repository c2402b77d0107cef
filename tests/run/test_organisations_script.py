"""launchers/organisations.sh with stand-ins for the programs that it starts: what happens to the sites when
the script is terminated.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.limits import LIMIT_S

# A site that, like launch.py, ends a while after it was asked to, and writes down how often it was asked.
# Everything else is done at once.
PYTHON = """#!/usr/bin/env bash
[ "$1" = launch.py ] || exit 0
name=$(basename "$3" .yaml)
trap 'echo asked >> "$name.asked"; stop=1' TERM
echo "started with $4"
echo $$ > "$name.pid"
while [ -z "${stop:-}" ]; do sleep 0.05; done
sleep 0.3
echo "ended"
exit 75
"""


def hear_signals() -> None:
    """Undo what `nohup` and `&` do to the signals of the tests: a shell that inherits an ignored signal
    cannot trap it.
    """
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture
def script(tmp_path):
    """Return the running script, in a folder of its own, once all three sites have started."""
    (tmp_path / "launchers").mkdir()
    shutil.copy(ROOT / "launchers" / "organisations.sh", tmp_path / "launchers")
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON)
    python.chmod(0o755)
    started = subprocess.Popen(
        ["bash", "launchers/organisations.sh", "run.name=x"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=hear_signals,
    )
    try:
        end = time.monotonic() + LIMIT_S
        while len(list(tmp_path.glob("*.pid"))) < 3:
            assert started.poll() is None and time.monotonic() < end
            time.sleep(0.05)
        yield started
    finally:
        for pid in [started.pid, *pids(tmp_path)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        started.stdout.close()
        started.wait(LIMIT_S)


def pids(folder: Path) -> list[int]:
    return [int(path.read_text() or 0) for path in folder.glob("*.pid")]


def alive(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


@pytest.mark.parametrize("how", ["SIGTERM", "SIGHUP", "SIGINT", "Ctrl-C"])
def test_sites_end_with_the_script(script, tmp_path, how):
    if how == "Ctrl-C":
        os.killpg(script.pid, signal.SIGINT)  # as a terminal does it
    else:
        script.send_signal(signal.Signals[how])
    said, _ = script.communicate(timeout=LIMIT_S)
    assert script.returncode == 75
    assert not any(map(alive, pids(tmp_path)))
    assert sorted(said.splitlines()) == [
        line for i in (1, 2, 3) for line in (f"client{i}  ended", f"client{i}  started with run.name=x")
    ]
    assert [(tmp_path / f"client{i}.asked").read_text() for i in (1, 2, 3)] == 3 * ["asked\n"], (
        "asked twice, a site would end at once"
    )
