"""Flower as it is deployed, on one machine: a SuperLink, three SuperNodes and `flwr run`.

    python -m benchmarks.compare.outside.apps.flower_deployment FOLDER SCRATCH

Every message to a client starts a process for its ClientApp, as Flower does by default. Their prints reach
our stdout, which all processes share.
"""

import contextlib
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from benchmarks.compare.outside.task import CLIENTS

PORT = 8000
NODE_PORT = 8101  # of the first SuperNode
START_S = 120.0
STOP_S = 10.0
APP = """\
[project]
name = "task"
version = "1.0.0"
description = "the task"
license = "Apache-2.0"
dependencies = []

[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[tool.flwr.app]
publisher = "fedspeed"

[tool.flwr.app.components]
serverapp = "task.server:app"
clientapp = "task.client:app"
"""
CONNECTION = f"""\
[superlink]
default = "here"

[superlink.here]
address = "127.0.0.1:{PORT}"
insecure = true
"""


def write_app(folder: Path) -> None:
    """Write the bundle that `flwr run` sends to the SuperLink."""
    (folder / "task").mkdir(parents=True)
    (folder / "pyproject.toml").write_text(APP)
    (folder / "task" / "__init__.py").write_text("")
    for part in ("server", "client"):  # Flower looks for an assignment to `app` in the source
        (folder / "task" / f"{part}.py").write_text(
            f"from benchmarks.compare.outside.apps import flower_deployed\n\napp = flower_deployed.{part}\n"
        )


def wait_for(port: int) -> None:
    """Wait until a server answers on a port of this machine.

    Raises:
        SystemExit: it does not within START_S.
    """
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5).close()
        except urllib.error.HTTPError:  # it answers
            return
        except OSError:
            time.sleep(0.1)
        else:
            return
    sys.exit(f"nothing answers on port {port} after {START_S:.0f} s")


def main(folder: Path, scratch: Path) -> int:
    """Start everything, run the app, end everything; return the exit code of `flwr run`."""
    home = Path(os.environ["FLWR_HOME"])
    home.mkdir(parents=True, exist_ok=True)
    (home / "config.toml").write_text(CONNECTION)
    write_app(scratch / "app")
    os.environ["FEDSPEED_TASK"] = str(folder)
    link = ["flower-superlink", "--insecure", "--disable-runtime-dependency-installation"]
    started = [subprocess.Popen([*link, "--port", str(PORT)])]
    try:
        for client in range(CLIENTS):
            node = ["flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{PORT}"]
            node += ["--port", str(NODE_PORT + client)]
            node += ["--node-config", f"partition-id={client} num-partitions={CLIENTS}"]
            started.append(subprocess.Popen(node))
        wait_for(PORT)
        return subprocess.run(
            ["flwr", "run", str(scratch / "app"), "here", "--stream"], check=False
        ).returncode
    finally:
        for process in started:
            process.terminate()
        for process in started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_S)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
