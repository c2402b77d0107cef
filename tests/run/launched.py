"""Real runs of `launch.py` for the tests of this folder: a tiny model, a way to start them, to hurt them, and
to compare what they leave.

Whatever a test starts leads a session and carries a mark in its environment, by which all of its processes
are found again, whoever forked them.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import yaml
from safetensors.numpy import load_file

from tests.limits import LIMIT_S
from tests.warm import WarmProcess

ROOT = Path(__file__).resolve().parents[2]
COLD = (sys.executable,)  # the launcher of whoever types `python launch.py`
LAUNCH = ROOT / "launch.py"
EVAL = (str(ROOT / "fedspeed" / "__main__.py"), "eval")
MARK = "FEDSPEED_TEST_MARK"

# A run of 5 s with everything in it that a resumed run could get wrong: dropout, kept local optimizers, a
# server optimizer with moments, unequal clients, and more clients than ranks.
SETTINGS = {
    "model": {"init": "random", "tokenizer": "bytes"},
    "adapter": {"lora_rank": 4, "dropout": 0.1},
    "data": {
        "task": "builtin",
        "clients": 3,
        "split": "meta",
        "max_tokens": 64,
        "template": "plain",
        "max_rows": 120,
        "val_fraction": 0.1,
    },
    "train": {"local_steps": 3, "micro_batch": 4, "lr": 3e-3},
    "federation": {"rounds": 4, "server_optimizer": "adam", "server_lr": 0.02, "local_optimizer": "keep"},
    "cluster": {"local_ranks": 2},
    "routing": {"mode": "plain"},  # most tests look at single clients
}
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 260,
    "max_position_embeddings": 256,
    "bos_token_id": 257,
    "eos_token_id": 258,
    "pad_token_id": 256,
    "tie_word_embeddings": False,
}

# Put into every interpreter that finds it on PYTHONPATH: a disk that stalls at one rename, or takes its time
# over each journal entry; a network that takes its time over whatever is sent over TLS; a package that is not
# installed; another method in place of the default one; a GPU whose memory ends in the first round; a site
# that lies (tests/run/attacks.py).
FAULTS = """
import os, sys, time

if "TEST_LACKS" in os.environ:
    sys.modules[os.environ["TEST_LACKS"]] = None

if "TEST_METHOD" in os.environ:
    from dataclasses import replace
    from fedspeed.federation.methods.config import METHODS

    METHODS["lora_average"] = replace(METHODS["lora_average"], module=os.environ["TEST_METHOD"])

def _wrap(rename):
    def wrapped(source, target, **options):
        if os.environ.get("TEST_STALL_AT") and str(target).endswith(os.environ["TEST_STALL_AT"]):
            open(os.environ["TEST_STALLED"], "w").close()
            time.sleep(600)
        if os.environ.get("TEST_SLOW_S") and str(target).endswith("entry.json"):
            time.sleep(float(os.environ["TEST_SLOW_S"]))
        return rename(source, target, **options)
    return wrapped

if "TEST_ATTACK" in os.environ:
    from tests.run import attacks

    getattr(attacks, os.environ["TEST_ATTACK"])()

if "TEST_FULL" in os.environ:
    import torch
    from fedspeed.federation import rounds

    def _full(*_):
        raise torch.OutOfMemoryError(os.environ["TEST_FULL"])

    rounds.run = _full

if "TEST_STALL_AT" in os.environ or "TEST_SLOW_S" in os.environ:
    os.replace, os.rename = _wrap(os.replace), _wrap(os.rename)

if "TEST_SLOW_SENDS_S" in os.environ:
    import ssl
    _sendall = ssl.SSLSocket.sendall

    def _slowly(self, data, *flags):
        time.sleep(float(os.environ["TEST_SLOW_SENDS_S"]))
        return _sendall(self, data, *flags)

    ssl.SSLSocket.sendall = _slowly
