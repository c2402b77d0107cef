"""Layer-major execution compared with stock DeepSpeed ZeRO-3 and with a resident model: the same model,
tokens and trainable parameters, in one run.

    python benchmarks/layer_major.py cluster|nvme|resident [--blocks 8] [--hidden 1024] [--micro 8]
        [--tokens 64] [--repeat 3]
    python benchmarks/layer_major.py resident [--base FOLDER]
        (a pretrained model instead of random weights)

cluster: the base is divided over 2 ranks (gloo); stock uses activation checkpointing.

nvme: the base is on disk, with one rank. Stock runs without checkpointing, because with it DeepSpeed 0.19.8
assigns a swap buffer twice and fails.

resident: everything is in memory, with one rank. Layer-major is compared with DeepSpeed ZeRO-0, with and
without checkpointing, and with a loop of PyTorch, transformers and PEFT alone. Here it keeps the activations
that fit into free memory (engine.activation_gib=auto); in the other settings it keeps none.

All engines live in the same processes and take their steps in turn, in the opposite order every other time. A
speed is the median of the ratios of such neighbouring steps, since changes of the machine's own speed affect
both of a pair. C is the arithmetic of a step (layer-major, resident base), L one load of the base (from
passes that compute nothing). Stock needs about C + 2 M L for M micro-batches (with nvme it does not
recompute, so its C is that of ZeRO-0), layer-major max(C, 2 L); their ratio is the bound.
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

from benchmarks.common import WARM_UP, Rows, ds_config, join_ranks, quartiles, run_ranks, write_model  # noqa: E402

RESIDENT = (512, 12)  # defaults of setting `resident`: hidden size and timed steps of each system


def systems(args) -> dict[str, tuple[str, bool, int]]:
    """Return (tier, activation checkpointing, ZeRO stage) of the engines of a setting, by name."""
    if args.setting == "cluster":
        return {
            "stock": ("stock", True, 3),
            "layer-major": ("cluster", False, 2),
            "arithmetic": ("resident", False, 2),
        }
    if args.setting == "nvme":
        return {
            "stock": ("stock", False, 3),
            "layer-major": ("nvme", False, 2),
            "arithmetic": ("resident", False, 2),
            "stock's arithmetic": ("stock", False, 0),
        }
    return {
        "stock": ("stock", False, 0),
        "stock, checkpointing": ("stock", True, 0),
        "layer-major": ("resident", False, 0),
    }


class PlainLoop:
    """A LoRA training loop of PyTorch, transformers and PEFT, with the same weights as the engines."""

    def __init__(self, model, adapter, train):
        from fedspeed.engine.builders.common import make_optimizer
        from fedspeed.engine.masters import whole_parameters
        from fedspeed.models.loading import materialise, meta_model

        self._net = meta_model(model, adapter)
        materialise(self._net, model, adapter, 0, lambda name, parameter: parameter)
        self._net.train()
        trains = {n: p for n, p in self._net.named_parameters() if p.requires_grad}
        self._optimizer = make_optimizer(whole_parameters(trains), train)

    def train_step(self, work: list, lr: float) -> list:
        """Take one optimizer step and return the sum of the loss over the step's answer tokens."""
        import torch
        from torch.nn.functional import cross_entropy

        from fedspeed.engine.client_engine import Sums

        (step,) = work
        total = 0.0
        for batch in step.micro:
            ids = torch.from_numpy(batch.input_ids)
            labels = torch.from_numpy(batch.labels)
            logits = self._net(input_ids=ids).logits[:, :-1].flatten(0, 1)
            loss = cross_entropy(logits.float(), labels[:, 1:].flatten(), reduction="sum")
            (loss / step.step_answer_tokens).backward()
            total += loss.item()
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad()
        return [Sums(total)]

    def close(self) -> None:
        """Do nothing: it holds no resources."""


