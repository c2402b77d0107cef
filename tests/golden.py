"""Golden runs: a check that tiny real runs give the results that were recorded, to the last digit.

    python tests/golden.py                       check all configurations against tests/golden/values.json
    python tests/golden.py check NAME...         some of them
    python tests/golden.py record [NAME...]      record the current results, after an intended change
    python tests/golden.py --root FOLDER ...     the same with the product's code of another checkout

Each golden run is `python launch.py --config ...` in a fresh folder. The check compares the loss of every
local step of every rank, the records of rounds and the summary without times and memory, the exit code, and
the SHA-256 of every tensor of the exported adapter.

The results do not depend on the clock or on randomness (golden_hook.py replaces both) or on the processor
(golden_pins.py). A probe detects a machine that rounds differently nevertheless: there, counts and bytes are
compared exactly, losses with a relative tolerance of 1e-4 (more in 16 bits), and digests are not compared.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))

from tests.golden_pins import environment  # noqa: E402
from tests.golden_run import Failed, Golden, play, probed, product_root, write_bases  # noqa: E402
from tests.golden_values import TOLERANCES, Recorded, differences, versions  # noqa: E402

VALUES = HERE / "tests" / "golden" / "values.json"

# Settings of all configurations: two clients, two ranks, two rounds and two local steps by default.
COMMON = {
    "model": {"dtype": "fp32", "tokenizer": "bytes"},
    "adapter": {"lora_rank": 2, "alpha": 8},
    "data": {
        "clients": 2,
        "split": "meta",
        "max_tokens": 40,
        "max_rows": 40,
        "val_fraction": 0.1,
        "template": "plain",
    },
    "train": {"local_steps": 2, "micro_batch": 2, "lr": 0.01},
    "federation": {"rounds": 2},
    "cluster": {"local_ranks": 2},
    "engine": {"threads": 1},
    "routing": {"mode": "plain"},
    "monitor": {"progress": False, "plot": False, "tensorboard": False},
    "deepspeed": {"base": "zero0.json"},
}
STOCK = "engine.tier=stock"
RESIDENT = "engine.tier=resident"
RAM = "engine.tier=ram"
TWO_RANKS = "cluster.ranks_per_client=2"
ONE_RANK = "cluster.local_ranks=1"
NO_ACTIVATIONS = "engine.activation_gib=0"
MASKED = "routing.mode=mix+mask routing.min_participants=2"
PIPELINE = f"engine.pipeline=client {TWO_RANKS} train.accumulation=2"
KEEP = "federation.local_optimizer=keep"
DROPOUT = "adapter.dropout=0.1"
CLIP = '{"name":"clip","norm":0.02}'  # without blanks, which separate settings
WIDE = "adapter.targets=all-linear"

GOLDEN = {
    # DeepSpeed executes.
    "stock-zero0": Golden(f"{STOCK} {WIDE} {DROPOUT} train.accumulation=2"),
    "stock-zero1": Golden(
        f"{STOCK} deepspeed.base=zero1.json {TWO_RANKS} federation.server_optimizer=momentum", base="qwen2"
    ),
    "stock-zero2": Golden(f"{STOCK} deepspeed.base=zero2.json {TWO_RANKS} train.clip=0.5", base="gpt2"),
    "stock-zero3": Golden(
        f"{STOCK} deepspeed.base=zero3.json {DROPOUT} {KEEP} federation.server_optimizer=adam data.clients=3"
    ),
    "stock-zero3-rank": Golden(
        f"{STOCK} deepspeed.base=zero3.json engine.base_partition=rank federation.method.rule=alternate"
    ),
    "stock-zero3-client": Golden(
        f"{STOCK} deepspeed.base=zero3.json engine.base_partition=client {TWO_RANKS}", base="qwen2"
    ),
    "stock-zero3-offload": Golden(
        f"{STOCK} deepspeed.base=zero3.json {TWO_RANKS} deepspeed.zero_optimization.offload_param.device=cpu"
    ),
    "stock-checkpointing": Golden(
        f"{STOCK} engine.activation_checkpointing=true {DROPOUT} data.split=lda", base="gpt2"
    ),
    "stock-full": Golden(
        f"adapter.method=full deepspeed.base=zero3.json {TWO_RANKS} train.optimizer=sgd train.momentum=0.5"
    ),
    "stock-bf16": Golden(f"{STOCK} model.dtype=bf16 deepspeed.base=zero2.json"),
    "stock-fp16": Golden(
        f"{STOCK} model.dtype=fp16 deepspeed.base=zero3.json train.local_steps=4 "
        "deepspeed.fp16.initial_scale_power=12"
    ),
    # Layer by layer.
    "resident": Golden(
        f"{RESIDENT} {ONE_RANK} train.accumulation=2 train.schedule=cosine train.warmup_steps=2"
    ),
    "resident-random": Golden(
        f"{RESIDENT} model.init=random train.optimizer=sgd train.weight_decay=0.1 "
        "federation.method.rule=freeze_a"
    ),
    "ram-client-slots": Golden(
        f"{RAM} {ONE_RANK} {WIDE} {DROPOUT} {KEEP} {NO_ACTIVATIONS} train.accumulation=2 "
        "engine.block_inputs=host federation.rounds=3"
    ),
    "ram-kept": Golden(
        f"{RAM} {ONE_RANK} train.accumulation=2 engine.block_slots=3 engine.activation_gib=1", base="qwen2"
    ),
    "ram-one-slot": Golden(
        f"{RAM} engine.block_slots=1 engine.resident_blocks=1 {NO_ACTIVATIONS}", base="gpt2"
    ),
    "ram-turns": Golden(
        f"{RAM} {ONE_RANK} data.clients=4 engine.client_slots=2 federation.method.rule=alternate "
        f"{NO_ACTIVATIONS}"
    ),
    "ram-bf16": Golden(f"{RAM} {ONE_RANK} model.dtype=bf16 {DROPOUT}"),
    "ram-fp16": Golden(f"{RAM} {ONE_RANK} model.dtype=fp16 deepspeed.fp16.initial_scale_power=12"),
    "ram-blocks": Golden(f"{RAM} {ONE_RANK} adapter.method=blocks adapter.blocks.last=1"),
    "nvme": Golden(f"engine.tier=nvme {ONE_RANK} {NO_ACTIVATIONS}"),
    "auto-client": Golden(
        f"deepspeed.base=zero3.json engine.tier=client {TWO_RANKS} {DROPOUT} {NO_ACTIVATIONS}"
    ),
    "auto-cluster": Golden(f"deepspeed.base=zero3.json data.clients=3 {NO_ACTIVATIONS}"),
    "cluster-one-sided": Golden(
        f"engine.tier=cluster engine.base_reads=one_sided {NO_ACTIVATIONS}", base="qwen2"
    ),
    # Pipelines.
    "pipeline-client": Golden(f"{PIPELINE} {RESIDENT} {KEEP}"),
    "pipeline-client-ram": Golden(f"{PIPELINE} {RAM} {DROPOUT}"),
    "pipeline-client-nvme": Golden(f"{PIPELINE} engine.tier=nvme", base="qwen2"),
    "pipeline-cluster": Golden(f"engine.pipeline=cluster {RESIDENT} train.accumulation=2 engine.cuts=[1]"),
    "pipeline-cluster-masked": Golden(
        f"engine.pipeline=cluster {RESIDENT} cluster.one_trust_domain=true {MASKED}", base="gpt2"
    ),
    # Rules, servers, modes, rounds.
    "rule-svd": Golden(f"{RESIDENT} federation.method=flexlora {ONE_RANK} data.clients=3"),
    "rule-stack": Golden(f"{RAM} federation.method=stack {ONE_RANK} {WIDE} data.clients=3"),
    "rule-residual": Golden(
        f"{RESIDENT} federation.method=residual federation.rounds=1", base="gpt2", again="federation.rounds=3"
    ),
    "clipped": Golden(f"{RESIDENT} federation.updates=[{CLIP}] {MASKED}"),
    "server-yogi": Golden(
        f"{RESIDENT} federation.server_optimizer=yogi federation.method.rule=freeze_a federation.rounds=3"
    ),
    "stale": Golden(
        f"{RESIDENT} {WIDE} federation.staleness=1 federation.server_optimizer=adam federation.rounds=3"
    ),
    "stale-masked": Golden(
        f"{RAM} federation.staleness=1 routing.mode=mask routing.min_participants=2 federation.rounds=3"
    ),
    "masked": Golden(f"{RESIDENT} {MASKED} cluster.local_ranks=3 data.clients=3"),
    "mixed": Golden(
        f"{STOCK} routing.mode=mix routing.min_participants=2 federation.server_optimizer=momentum"
    ),
    "uneven-steps": Golden(f"{RESIDENT} train.local_steps_by_cluster.slow=1", hosts="fast slow"),
    "seconds": Golden(
        f"{RESIDENT} federation.round_budget=seconds federation.round_seconds=3.5 train.local_steps=5 "
        "federation.rounds=3",
        hosts="fast slow",
        clock=True,
    ),
    "sampled": Golden(
        f"{RESIDENT} federation.clients_per_round=2 data.clients=3 federation.rounds=3 "
        "federation.evaluate_every=2"
    ),
    "early-stop": Golden(f"{RESIDENT} federation.patience=1 federation.server_lr=200 federation.rounds=4"),
    "alone": Golden(f"{RESIDENT} federation.compare_alone=true data.split=iid"),
    "diverged": Golden(
        f"{STOCK} train.optimizer=sgd train.lr=1e18 train.weight_decay=1 train.local_steps=1 "
        "federation.rounds=1 train.local_steps_by_cluster.two=3",
        hosts="one two",
    ),
    # Runs that begin twice.
    "resume": Golden(
        f"{STOCK} deepspeed.base=zero2.json {DROPOUT} {KEEP} federation.server_optimizer=adam "
        "federation.rounds=1",
        again="federation.rounds=3",
    ),
    "resume-killed": Golden(
        f"{RAM} {DROPOUT} federation.server_optimizer=momentum federation.rounds=3", kill="1 2 1"
    ),
    "resume-stale": Golden(
        f"{RESIDENT} federation.staleness=1 federation.rounds=2", again="federation.rounds=4"
    ),
}
# The runs that tests/run/test_golden.py checks.
SUITE = ("stock-zero3", "ram-client-slots", "pipeline-client", "masked", "stale", "resume")


def main(arguments: list[str]) -> int:
    """Run the command line of this file and return the exit code: 0 equal, 1 different, 2 usage."""
    parser = argparse.ArgumentParser(
        prog="python tests/golden.py", description="Check tiny real runs against recorded values."
    )
    parser.add_argument(
        "names",
        nargs="*",
        metavar="check|record|NAME",
        help="check (the default) or record, then names of runs; none: all",
    )
    parser.add_argument(
        "--root",
        type=Path,
        default=HERE,
        help="checkout whose code runs (default: this one). It must have the configuration keys of the "
        "golden runs and the functions of golden_hook.PATCHES",
    )
    parser.add_argument("--values", type=Path, default=VALUES, help="the recorded values (%(default)s)")
    options = parser.parse_intermixed_args(arguments)
    verb, *names = options.names or ["check"]
    if verb not in ("check", "record"):
        names = options.names
    if wrong := [name for name in names if name not in GOLDEN]:
        parser.error(f"no golden run is called {', '.join(wrong)}; there are {', '.join(GOLDEN)}")
    root = options.root.resolve()
    if not (root / "launch.py").is_file():
        parser.error(f"--root {options.root}: no launch.py is there; name a checkout")
    _pin_environment(root)
    recorded = Recorded.read(options.values) if options.values.exists() else None
    if recorded is None and verb != "record":
        parser.error(f"{options.values} is not there; `record` writes it")
    if (loaded := product_root()) != root:
        parser.error(
            f"runs would use the code of {loaded}, not of {root}; start this file by its path, "
            "or name another --root"
        )
    with tempfile.TemporaryDirectory(prefix="golden-bases-") as bases:
        write_bases(Path(bases))
        runs = Runs(names or list(GOLDEN), root, Path(bases))
        if verb == "record":
            return _record(runs, recorded, options.values)
        return _check(runs, recorded)


def _pin_environment(root: Path) -> None:
    """Set the environment of this process, which golden runs inherit, for the checkout at `root`."""
    pinned = environment(root, os.environ)
    os.environ.clear()
    os.environ.update(pinned)
    sys.path[:] = list(dict.fromkeys([str(root), str(HERE), *sys.path]))


class Runs:
    """Golden runs to make. Iterating makes them one after the other and yields (name, values or failure).

    Args:
        names: of GOLDEN.
        root: the checkout whose code runs.
        bases: folder of the models.
    """

    def __init__(self, names: list[str], root: Path, bases: Path):
        self.names = names
        self._root = root
        self._bases = bases
        self._begin = time.monotonic()

    def __iter__(self):
        return ((name, self.play(name)) for name in self.names)

    def play(self, name: str) -> dict | Failed:
        """Make one run and return its values or its failure."""
        try:
            return play(GOLDEN[name], COMMON, self._root, self._bases)
        except Failed as failure:
            return failure

    def progress(self, name: str) -> str:
        """Return the progress over all runs once `name` is done, as `[3/44, 12 s, ETA 160 s]`."""
        done = self.names.index(name) + 1
        spent = time.monotonic() - self._begin
        left = spent / done * (len(self.names) - done)
        return f"[{done}/{len(self.names)}, {spent:.0f} s, ETA {left:.0f} s]"


def _check(runs: Runs, recorded: Recorded) -> int:
    """Compare runs with the recorded values and print a line for each. Return 1 if any differs, else 0."""
    exact = probed() == recorded.probe
    if not exact:
        print(
            f"this machine rounds differently from the one that recorded ({recorded.made_with}; here "
            f"{versions()}): losses are compared with a tolerance, counts exactly, digests not at all",
            flush=True,
        )
    different = 0
    for name, values in runs:
        faults = _faults(recorded.runs.get(name), values, 0.0 if exact else _tolerance(name))
        different += bool(faults)
        print(f"{name}: {_verdict(faults, 'DIFFERENT', 'equal')} {runs.progress(name)}", flush=True)
    print(f"{len(runs.names) - different} of {len(runs.names)} golden runs are equal", flush=True)
    return int(different > 0)


def _record(runs: Runs, recorded: Recorded | None, path: Path) -> int:
    """Record the values of each run that gives the same values twice. Return 1 if any does not, else 0."""
    probe = probed()
    values_by_run = {}
    if recorded is not None:
        values_by_run = {name: values for name, values in recorded.runs.items() if name in GOLDEN}
    if values_by_run.keys() - set(runs.names) and probe != recorded.probe:
        print(f"{path} comes from a machine that rounds differently: record all runs, not some", flush=True)
        return 1
    unrecorded = 0
    for name, values in runs:
        faults = _faults(values, runs.play(name))
        unrecorded += bool(faults)
        if not faults:
            values_by_run[name] = values
            ordered = {name: values_by_run[name] for name in GOLDEN if name in values_by_run}
            Recorded(probe, versions(), ordered).write(path)
        print(f"{name}: {_verdict(faults, 'NOT RECORDED', 'recorded')} {runs.progress(name)}", flush=True)
    return int(unrecorded > 0)


def _tolerance(name: str) -> float:
    """Return the relative tolerance of a run's losses on machines that round differently."""
    dtypes = [dtype for dtype in TOLERANCES if f"model.dtype={dtype}" in GOLDEN[name].arguments]
    return TOLERANCES[dtypes[0] if dtypes else "fp32"]


def _faults(expected, values, tolerance: float = 0.0) -> list[str]:
    """Return the differences of two results of a run, or why they cannot be compared; empty: equal."""
    failures = [str(result) for result in (expected, values) if isinstance(result, Failed)]
    if failures:
        return failures
    if expected is None:
        return ["no values are recorded; `record` this run from code that is known to be right"]
    return differences(expected, values, tolerance)


def _verdict(faults: list[str], bad: str, good: str) -> str:
    """Return `good` without faults, else `bad` with the first fault and the number of the others."""
    if not faults:
        return good
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return f"{bad}: {faults[0]}{more}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