"""


@dataclass
class Ended:
    """Describe a process that has ended: exit code, output and duration in seconds."""

    code: int
    out: str
    err: str
    seconds: float

    @property
    def text(self) -> str:
        return self.out + self.err


def refusal(ended: Ended) -> str:
    """Return the error that `--json` prints, after checking that stdout holds nothing else."""
    (line,) = ended.out.splitlines()
    message = json.loads(line)
    assert message == {"event": "error", "error": message["error"], "exit_code": 2}
    return message["error"]


@dataclass
class Started:
    """Hold a running process and find its family: the processes of its session, or with its mark."""

    process: subprocess.Popen | WarmProcess
    mark: str
    logs: Path
    begun: float = field(default_factory=time.monotonic)

    def wait(self, limit_s: float = LIMIT_S) -> Ended:
        try:
            code = self.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            self.kill_all()
            raise AssertionError(f"still running after {limit_s} s:\n{self.said()}") from None
        return Ended(
            code,
            (self.logs / "out").read_text(),
            (self.logs / "err").read_text(),
            time.monotonic() - self.begun,
        )

    def said(self) -> str:
        return (self.logs / "out").read_text() + (self.logs / "err").read_text()

    def family(self) -> dict[int, dict[str, str]]:
        """Return the living processes of its session and others with the mark: pid to the environment at
        their start, in the order of their start.
        """
        found = {}
        for folder in sorted(Path("/proc").glob("[0-9]*"), key=lambda folder: int(folder.name)):
            with contextlib.suppress(OSError):
                words = (folder / "environ").read_bytes().split(b"\0")
                state, _, _, session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
                if (
                    int(session) == self.process.pid or f"{MARK}={self.mark}".encode() in words
                ) and state != "Z":
                    found[int(folder.name)] = dict(
                        word.decode().split("=", 1) for word in words if b"=" in word
                    )
        return found

    def local_ranks(self) -> list[int]:
        """Return the pids of the local supervisor's ranks, by rank; before they begin, of its fork server."""
        return sorted(_children(self.process.pid))

    def rank_pid(self, variable: str, rank: int) -> int:
        """Return the process that a launcher started with this rank in its environment: the first of them,
        not its children.
        """
        return next(pid for pid, env in self.family().items() if env.get(variable) == str(rank))

    def kill_all(self) -> None:
        """Kill the whole family with SIGKILL, as a loss of power would."""
        while family := self.family():
            for pid in family:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(0.05)

    def until(self, happened, limit_s: float = LIMIT_S):
        """Wait until `happened()` is true; return its value."""
        end = time.monotonic() + limit_s
        while not (value := happened()):
            assert self.process.poll() is None, (
                f"ended with {self.process.returncode} before it happened:\n{self.said()}"
            )
            assert time.monotonic() < end, f"did not happen within {limit_s} s:\n{self.said()}"
            time.sleep(0.005)
        return value


def with_overrides(arguments: tuple[str, ...], *overrides: str) -> tuple[str, ...]:
    """Return the arguments and the overrides, without the arguments that an override replaces.

    A key that a command line gives twice is refused.
    """
    keys = {override.partition("=")[0] for override in overrides}
    return *(argument for argument in arguments if argument.partition("=")[0] not in keys), *overrides