def work(rank: int, ranks: int, port: int, folder: str, args, *, results) -> None:
    """Build all systems on one rank, time their steps, and put (rank, measurements) into `results`."""
    import torch

    from fedspeed.engine.world import leave_world

    torch.set_num_threads(args.threads or max(1, (os.cpu_count() or 1) // ranks))
    join_ranks(port, rank, ranks)
    engines = build_systems(args, folder, rank, ranks)
    step = Rows(args, rank).step(args.micro, 1)
    measured = step_times(engines, step, args.repeat)
    streamed = engines["layer-major"]
    if hasattr(streamed, "store") and args.setting != "resident":
        measured |= load_times(streamed, step, args.repeat)
    for engine in engines.values():
        engine.close()
    results.put((rank, measured))
    leave_world()


def build_systems(args, folder: str, rank: int, ranks: int) -> dict:
    """Return the systems of a setting by name, each with its state loaded."""
    from fedspeed.data.config import TrainConfig
    from fedspeed.engine.build import EngineContext, EngineSpec, build_engine
    from fedspeed.engine.config import EngineConfig
    from fedspeed.models.catalogue import shape_of
    from fedspeed.models.config import AdapterConfig, ModelConfig
    from fedspeed.monitor.clock import StageClock

    block = shape_of(folder).block
    model = ModelConfig(base=folder, init="pretrained" if args.base else "random", dtype=args.dtype)
    engines = {}
    for name, (tier, checkpointing, stage) in systems(args).items():
        nvme = Path(folder) / "swap" / name / str(rank)
        swap = str(nvme) if stage == 3 and args.setting == "nvme" else ""
        options = EngineConfig(
            tier=tier,
            activation_checkpointing=checkpointing,
            block_slots=args.block_slots,
            activation_gib="auto" if args.setting == "resident" else 0.0,
        )
        spec = EngineSpec(
            model=model,
            adapter=AdapterConfig(),
            train=TrainConfig(),
            engine=options,
            deepspeed=ds_config(stage, args.dtype, 2 * block, swap),
        )
        clients = [(r,) for r in range(ranks)]
        context = EngineContext(client_sets=clients, clock=StageClock(), nvme=nvme, seed=0)
        engines[name] = build_engine(spec, context)
        engines[name].load(engines[name].state())
    if args.setting == "resident":
        engines["plain PyTorch"] = PlainLoop(model, AdapterConfig(), TrainConfig())
    return engines


def step_times(engines: dict, step, repeat: int) -> dict:
    """Return the seconds of the `repeat` timed steps and the losses of all steps, both by system. The systems
    take turns.
    """
    import torch

    seconds: dict[str, list[float]] = {name: [] for name in engines}
    losses: dict[str, list[float]] = {name: [] for name in engines}
    for i in range(WARM_UP + repeat):
        for name in list(engines)[:: -1 if i % 2 else 1]:
            engine = engines[name]
            torch.distributed.barrier()
            begin = time.perf_counter()
            loss = engine.train_step([step], 1e-3)[0].loss / step.step_answer_tokens
            torch.distributed.barrier()
            losses[name].append(loss)
            if i >= WARM_UP:
                seconds[name].append(time.perf_counter() - begin)
    return {"seconds": seconds, "losses": losses}


def load_times(streamed, step, repeat: int) -> dict:
    """Return the bytes that a step loads, the bytes of the base, the seconds a step waits for loads, and the
    seconds of one load of the base in passes that compute nothing.
    """
    import torch

    streamed.store.take_loads()
    streamed.train_step([step], 1e-3)
    loads = streamed.store.take_loads()
    base = sum(unit.nbytes for unit in streamed.store.units)
    streamed._executor.evaluate([], [])
    streamed.store.take_loads()
    torch.distributed.barrier()
    begin = time.perf_counter()
    for _ in range(3 * repeat):
        streamed._executor.evaluate([], [])
    load = (time.perf_counter() - begin) * base / sum(streamed.store.take_loads().bytes.values())
    return {"bytes": sum(loads.bytes.values()), "base": base, "waited": loads.waited_s, "load": load}


def parse_arguments() -> argparse.Namespace:
    """Return the arguments of the command line, with the defaults of the setting where they are omitted."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("setting", choices=("cluster", "nvme", "resident"))
    sizes = {
        "blocks": 8,
        "hidden": 0,
        "micro": 8,
        "tokens": 64,
        "vocab": 4096,
        "repeat": 0,
        "block_slots": 2,
        "threads": 0,
    }
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument(
        "--base", default="", help="a folder with weights, instead of --blocks, --hidden and --vocab"
    )
    args = parser.parse_args()
    hidden, repeat = RESIDENT if args.setting == "resident" else (1024, 3)
    args.hidden = args.hidden or hidden
    args.repeat = args.repeat or repeat
    return args


def main() -> None:
    args = parse_arguments()
    # Not at the top of the file: importing a benchmark must not choose the device.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    ranks = 2 if args.setting == "cluster" else 1
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as folder:
        if args.base:
            from fedspeed.models.catalogue import shape_of

            args.vocab = shape_of(args.base).vocab
        else:
            write_model(Path(folder), args, args.blocks)
        report(args, run_ranks(work, ranks, lambda r, port: (r, ranks, port, args.base or folder, args)))


def report(args, results: dict) -> None:
    """Print the step times, losses and speed ratios that rank 0 measured."""
    measured = results[0]
    seconds = {name: statistics.median(values) for name, values in measured["seconds"].items()}
    for name, value in seconds.items():
        losses = measured["losses"][name]
        print(f"{name:22} {value:8.3f} s a step   loss {losses[0]:.6f} -> {losses[-1]:.6f}")
    if args.setting == "resident":
        for name in seconds.keys() - {"layer-major"}:
            low, middle, high = quartiles(measured["seconds"][name], measured["seconds"]["layer-major"])
            half = f"half of {args.repeat} pairs between {low:.3f} and {high:.3f}"
            print(f"speed of layer-major relative to {name}: {middle:.3f}x ({half})")
        return
    report_streamed(args, measured, seconds)


def report_streamed(args, measured: dict, seconds: dict[str, float]) -> None:
    """Print how near the speed of layer-major relative to stock comes to the bound of the module's formula.

    Args:
        seconds: median seconds of a step by system.
    """
    c = seconds["arithmetic"]
    load = measured["load"]
    stock = seconds.get("stock's arithmetic", c) + 2 * args.micro * load
    layer_major = max(c, 2 * load)
    bound = stock / layer_major
    pairs = zip(measured["seconds"]["stock"], measured["seconds"]["layer-major"])
    ratio = statistics.median(other / ours for other, ours in pairs)
    base = measured["base"]
    print(
        f"base {base / 1e6:.1f} MB; loaded in one step {measured['bytes'] / base:.3f} x base; "
        f"waited for loads {measured['waited']:.3f} s"
    )
    print(
        f"C {c:.3f} s, L {load:.3f} s ({base / load / 1e9:.2f} GB/s); by the formula stock takes "
        f"{stock:.3f} s, layer-major {layer_major:.3f} s"
    )
    print(
        f"speed of layer-major relative to stock: {ratio:.2f}x; bound {bound:.2f}x; "
        f"reached {ratio / bound:.2f} of it"
    )
    values = {"setting": args.setting, "ratio": ratio, "bound": bound, "c": c, "l": load, "seconds": seconds}
    print(json.dumps(values))


if __name__ == "__main__":
    main()
