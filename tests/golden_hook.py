"""Functions that golden runs replace in the product.

In each process of a golden run, `install` replaces the functions of PATCHES: those that report a loss or the
end of the run also write it to a file, the random bits of masked sums come from a seed, and the clock of runs
that depend on one is advanced by local steps. After one of these functions has been moved in the product, its
dotted name must be changed here, and its replacement if the arguments changed.

Environment variables of a golden run (tests/golden_run.py sets them):
    GOLDEN_FOLDER: folder of the files that ranks write.
    GOLDEN_CLOCK: "1": the clock by which rounds are paced advances by one second for each local step on rank
    0, by two on rank 1, and so on.
    GOLDEN_KILL: "RANK ROUND STEP": this rank kills itself once with SIGKILL, after this step.
"""

import contextlib
import hashlib
import importlib
import itertools
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

from tests.golden_pins import pin_torch

# Dotted name in the product -> function below that gets the original and returns its replacement.
PATCHES = {
    "fedspeed.cluster.discover.discover": "noting_rank",  # later the variable RANK counts within a cluster
    "fedspeed.monitor.monitor.Monitor.step": "noting_steps",  # each local step of every rank, with its loss
    "fedspeed.monitor.monitor.NoMonitor.step": "noting_steps",
    "fedspeed.monitor.monitor.Monitor.finish": "noting_end",  # the comparison with each client alone
    # Random rounding of masked sums.
    "fedspeed.routing.anonymous.exchange.AnonymousExchange._random": "seeded_bits",
    "fedspeed.federation.pacing.time": "step_clock",  # measures the seconds of a round
    # DeepSpeed supports fp16 only on CPUs with AVX-512 FP16.
    "deepspeed.accelerator.cpu_accelerator.CPU_Accelerator.is_fp16_supported": "always",
}
CLOCKS = ("step_clock",)  # only with GOLDEN_CLOCK

_elapsed = [0.0]  # seconds of the step clock
_ranks: list[int] = []  # the rank of this process, once it is known
_draws = itertools.count()


def install() -> None:
    """Replace the functions of PATCHES in this process and in those it forks."""
    pin_torch()
    for dotted, replacement in PATCHES.items():
        if replacement in CLOCKS and os.environ.get("GOLDEN_CLOCK") != "1":
            continue
        holder, name = _holder_of(dotted)
        setattr(holder, name, globals()[replacement](getattr(holder, name)))


def _holder_of(dotted: str):
    """Return the module or class that has the last part of a dotted name, and that part.

    Raises:
        AttributeError: the dotted name does not exist.
    """
    parts = dotted.split(".")
    for count in range(len(parts) - 1, 0, -1):
        with contextlib.suppress(ModuleNotFoundError):
            holder = importlib.import_module(".".join(parts[:count]))
            break
    for part in parts[count:-1]:
        holder = getattr(holder, part)
    if not hasattr(holder, parts[-1]):
        raise AttributeError(
            f"tests/golden_hook.py replaces {dotted}, which no longer exists; correct its name in PATCHES"
        )
    return holder, parts[-1]


def _rank() -> int:
    """Return the number of this rank in the whole job."""
    return _ranks[-1]


def _write(kind: str, values: dict) -> None:
    """Append a line to this rank's file of this kind."""
    with (Path(os.environ["GOLDEN_FOLDER"]) / f"{kind}-{_rank()}.jsonl").open("a") as file:
        file.write(json.dumps(values) + "\n")


def noting_rank(discover):
    """Return a `discover` that also stores the rank it returns."""

    def discover_and_note(*arguments, **options):
        launch = discover(*arguments, **options)
        _ranks.append(launch.world_rank)
        return launch

    return discover_and_note


def noting_steps(step):
    """Return a `step` of a monitor that also writes the step and its loss to steps-RANK.jsonl."""

    def step_and_note(self, round_number, local_step, local_steps, loss=None):
        _write("steps", {"process": os.getpid(), "round": round_number, "loss": loss})
        _elapsed[0] += 1.0 + _rank()
        flag = Path(os.environ["GOLDEN_FOLDER"]) / "killed"
        if os.environ.get("GOLDEN_KILL") == f"{_rank()} {round_number} {local_step}" and not flag.exists():
            flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, round_number, local_step, local_steps, loss)

    return step_and_note


def noting_end(finish):
    """Return a `finish` of a monitor that also writes the scores of clients alone to alone-RANK.jsonl."""

    def finish_and_note(self, summary, facts, comparison=None):
        for row in comparison.rows if comparison else ():
            _write("alone", {"name": row.name, "loss": row.held_out_loss, "accuracy": row.accuracy})
        return finish(self, summary, facts, comparison)

    return finish_and_note


def seeded_bits(_random):
    """Return a source of random bits like the product's, with keys derived from the rank and a count."""
    from fedspeed.routing.anonymous.crypto import CIPHERS, KEY, fill_key_stream

    def seeded(self, purpose, vector):
        cipher = CIPHERS[self._config.cipher]
        key = hashlib.sha256(f"golden {_rank()} {next(_draws)}".encode()).digest()[:KEY]
        part = itertools.count()
        return lambda out: fill_key_stream(cipher, key, next(part), out)

    return seeded


def always(_supported):
    """Return a method that returns True."""
    return lambda self: True


def step_clock(_time):
    """Return a replacement of the module `time` whose clock advances with local steps only."""
    return SimpleNamespace(perf_counter=lambda: 100.0 + _elapsed[0])
