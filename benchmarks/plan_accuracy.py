"""The planner's predictions compared with measurements on this machine: device memory and seconds of a step,
in several settings.

    python benchmarks/plan_accuracy.py [--repeat 3] [--only ram]

First the machine is probed (fedspeed probe); then each setting runs in a process of its own, with one rank on
all cores. On a CPU, device memory is counted by fedspeed/engine/memory_counter.py. The machine must be quiet,
so that the probe and the steps run under the same conditions.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import Rows, ds_config, join_ranks, run_ranks, write_model  # noqa: E402


@dataclass(frozen=True)
class Case:
    """One setting of one model; `rows` of `tokens` tokens a client, in micro-batches of `micro_batch`."""

    tier: str
    hidden: int = 1024
    blocks: int = 8
    vocab: int = 8192
    tokens: int = 256
    rows: int = 4
    micro_batch: int = 1
    clients: int = 1
    resident: int = 0
    activations: float = 0.0  # GiB
    slots: int = 2
    checkpointing: bool = False
    dtype: str = "bf16"


CASES = [
    Case("stock"),
    Case("stock", checkpointing=True),
    Case("stock", micro_batch=4),
    Case("resident"),
    Case("ram"),
    Case("nvme"),
    Case("ram", clients=3, rows=2),
    Case("ram", blocks=16, hidden=512, resident=4, slots=3),
    Case("ram", dtype="fp32", tokens=128),
    Case("nvme", tokens=512, micro_batch=2),
    Case("resident", hidden=512, blocks=24, rows=8),
    Case("resident", activations=1.0),
    Case("ram", activations=0.05),
    Case("resident", hidden=512, blocks=24, rows=8, activations=0.25),
]


def work(case: Case, rank: int, port: int, folder: str, repeat: int, *, results) -> None:
    from fedspeed.data.config import TrainConfig
    from fedspeed.engine.build import EngineContext, EngineSpec, build_engine
    from fedspeed.engine.config import EngineConfig
    from fedspeed.engine.world import leave_world
    from fedspeed.models.config import AdapterConfig, ModelConfig
    from fedspeed.monitor.clock import StageClock

    join_ranks(port)
    options = EngineConfig(
        tier=case.tier,
        activation_checkpointing=case.checkpointing,
        block_slots=case.slots,
        resident_blocks=case.resident,
        activation_gib=case.activations,
    )
    spec = EngineSpec(
        model=ModelConfig(base=folder, init="random", dtype=case.dtype),
        adapter=AdapterConfig(),
        train=TrainConfig(),
        engine=options,
        deepspeed=ds_config(0, case.dtype),
    )
    engine = build_engine(
        spec,
        EngineContext(
            client_sets=[(0,)], clock=StageClock(), nvme=Path(folder) / "swap", seed=0, clients=case.clients
        ),
    )
    turns = [
        range(first, min(first + engine.client_slots, case.clients))
        for first in range(0, case.clients, engine.client_slots)
    ]
    for slot in range(engine.client_slots):
        engine.load(engine.state(slot), slot=slot)
    step = Rows(case, 0).step(case.rows // case.micro_batch, case.micro_batch)
    seconds = []
    for _ in range(1 + repeat):
        begin = time.perf_counter()
        for turn in turns:
            engine.train_step([step] * len(turn), 1e-3)
        seconds.append(time.perf_counter() - begin)
    results.put((rank, (engine.device_bytes, statistics.median(seconds[1:]))))
    engine.close()
    leave_world()


def predicted(case: Case, folder: str, node):
    """(bytes on the device, seconds of a step)."""
    from fedspeed.models.catalogue import shape_of
    from fedspeed.planner.memory import device_memory
    from fedspeed.planner.plan import RankProfile, Setting, Task
    from fedspeed.planner.timing import seconds_of

    task = Task(shape_of(folder), case.clients, case.tokens, case.rows, dtype=case.dtype, stage=0)
    setting = Setting(
        case.tier,
        case.micro_batch,
        case.rows // case.micro_batch,
        resident_blocks=case.resident,
        block_slots=case.slots,
        client_slots=case.clients,
        block_inputs="device",
        checkpointing=case.checkpointing,
        activation_bytes=int(case.activations * 2**30),
    )
    profile = RankProfile(
        node,
        1,
        1,
        cluster_ranks=1,
        cluster_nodes=1,
        carried=case.clients,
        participants=1,
        participants_here=1,
    )
    persistent, transient = device_memory(task, setting, profile, evaluation=False)
    return (
        sum(persistent.values()) + sum(transient.values()),
        seconds_of(task, setting, profile).total,
        {**persistent, **transient},
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--only", default="", help="a part of the names of the settings to run")
    parser.add_argument("--causes", action="store_true", help="print the predicted bytes by cause")
    args = parser.parse_args()
    if not any(args.only in case.tier for case in CASES):
        parser.error(f"--only={args.only}: tiers are {', '.join(sorted({case.tier for case in CASES}))}")
    from fedspeed.cluster.hostfile import Host
    from fedspeed.engine.probe import probe
    from fedspeed.planner.hardware import node_of

    found = []
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as disk:
        facts = probe(Path(disk))
        node = node_of(Host("localhost", 1, nvme=disk), [facts])
        print(
            "probe: "
            + ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in facts["device"]["flops"].items())
        )
        for case in (c for c in CASES if args.only in c.tier):
            with tempfile.TemporaryDirectory(dir=disk) as folder:
                write_model(Path(folder), case, case.blocks)
                memory, seconds, causes = predicted(case, folder, node)
                real_memory, real_seconds = run_ranks(
                    work, 1, lambda r, port: (case, r, port, folder, args.repeat)
                )[0]
            found.append((memory / real_memory - 1, seconds / real_seconds - 1))
            what = " ".join(f"{k}={v}" for k, v in vars(case).items() if v != getattr(Case(""), k))
            print(
                f"{memory / 2**20:8.1f} of {real_memory / 2**20:8.1f} MiB {found[-1][0]:+6.1%}   "
                f"{seconds:7.3f} of {real_seconds:7.3f} s {found[-1][1]:+6.1%}   {what}",
                flush=True,
            )
            if args.causes:
                print("      " + ", ".join(f"{cause} {count / 2**20:.1f}" for cause, count in causes.items()))
    print(
        f"memory within {max(abs(m) for m, _ in found):.1%}, seconds within "
        f"{max(abs(s) for _, s in found):.1%}, {len(found)} settings"
    )


if __name__ == "__main__":
    main()
