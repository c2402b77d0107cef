"""A script that is the local supervisor or, where RANK is set, one of its ranks, as launch.py is.

Arguments: a folder, in which each rank writes a file for each life, how ranks are started (`fork`, `spawn` or
`gpu`), and what shall happen.
"""

import json
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path

from fedspeed.cluster import local
from fedspeed.cluster.failures import record_failure
from fedspeed.cluster.once_per_host import report_error
from fedspeed.errors import ConfigError, FedSpeedError
from fedspeed.log import LOG

folder = Path(sys.argv[1])
way = sys.argv[2]
mode = sys.argv[3]


def preload():
    with (folder / "preloads").open("a") as file:
        file.write("x")
    if mode == "kill server" and (folder / "preloads").read_text() == "x":
        os.kill(os.getpid(), signal.SIGKILL)
    if mode == "threads":
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    if mode == "broken preload":
        raise RuntimeError("no such library")
    if mode == "no fork":

        def fork():
            raise BlockingIOError("no more processes")

        os.fork = fork
    if mode == "bad preload":
        raise ConfigError("preload dislikes it")
    if mode == "slow preload":
        time.sleep(600)


def target(env):
    rank = int(env["RANK"])
    life = int(env["FEDSPEED_RESTARTS"])
    assert os.environ["RANK"] == env["RANK"]
    stop = []
    if mode == "finish":
        signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
    if mode in ("stubborn", "very stubborn"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    note = folder / f"life-{life}-rank-{rank}"
    note.with_suffix(".new").write_text(json.dumps({"pid": os.getpid(), "parent": os.getppid(), "env": env}))
    note.with_suffix(".new").rename(note)
    if mode == "progress" and rank == 0:
        note.with_suffix(".journal").write_text(str(min(life + 1, 3)))
        note.with_suffix(".journal").rename(folder / "journal")
    deadly = {"kill once": life == 0, "kill always": True, "progress": life < 4}.get(mode, False)
    if deadly:
        while len(list(folder.glob(f"life-{life}-rank-?"))) < 3:
            time.sleep(0.01)
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600)
    if mode == "usage":
        raise ConfigError("x.y: wrong; write z")
    if mode == "one usage":
        if rank == 1:
            raise ConfigError("only rank 1 sees it")
        time.sleep(600)
    if mode == "bug" and rank == 2:
        raise ValueError(f"a bug of {object()}")
    if mode == "other bug" and rank == 2:
        raise ValueError(f"bug {life}")
    if mode == "bug in every round":
        note.with_suffix(".journal").write_text(str(life + 1))
        note.with_suffix(".journal").rename(folder / "journal")  # the supervisor may be reading it
        raise ValueError("a bug") if life < 3 else SystemExit(0)
    if mode == "killed and bug":
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.5)
        raise ValueError("peer is gone")
    if mode == "exit 7" and rank == 2:
        sys.exit(7)
    if mode in ("stubborn", "very stubborn", "wait"):
        time.sleep(600)
    if mode == "finish":
        while not stop:
            time.sleep(0.01)
        (folder / f"finished-{rank}").touch()
        return 75 if rank else 0
    return 0


def main():
    if "RANK" in os.environ:
        try:
            return target(dict(os.environ))
        except FedSpeedError as error:
            report_error(error)
            return error.exit_code
        except Exception as error:
            record_failure(error)
            raise
    journal = folder / "journal"
    journal.write_text("0")
    if way == "gpu":
        local.visible_gpus = lambda env: 1
    forked = {} if way == "spawn" else {"preload": preload, "target": target}
    handler = logging.StreamHandler(sys.stdout)  # errors of ranks go to standard error
    handler.addFilter(lambda record: record.levelno < logging.ERROR)
    LOG.handlers[0].setLevel(logging.ERROR)
    LOG.addHandler(handler)
    ended = local.run_local(
        sys.argv[1:],
        3,
        dict(os.environ),
        2,
        lambda: int(journal.read_text()),
        finish_s=1.0 if mode == "stubborn" else 500.0,
        end_s=1.0,
        **forked,
    )
    return ended.exit_code


if __name__ == "__main__":
    sys.exit(main())
