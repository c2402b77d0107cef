"""One golden run: started by the user's door in a fresh folder, and what of it must not change."""

import hashlib
import json
import math
import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import yaml

from tests.golden_bases import BASES
from tests.warm import WarmProcess

LIMIT_S = 180.0  # a start of a run may take
INSTALL = "from tests.golden_hook import install; install()"
NAME = "golden"  # of every run
# Of a round, of a client in it, and of a whole run: what depends neither on time nor on the machine's memory.
ROUND_VALUES = (
    "round",
    "train_loss",
    "val_loss",
    "tokens",
    "bytes_sent",
    "lr",
    "factor_error",
    "factor_error_exact",
    "update_norm",
    "clients",
    "received",
    "loaded_bytes",
    "clipped",
    "missing",
)
CLIENT_VALUES = ("client", "train_loss", "val_loss", "tokens", "local_steps", "bytes_sent")
SUMMARY_VALUES = (
    "status",
    "rounds",
    "total_rounds",
    "exit_code",
    "first_val_loss",
    "last_val_loss",
    "best_val_loss",
    "best_round",
    "tokens",
    "bytes_sent",
    "restarts",
    "loaded_bytes",
    "clipped",
    "missing",
)


@dataclass(frozen=True)
class Golden:
    """A configuration of a golden run.

    Attributes:
        words: what it adds to the common configuration, as on a command line.
        base: the tiny model it trains (golden_bases.BASES).
        hosts: hosts of one rank each, each a cluster of its own, by name of the cluster; empty: this machine.
        again: words of a second start of the same run, which resumes it; None: there is none.
        clock: whether its rounds are paced by the moved clock of golden_hook.
        kill: see GOLDEN_KILL there.
    """

    words: str
    base: str = "llama"
    hosts: str = ""
    again: str | None = None
    clock: bool = False
    kill: str = ""


class Failed(Exception):
    """A golden run has not come to an end, or told something twice and differently."""


def play(golden: Golden, common: dict, root: Path, bases: Path) -> dict:
    """Run one configuration and return its values: {"exit_codes", "steps", "rounds", "summary", "alone",
    "adapter"}.

    Args:
        common: sections of the YAML that all configurations share.
        root: the checkout whose launch.py is started.
        bases: folder of the models.
    """
    with tempfile.TemporaryDirectory(prefix="golden-") as name:
        folder = Path(name)
        (folder / "noted").mkdir()
        model = {**common["model"], "base": str(bases / golden.base)}
        sections = {**common, "model": model, "run": {"name": NAME, "out": str(folder)}}
        (folder / "run.yaml").write_text(yaml.safe_dump(sections))
        words = ["--config", "run.yaml", "--json", *golden.words.split()]
        if golden.hosts:
            hosts = [
                f"host{i} slots=1\n# fed-host host{i} cluster={cluster}\n"
                for i, cluster in enumerate(golden.hosts.split())
            ]
            (folder / "hosts").write_text("".join(hosts))
            words += ["--hostfile", "hosts"]
        codes = [_start(golden, root, folder, words)]
        if golden.again is not None:
            again = golden.again.split()
            changed = {argument.partition("=")[0] for argument in again}
            kept = [argument for argument in words if argument.partition("=")[0] not in changed]
            codes.append(_start(golden, root, folder, [*kept, *again]))
        return {"exit_codes": codes, **collect(folder)}


def _start(golden: Golden, root: Path, folder: Path, words: list[str]) -> int:
    hook = {
        "GOLDEN_FOLDER": str(folder / "noted"),
        "GOLDEN_CLOCK": str(int(golden.clock)),
        "GOLDEN_KILL": golden.kill,
    }
    out = folder / "out"
    err = folder / "err"
    out.write_text("")  # of this start alone
    err.write_text("")
    env = {**os.environ, **hook}
    process = WarmProcess([str(root / "launch.py"), *words], folder, env, out, err, before=INSTALL)
    try:
        code = process.wait(LIMIT_S)
    except subprocess.TimeoutExpired:
        process.terminate()
        process.wait(LIMIT_S)
        raise Failed(f"still running after {LIMIT_S:g} s; its last words:\n{_tail(err)}") from None
    if not (folder / NAME / "rounds.jsonl").exists():
        raise Failed(f"ended with {code} before any round; its last words:\n{_tail(err)}")
    return code


