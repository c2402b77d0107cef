"""Clients that share a rank: loads and seconds of four clients together, of four in turn, and of one alone,
in one run on the same rows.

    python benchmarks/client_slots.py [--blocks 12] [--hidden 768] [--micro 2] [--tokens 32] [--tier ram|nvme]
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import WARM_UP, Rows, ds_config, join_ranks, run_ranks, write_model  # noqa: E402

CLIENTS = 4
SYSTEMS = {
    "one client": (1, 1),
    f"{CLIENTS} clients, together": (CLIENTS, CLIENTS),
    f"{CLIENTS} clients, in turn": (CLIENTS, 1),
}  # (clients, client_slots)


def work(rank: int, port: int, folder: str, args, results) -> None:
    from fedspeed.data.config import TrainConfig
    from fedspeed.engine.build import EngineContext, EngineSpec, build_engine
    from fedspeed.engine.config import EngineConfig
    from fedspeed.engine.world import leave_world
    from fedspeed.models.config import AdapterConfig, ModelConfig
    from fedspeed.monitor.clock import StageClock

    join_ranks(port)
    engines = {}
    for name, (clients, slots) in SYSTEMS.items():
        spec = EngineSpec(
            model=ModelConfig(base=folder, init="random", dtype="fp32"),
            adapter=AdapterConfig(),
            train=TrainConfig(),
            engine=EngineConfig(tier=args.tier, client_slots=slots),
            deepspeed=ds_config(2, "fp32"),
        )
        engines[name] = build_engine(
            spec,
            EngineContext(
                client_sets=[(0,)], clock=StageClock(), nvme=Path(folder) / "swap", seed=0, clients=clients
            ),
        )
    for engine in engines.values():
        for slot in range(engine.client_slots):
            engine.load(engine.state(slot), slot=slot)
    steps = [Rows(args, client).step(args.micro, 1) for client in range(CLIENTS)]
    seconds = {name: [] for name in engines}
    loaded = {}
    for i in range(WARM_UP + args.repeat):
        for name, engine in engines.items():
            clients = steps[: SYSTEMS[name][0]]
            engine.take_loaded()
            begin = time.perf_counter()
            for first in range(0, len(clients), engine.client_slots):
                engine.train_step(clients[first : first + engine.client_slots], 1e-3)
            if i >= WARM_UP:
                seconds[name].append(time.perf_counter() - begin)
                loaded[name] = engine.take_loaded()
    results.put((
        rank,
        (
            loaded,
            {name: statistics.median(values) for name, values in seconds.items()},
            engines["one client"].base_bytes,
        ),
    ))
    for engine in engines.values():
        engine.close()
    leave_world()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (
        ("blocks", 12),
        ("hidden", 768),
        ("micro", 2),
        ("tokens", 32),
        ("vocab", 4096),
        ("repeat", 5),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--tier", choices=("ram", "nvme"), default="nvme")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as folder:
        write_model(Path(folder), args, args.blocks)
        loaded, seconds, base = run_ranks(work, 1, lambda rank, port: (rank, port, folder, args))[0]
    one = "one client"
    for name in SYSTEMS:
        print(
            f"{name:24} {loaded[name] / base:6.3f} x base loaded ({loaded[name] / loaded[one]:.2f} of one "
            "client's)   "
            f"{seconds[name]:7.3f} s a step of all ({seconds[name] / seconds[one]:.2f} of one client's)"
        )
    print(json.dumps({"tier": args.tier, "loaded": loaded, "seconds": seconds, "base": base}))


if __name__ == "__main__":
    main()
