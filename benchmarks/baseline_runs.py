"""Runs of `launch.py` for the comparison of methods, and the file that keeps their numbers."""

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

from fedspeed.files import write_atomically

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "baselines"


class Numbers:
    """Results by name, in a JSON file that is written after each of them.

    Args:
        name: of the file, without its ending.
    """

    def __init__(self, name: str):
        self._path = RESULTS / f"{name}.json"
        self.entries: dict[str, dict] = json.loads(self._path.read_text()) if self._path.exists() else {}

    def has(self, name: str, arguments: list[str]) -> bool:
        """Return whether there is a result of that name with these arguments."""
        return self.entries.get(name, {}).get("arguments") == arguments

    def put(self, name: str, arguments: list[str], **values) -> None:
        """Write a result with the day and the machine."""
        self.entries[name] = {
            "arguments": arguments,
            **values,
            "date": time.strftime("%Y-%m-%d"),
            "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        }
        self._path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(dict(sorted(self.entries.items())), indent=1)
        write_atomically(self._path, text.encode() + b"\n")


def launch(config: str, folder: Path, name: str, arguments: list[str]) -> list[dict] | None:
    """Run `launch.py`, or resume it, and return its records by round, from round 0 on; None if it failed.

    Args:
        config: a YAML file in ds_configs. folder: that the run's own folder is made in.
    """
    command = [sys.executable, "launch.py", "--config", f"ds_configs/{config}"]
    places = [f"run.out={folder}", f"run.name={name}", "monitor.progress=false", "monitor.tensorboard=false"]
    env = {"HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **os.environ}
    log = folder / f"{name}.log"
    folder.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        done = subprocess.run(
            [*command, *arguments, *places], cwd=ROOT, env=env, stdout=file, stderr=file, check=False
        )
    if done.returncode:
        print(f"{name}: ended with {done.returncode}; {log} says why", flush=True)
        return None
    lines = (folder / name / "rounds.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]
