"""Runs of `launch.py` for the comparison of methods, and the file that keeps their numbers."""

import gzip
import itertools
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

from fedspeed.files import write_atomically

ROOT = Path(__file__).resolve().parent.parent
PUBLIC_ROWS = 200
RESULTS = ROOT / "benchmarks" / "results" / "baselines"


def public_rows(task: str) -> str:
    """Write the rows that the server of a method trains on, once, and return the file's path from ROOT: test
    rows of GSM8K, or rows about code in the form of Dolly's. No client has them.
    """
    path = Path("runs", "baselines", f"public-{task}.jsonl")
    if not (ROOT / path).exists():
        data = Path(os.environ.get("FEDSPEED_DATA", ROOT.parent / "shared" / "data"))
        name = {"gsm8k": "gsm8k_test", "dolly": "fed_codealpaca"}[task]
        with gzip.open(data / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in itertools.islice(file, PUBLIC_ROWS)]
        if task == "dolly":
            names = {"instruction": "instruction", "context": "input", "response": "output"}
            rows = [{name: row[of] for name, of in names.items()} | {"category": "code"} for row in rows]
        (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / path).write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return str(path)


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


def tokens_of(config: str, arguments: list[str], rounds: range) -> int:
    """Return the tokens of all rows that all clients train on in some rounds, prompts included.

    Args:
        config: a YAML file in ds_configs. rounds: counted from 0.
    """
    from fedspeed.config.load import load
    from fedspeed.data.batches import client_step
    from fedspeed.data.clients import client_rows, encode_client
    from fedspeed.models.tokenizer import load_tokenizer

    run = load(ROOT / "ds_configs" / config, arguments).config
    tokenizer = load_tokenizer(run.model)
    steps = run.train.local_steps
    tokens = 0
    for number, rows in enumerate(client_rows(run.data, run.run.seed)):
        data = encode_client(rows, tokenizer, run.data)
        for step in range(steps * rounds.start, steps * rounds.stop):
            batches = client_step(
                data,
                run.run.seed,
                number,
                step,
                run.train.micro_batch,
                accumulation=run.train.accumulation,
                ranks=1,
                client_rank=0,
            )
            tokens += sum(int(batch.attention_mask.sum()) for batch in batches.micro)
    return tokens


def evaluated(run: Path) -> float:
    """Return the held-out loss of what a run has exported, in the whole base, by `fedspeed eval`."""
    command = [sys.executable, "-m", "fedspeed", "eval", str(run), "--json"]
    env = {"HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **os.environ}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    (line,) = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    return float(line["metrics"]["loss"]["score"])


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