class Workshop:
    """Hold a folder with a model, the YAML of a run, and in `runs` the output of runs."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.runs = folder / "runs"
        self._started: list[Started] = []
        model = folder / "model"
        faults = folder / "faults"
        model.mkdir(parents=True)
        faults.mkdir()
        (model / "config.json").write_text(json.dumps(LLAMA))
        (faults / "sitecustomize.py").write_text(FAULTS)
        self.config = self.write_config("run.yaml", SETTINGS)

    def write_config(self, name: str, settings: dict) -> Path:
        path = self.folder / name
        settings = {
            **settings,
            "model": {"base": str(self.folder / "model"), **settings.get("model", {})},
            "run": {"out": str(self.runs)},
            "monitor": {"progress": False},
        }
        path.write_text(yaml.safe_dump(settings))
        return path

    def start_run(
        self,
        *arguments: str,
        launcher: tuple[str, ...] = (),
        config: Path | None = None,
        env: dict | None = None,
        command: tuple[str, ...] = (),
    ) -> Started:
        """Start `launcher launch.py --config CONFIG arguments...` in a session of its own. Without a launcher
        this is `python launch.py`, started warm (tests/warm.py). With a command, that is started instead.
        """
        mark = uuid.uuid4().hex
        logs = self.folder / "logs" / mark
        logs.mkdir(parents=True)
        faults = os.pathsep.join([str(self.folder / "faults"), os.environ["PYTHONPATH"]])
        run = (str(LAUNCH), "--config", str(config or self.config))
        command = [*(command or run), *arguments]
        environment = {**os.environ, "PYTHONPATH": faults, MARK: mark, **(env or {})}
        with (logs / "out").open("w") as out, (logs / "err").open("w") as err:
            if launcher:
                process = subprocess.Popen(
                    [*launcher, *command],
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=err,
                    cwd=self.folder,
                    start_new_session=True,
                    env=environment,
                )
            else:
                process = WarmProcess(
                    command, self.folder, environment, logs / "out", logs / "err", before=FAULTS
                )
        self._started.append(Started(process, mark, logs))
        return self._started[-1]

    def run(self, *arguments: str, limit_s: float = LIMIT_S, **options) -> Ended:
        return self.start_run(*arguments, **options).wait(limit_s)

    def finish_run(self, *arguments: str, **options) -> Ended:
        """Run to the end and require success."""
        ended = self.run(*arguments, **options)
        assert ended.code == 0, ended.text
        return ended

    def close(self) -> None:
        """Kill every process that was started here, however its test ended."""
        for started in self._started:
            started.kill_all()
            started.process.wait()
        self._started.clear()


def _children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [
            int(word)
            for path in Path(f"/proc/{pid}/task").glob("*/children")
            for word in path.read_text().split()
        ]
    return []


# What a run leaves.


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]


def rounds_seen(run: Path) -> int:
    """Return the number of the last round in the log of a run, or -1; round 0 is the evaluation before the
    first.
    """
    path = run / "rounds.jsonl"
    return path.read_bytes().count(b"\n") - 1 if path.exists() else -1


def journal_rounds(run: Path) -> list[int]:
    return sorted(int(path.parent.name[-6:]) for path in (run / "journal").glob("round-*/entry.json"))


def last_round(run: Path) -> Path:
    return run / "journal" / f"round-{journal_rounds(run)[-1]:06d}"


def bits(run: Path) -> dict[str, bytes]:
    """Return all that a run has learned as bytes by name: global tensors, server moments, stored optimizers,
    the exported adapter.
    """
    files = [*sorted(last_round(run).glob("*.safetensors")), run / "adapter" / "adapter_model.safetensors"]
    return {
        f"{file.name}:{name}": np.ascontiguousarray(tensor).tobytes()
        for file in files
        for name, tensor in load_file(file).items()
    }


def assert_same_run(run: Path, reference: Path) -> None:
    """Check that two runs have the same results bit for bit, and each round once."""
    ours = bits(run)
    theirs = bits(reference)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []
    assert [_learned(r) for r in records(run)] == [_learned(r) for r in records(reference)]


def _learned(record: dict) -> tuple:
    """Return the results in a record, without time and memory."""
    return tuple(
        record[key]
        for key in (
            "round",
            "train_loss",
            "val_loss",
            "tokens",
            "lr",
            "factor_error",
            "update_norm",
            "received",
            "missing",
        )
    )


def headline(run: Path) -> str:
    return (run / "report.md").read_text().partition("\n")[0]


def tree(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder with its content."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in sorted(folder.rglob("*"))
    }