def _tail(path: Path) -> str:
    return path.read_text(errors="replace")[-1500:]


def collect(folder: Path) -> dict:
    """Return what the run in `folder` has left, as plain values; numbers that are not finite as text."""
    run = folder / NAME
    told = [json.loads(line) for line in (folder / "out").read_text().splitlines()]
    summaries = [line for line in told if line["event"] == "summary"]
    if not summaries:
        raise Failed(f"it told no summary; its last words:\n{_tail(folder / 'err')}")
    rounds = [
        _picked(json.loads(line), ROUND_VALUES) | _clients(json.loads(line))
        for line in (run / "rounds.jsonl").read_text().splitlines()
    ]
    noted = folder / "noted"
    alone = [json.loads(line) for path in noted.glob("alone-*") for line in path.read_text().splitlines()]
    found = {"steps": steps_of(noted), "rounds": rounds, "summary": _picked(summaries[-1], SUMMARY_VALUES)}
    if alone:
        found["alone"] = alone
    return _plain(found | {"adapter": digests(run / "adapter")})


def _picked(values: dict, names: tuple[str, ...]) -> dict:
    return {name: values[name] for name in names}


def _clients(record: dict) -> dict:
    return {"per_client": [_picked(client, CLIENT_VALUES) for client in record["per_client"]]}


def _plain(value):
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value


def steps_of(noted: Path) -> dict[str, dict[str, list]]:
    """Return {"rank R": {"round N": losses of its local steps, in their order}} as golden_hook has written
    them.

    A round that was begun again after a restart counts once.

    Raises:
        Failed: its steps had other losses the second time.
    """
    found: dict[str, dict[str, list]] = {}
    for path in sorted(noted.glob("steps-*.jsonl"), key=lambda path: int(path.stem.partition("-")[2])):
        rank = f"rank {path.stem.partition('-')[2]}"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        rounds: dict[str, list] = {}
        for process in dict.fromkeys(line["process"] for line in lines):
            own: dict[str, list] = {}
            for line in lines:
                if line["process"] == process:
                    own.setdefault(f"round {line['round']}", []).append(line["loss"])
            for name, losses in own.items():
                before = rounds.get(name, [])
                if repr(losses[: len(before)]) != repr(before[: len(losses)]):
                    raise Failed(f"{rank}, {name}: losses {before} before a restart, and {losses} after it")
                rounds[name] = max(before, losses, key=len)
        found[rank] = rounds
    return found


def digests(folder: Path) -> dict[str, str]:
    """Return {tensor of a *.safetensors file in `folder`: SHA-256 of its type, shape and bytes}."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        content = path.read_bytes()
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])
        header.pop("__metadata__", None)
        for name, tensor in sorted(header.items()):
            begin, end = (8 + size + offset for offset in tensor["data_offsets"])
            head = f"{tensor['dtype']} {tensor['shape']} ".encode()
            found[name] = hashlib.sha256(head + content[begin:end]).hexdigest()
    return found


def write_bases(folder: Path) -> None:
    """Write the tiny models that golden runs train, in a process of its own, which may import torch."""
    from tests.processes import context

    process = context.Process(target=_write_all, args=(str(folder),))
    process.start()
    process.join(LIMIT_S)
    if process.exitcode != 0:
        raise Failed(f"the tiny models could not be written: exit code {process.exitcode}")


def _write_all(folder: str) -> None:
    for name, write in BASES.items():
        write(Path(folder) / name)


def product_root() -> Path:
    """Return the checkout whose code a process has that stands where golden runs stand."""
    from tests.processes import run_ranks

    return Path(run_ranks(1, _product_file, timeout=LIMIT_S)[0]).resolve().parent.parent


def _product_file(_rank: int) -> str:
    import fedspeed

    return fedspeed.__file__


def probed() -> dict[str, str]:
    """Return what golden_pins.probe gives in a process that stands where golden runs stand."""
    from tests.processes import run_ranks

    return run_ranks(1, _probe, timeout=LIMIT_S)[0]


def _probe(_rank: int) -> dict[str, str]:
    from tests.golden_pins import probe

    return probe()
