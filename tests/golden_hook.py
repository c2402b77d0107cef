"""What golden runs put beneath the product: every place of it that they replace.

Product code stays as it is. In each process of a golden run `install` replaces the functions of PATCHES:
those that tell a loss or the end of the run also write it down, the one that draws random bits for masked
sums draws them from a seed, and where a run depends on the clock, that one is moved by the run's own steps.
Who moves such a function in the product changes its dotted name here, and its replacement if the arguments
are others.

Environment of a golden run (tests/golden_run.py sets it):
    GOLDEN_FOLDER: where the ranks write what they do.
    GOLDEN_CLOCK: "1": the clock by which rounds are paced moves by a second a local step on rank 0, two on
    rank 1, and so on. GOLDEN_KILL: "RANK ROUND STEP": this rank kills itself once, as kill -9 would, when it
    has taken this step.
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

# What is replaced: dotted name in the product -> function below, which gets what stood there and returns what
# stands there from then on.
PATCHES = {
    "fedspeed.cluster.discover.discover": "noting_rank",  # RANK soon counts within a cluster
    "fedspeed.monitor.monitor.Monitor.step": "noting_steps",  # each local step of every rank, with its loss
    "fedspeed.monitor.monitor.NoMonitor.step": "noting_steps",
    "fedspeed.monitor.monitor.Monitor.finish": "noting_end",  # the comparison with each client alone
    "fedspeed.routing.anonymous.exchange._random": "seeded_bits",  # random rounding of masked sums
    "fedspeed.federation.pacing.time": "moved_clock",  # what a round's seconds are measured by
    # Else a CPU has fp16 only with AVX-512 FP16.
    "deepspeed.accelerator.cpu_accelerator.CPU_Accelerator.is_fp16_supported": "always",
}
CLOCKS = ("moved_clock",)  # only with GOLDEN_CLOCK

_elapsed = [0.0]  # seconds of the moved clock
_known: dict[str, int] = {}  # of this process
_draws = itertools.count()


def install() -> None:
    """Replace what PATCHES names, in this process and in all that it forks."""
    pin_torch()
    for dotted, replacement in PATCHES.items():
        if replacement in CLOCKS and os.environ.get("GOLDEN_CLOCK") != "1":
            continue
        holder, name = _holder_of(dotted)
        setattr(holder, name, globals()[replacement](getattr(holder, name)))


def _holder_of(dotted: str):
    """Return (the module or class that holds the last part of a dotted name, that part).

    Raises:
        AttributeError: nothing of that name is there.
    """
    words = dotted.split(".")
    for count in range(len(words) - 1, 0, -1):
        with contextlib.suppress(ModuleNotFoundError):
            holder = importlib.import_module(".".join(words[:count]))
            break
    for word in words[count:-1]:
        holder = getattr(holder, word)
    if not hasattr(holder, words[-1]):
        raise AttributeError(
            f"tests/golden_hook.py replaces {dotted}, which is not there any more; "
            "name its new place in PATCHES"
        )
    return holder, words[-1]


def _rank() -> int:
    """Return the number of this rank over the whole job."""
    return _known["rank"]


def _write(kind: str, values: dict) -> None:
    with (Path(os.environ["GOLDEN_FOLDER"]) / f"{kind}-{_rank()}.jsonl").open("a") as file:
        file.write(json.dumps(values) + "\n")


def noting_rank(discover):
    """Return a `discover` that also remembers the rank that it finds."""

    def noted(*arguments, **options):
        launch = discover(*arguments, **options)
        _known["rank"] = launch.world_rank
        return launch

    return noted


def noting_steps(step):
    """Return a `step` of a monitor that also writes the step and its loss to steps-RANK.jsonl."""

    def noted(self, round_number, local_step, local_steps, loss=None):
        _write("steps", {"process": os.getpid(), "round": round_number, "loss": loss})
        _elapsed[0] += 1.0 + _rank()
        flag = Path(os.environ["GOLDEN_FOLDER"]) / "killed"
        if os.environ.get("GOLDEN_KILL") == f"{_rank()} {round_number} {local_step}" and not flag.exists():
            flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, round_number, local_step, local_steps, loss)

    return noted


def noting_end(finish):
    """Return a `finish` of a monitor that also writes the scores of clients alone to alone-RANK.jsonl."""

    def noted(self, summary, facts, comparison=None):
        for row in comparison.rows if comparison else ():
            _write("alone", {"name": row.name, "loss": row.held_out_loss, "accuracy": row.accuracy})
        return finish(self, summary, facts, comparison)

    return noted


def seeded_bits(_random):
    """Return a source of random bits like the product's, its keys made of the rank and a count."""
    from fedspeed.routing.anonymous.crypto import KEY, fill_key_stream

    def seeded(cipher):
        key = hashlib.sha256(f"golden {_rank()} {next(_draws)}".encode()).digest()[:KEY]
        part = itertools.count()
        return lambda out: fill_key_stream(cipher, key, next(part), out)

    return seeded


def always(_supported):
    """Return a method that says yes."""
    return lambda self: True


def moved_clock(_time):
    """Return what stands for the module `time` where rounds are paced: it moves with local steps only."""
    return SimpleNamespace(perf_counter=lambda: 100.0 + _elapsed[0])
