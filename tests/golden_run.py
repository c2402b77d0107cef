"""A golden run: launch.py in a fresh folder, and the values of it that must not change."""

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

LIMIT_S = 180.0  # timeout of a start of a run
INSTALL = "from tests.golden_hook import install; install()"
NAME = "golden"  # run.name of every run
# Values of a round, of a client in it, and of a whole run that depend neither on time nor on the machine's
# memory.
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
        arguments: settings added to the common configuration, as on a command line.
        base: the tiny model it trains (golden_bases.BASES).
        hosts: names of clusters that have one host with one rank each; empty: this machine.
        again: settings of a second start, which resumes the run; None: no second start.
        clock: whether rounds are paced by golden_hook.step_clock.
        kill: see GOLDEN_KILL in golden_hook.
    """

    arguments: str
    base: str = "llama"
    hosts: str = ""
    again: str | None = None
    clock: bool = False
    kill: str = ""


class Failed(Exception):
    """A golden run did not finish, or gave other losses after a restart than before it."""


def play(golden: Golden, common: dict, root: Path, bases: Path) -> dict:
    """Run one configuration and return its values: {"exit_codes", "steps", "rounds", "summary", "alone",
    "adapter"}.

    Args:
        common: sections of the YAML file that all configurations share.
        root: the checkout whose launch.py is started.
        bases: folder of the models.

    Raises:
        Failed: the run did not finish, or a repeated round gave other losses.
    """
    with tempfile.TemporaryDirectory(prefix="golden-") as name:
        folder = Path(name)
        (folder / "noted").mkdir()
        model = {**common["model"], "base": str(bases / golden.base)}
        sections = {**common, "model": model, "run": {"name": NAME, "out": str(folder)}}
        (folder / "run.yaml").write_text(yaml.safe_dump(sections))
        arguments = ["--config", "run.yaml", "--json", *golden.arguments.split()]
        if golden.hosts:
            hosts = [
                f"host{i} slots=1\n# fed-host host{i} cluster={cluster}\n"
                for i, cluster in enumerate(golden.hosts.split())
            ]
            (folder / "hosts").write_text("".join(hosts))
            arguments += ["--hostfile", "hosts"]
        codes = [_start(golden, root, folder, arguments)]
        if golden.again is not None:
            again = golden.again.split()
            changed = {argument.partition("=")[0] for argument in again}
            kept = [argument for argument in arguments if argument.partition("=")[0] not in changed]
            codes.append(_start(golden, root, folder, [*kept, *again]))
        return {"exit_codes": codes, **collect(folder)}


def _start(golden: Golden, root: Path, folder: Path, arguments: list[str]) -> int:
    """Start the run in `folder` and return its exit code.

    Raises:
        Failed: it did not finish in time, or ended before the first round.
    """
    hook = {
        "GOLDEN_FOLDER": str(folder / "noted"),
        "GOLDEN_CLOCK": str(int(golden.clock)),
        "GOLDEN_KILL": golden.kill,
    }
    out = folder / "out"
    err = folder / "err"
    out.write_text("")  # only the output of this start is read
    err.write_text("")
    env = {**os.environ, **hook}
    process = WarmProcess([str(root / "launch.py"), *arguments], folder, env, out, err, before=INSTALL)
    try:
        code = process.wait(LIMIT_S)
    except subprocess.TimeoutExpired:
        process.terminate()
        process.wait(LIMIT_S)
        raise Failed(f"still running after {LIMIT_S:g} s; its last output:\n{_tail(err)}") from None
    if not (folder / NAME / "rounds.jsonl").exists():
        raise Failed(f"ended with {code} before any round; its last output:\n{_tail(err)}")
    return code


def _tail(path: Path) -> str:
    return path.read_text(errors="replace")[-1500:]


def collect(folder: Path) -> dict:
    """Return the results of the run in `folder` as JSON values, numbers that are not finite as text.

    Raises:
        Failed: there is no summary.
    """
    run = folder / NAME
    events = [json.loads(line) for line in (folder / "out").read_text().splitlines()]
    summaries = [event for event in events if event["event"] == "summary"]
    if not summaries:
        raise Failed(f"it printed no summary; its last output:\n{_tail(folder / 'err')}")
    rounds = [
        _picked(json.loads(line), ROUND_VALUES) | _clients(json.loads(line))
        for line in (run / "rounds.jsonl").read_text().splitlines()
    ]
    noted = folder / "noted"
    alone = [json.loads(line) for path in noted.glob("alone-*") for line in path.read_text().splitlines()]
    values = {"steps": steps_of(noted), "rounds": rounds, "summary": _picked(summaries[-1], SUMMARY_VALUES)}
    if alone:
        values["alone"] = alone
    return _plain(values | {"adapter": digests(run / "adapter")})


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
    """Return {"rank R": {"round N": losses of its local steps in order}} from the files of golden_hook.

    A round that was repeated after a restart counts once.

    Raises:
        Failed: a repeated round gave other losses.
    """
    by_rank: dict[str, dict[str, list]] = {}
    for path in sorted(noted.glob("steps-*.jsonl"), key=lambda path: int(path.stem.partition("-")[2])):
        rank = f"rank {path.stem.partition('-')[2]}"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        rounds: dict[str, list] = {}
        for process in dict.fromkeys(line["process"] for line in lines):
            of_process: dict[str, list] = {}
            for line in lines:
                if line["process"] == process:
                    of_process.setdefault(f"round {line['round']}", []).append(line["loss"])
            for name, losses in of_process.items():
                before = rounds.get(name, [])
                if repr(losses[: len(before)]) != repr(before[: len(losses)]):
                    raise Failed(f"{rank}, {name}: losses {before} before a restart, and {losses} after it")
                rounds[name] = max(before, losses, key=len)
        by_rank[rank] = rounds
    return by_rank


def digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of type, shape and bytes of each tensor in the *.safetensors files of `folder`."""
    by_tensor = {}
    for path in sorted(folder.glob("*.safetensors")):
        content = path.read_bytes()
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])
        header.pop("__metadata__", None)
        for name, tensor in sorted(header.items()):
            begin, end = (8 + size + offset for offset in tensor["data_offsets"])
            head = f"{tensor['dtype']} {tensor['shape']} ".encode()
            by_tensor[name] = hashlib.sha256(head + content[begin:end]).hexdigest()
    return by_tensor


def write_bases(folder: Path) -> None:
    """Write the tiny models that golden runs train, in a separate process, which imports torch."""
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
    """Return the checkout whose code a process imports that is started as golden runs are."""
    from tests.processes import run_ranks

    return Path(run_ranks(1, _product_file, timeout=LIMIT_S)[0]).resolve().parent.parent


def _product_file(_rank: int) -> str:
    import fedspeed

    return fedspeed.__file__


def probed() -> dict[str, str]:
    """Return the result of golden_pins.probe in a process that is started as golden runs are."""
    from tests.processes import run_ranks

    return run_ranks(1, _probe, timeout=LIMIT_S)[0]


def _probe(_rank: int) -> dict[str, str]:
    from tests.golden_pins import probe

    return probe()
