"""Peak device memory of one LoRA step: the whole model resident, DeepSpeed's own means of saving memory, and
layer-major execution.

    python benchmarks/memory.py [--blocks 22] [--hidden 2048] [--rows 4] [--tokens 256]
        (a Llama of 1.1 B parameters)
    python benchmarks/memory.py --blocks 6,12,24 --hidden 1024
        (how the ratio grows with depth)

Every system runs in a process of its own, on the same rows. On a CPU, "device memory" is the memory of what
would be on the device: weights, gathered weights, activations, gradients and optimizer. Tensors offloaded to
RAM or NVMe are not counted (fedspeed/engine/memory_counter.py; a test compares the count with the
allocator's). On an accelerator it is the peak of the allocator.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import join_ranks, run_ranks, write_model  # noqa: E402

# name -> (tier, activation checkpointing, ZeRO stage, device of the offloaded base, rows in one micro-batch:
# all or one). Stock offload runs on two ranks, each a client: with one, a CPU's gathered weights are the
# offloaded ones themselves, without a copy to count.
SYSTEMS = {
    "resident, all rows at once": ("stock", False, 0, None, True),
    "resident": ("stock", False, 0, None, False),
    "resident, checkpointing": ("stock", True, 0, None, False),
    "DeepSpeed ZeRO-3 offload to RAM, checkpointing": ("stock", True, 3, "cpu", False),
    "layer-major, base in RAM": ("ram", False, 2, None, False),
    "layer-major, base on NVMe": ("nvme", False, 2, None, False),
}


def work(name: str, rank: int, port: int, folder: str, options: tuple, *, results) -> None:
    args, blocks = options
    from benchmarks.common import Rows, ds_config
    from fedspeed.data.config import TrainConfig
    from fedspeed.engine.build import EngineContext, EngineSpec, build_engine
    from fedspeed.engine.config import EngineConfig
    from fedspeed.engine.world import leave_world
    from fedspeed.models.catalogue import shape_of
    from fedspeed.models.config import AdapterConfig, ModelConfig
    from fedspeed.monitor.clock import StageClock, peak_bytes

    tier, checkpointing, stage, offload, together = SYSTEMS[name]
    ranks = ranks_of(name)
    join_ranks(port, rank, ranks)
    config = ds_config(stage, args.dtype, 2 * shape_of(folder).block)
    if offload:
        config["zero_optimization"]["offload_param"] = {"device": offload}
    # The least memory: no activations are kept.
    options = EngineConfig(tier=tier, activation_checkpointing=checkpointing, activation_gib=0.0)
    spec = EngineSpec(
        model=ModelConfig(base=folder, init="random", dtype=args.dtype),
        adapter=AdapterConfig(),
        train=TrainConfig(),
        engine=options,
        deepspeed=config,
    )
    engine = build_engine(
        spec,
        EngineContext(
            client_sets=[(r,) for r in range(ranks)], clock=StageClock(), nvme=Path(folder) / "swap", seed=0
        ),
    )
    engine.load(engine.state())
    step = Rows(args, rank).step(1 if together else args.rows, args.rows if together else 1)
    begin = time.perf_counter()
    loss = engine.train_step([step], 1e-3)[0].loss / step.step_answer_tokens
    seconds = time.perf_counter() - begin
    results.put((rank, (engine.device_bytes, peak_bytes(), seconds, loss, engine.base_bytes)))
    engine.close()
    leave_world()


def ranks_of(name: str) -> int:
    return 2 if SYSTEMS[name][3] else 1


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--blocks", default="22", help="decoder blocks; several numbers with commas between them"
    )
    for name, default in (("hidden", 2048), ("rows", 4), ("tokens", 256), ("vocab", 32000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="bf16", choices=("fp32", "bf16"))
    parser.add_argument(
        "--only", default="", help="parts of the names of the systems to run, with semicolons between them"
    )
    args = parser.parse_args()
    for blocks in (int(n) for n in args.blocks.split(",")):
        first = None
        for name in (n for n in SYSTEMS if any(part in n for part in args.only.split(";"))):
            with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as folder:
                write_model(Path(folder), args, blocks)
                peak, rss, seconds, loss, base = run_ranks(
                    work, ranks_of(name), lambda r, p: (name, r, p, folder, (args, blocks))
                )[0]
            if first is None:
                first = peak
                print(
                    f"{blocks} blocks, base {base / 2**30:.2f} GiB, {args.rows} rows of {args.tokens} "
                    f"tokens, {args.dtype}"
                )
            print(
                f"  {name:48} {peak / 2**30:7.3f} GiB  1/{first / peak:5.1f} of the first   RSS "
                f"{rss / 2**30:6.2f} GiB   {seconds:6.1f} s "
                f"  loss {loss:.4f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
