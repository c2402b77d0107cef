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
import multiprocessing
import os
import queue
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# Steps: ZeRO-3 records its trace in the first two; which activations are kept, the memory decides that the
# first leaves free.
WARM_UP = 3
RESIDENT = (512, 12)  # hidden size and steps of each system, where nothing else is said


class Rows:
    """Random rows of one rank; the first half of each is prompt."""

    def __init__(self, args, rank: int):
        import numpy as np

        self._ids = lambda rows: np.random.default_rng(rank).integers(3, args.vocab, (rows, args.tokens))
        self._prompt = args.tokens // 2

    def step(self, micro: int, rows: int):
        """`micro` micro-batches of `rows` rows."""
        import numpy as np

        from fedspeed.data.batches import Batch, StepBatches

        ids = self._ids(micro * rows).reshape(micro, rows, -1)
        labels = ids.copy()
        labels[:, :, : self._prompt] = -100
        batches = [
            Batch(i, label, np.ones_like(i), int((label[:, 1:] != -100).sum()))
            for i, label in zip(ids, labels)
        ]
        return StepBatches(batches, sum(b.answer_tokens for b in batches))


def write_model(folder: Path, args, blocks: int) -> None:
    from transformers import LlamaConfig

    heads = max(1, args.hidden // 64)
    LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 11 // 4,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=args.vocab,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)


def ds_config(stage: int, dtype: str, live: int = 0, nvme: str = "") -> dict:
    zero = {"stage": stage, "overlap_comm": stage > 1, "reduce_bucket_size": "auto"}
    if stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": "auto",
            "stage3_max_live_parameters": live,
            "stage3_max_reuse_distance": 0,
            "stage3_param_persistence_threshold": "auto",
        }
        if nvme:
            zero["offload_param"] = {
                "device": "nvme",
                "nvme_path": nvme,
                "buffer_size": "auto",
                "buffer_count": 12,
            }
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == "bf16"},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
    }


def systems(args) -> dict[str, tuple[str, bool, int]]:
    """Name -> (tier, activation checkpointing, ZeRO stage)."""
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
    """A LoRA training loop of PyTorch, transformers and PEFT, over the weights that the engines have."""

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
        """One optimizer step; the sum of the loss over the step's answer tokens."""
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
        """Nothing outlives it."""


def work(rank: int, ranks: int, port: int, folder: str, args, *, results) -> None:
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(ranks),
        LOCAL_RANK=str(rank),
        LOCAL_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    import torch

    from fedspeed.data.config import TrainConfig
    from fedspeed.engine.build import EngineContext, EngineSpec, build_engine
    from fedspeed.engine.config import EngineConfig
    from fedspeed.engine.world import join_world, leave_world, quiet
    from fedspeed.models.catalogue import shape_of
    from fedspeed.models.config import AdapterConfig, ModelConfig
    from fedspeed.monitor.clock import StageClock

    torch.set_num_threads(args.threads or max(1, (os.cpu_count() or 1) // ranks))
    quiet()
    join_world(600)
    block = shape_of(folder).block
    model = ModelConfig(base=folder, init="pretrained" if args.base else "random", dtype=args.dtype)
    engines = {}
    for name, (tier, checkpointing, stage) in systems(args).items():
        nvme = Path(folder) / "swap" / name / str(rank)
        config = ds_config(
            stage, args.dtype, 2 * block, str(nvme) if stage == 3 and args.setting == "nvme" else ""
        )
        options = EngineConfig(
            tier=tier,
            activation_checkpointing=checkpointing,
            slots=args.block_slots,
            activation_gib="auto" if args.setting == "resident" else 0.0,
        )
        clients = [(r,) for r in range(ranks)]
        spec = EngineSpec(
            model=model, adapter=AdapterConfig(), train=TrainConfig(), engine=options, deepspeed=config
        )
        engines[name] = build_engine(
            spec, EngineContext(client_sets=clients, clock=StageClock(), nvme=nvme, seed=0)
        )
        engines[name].load(engines[name].state())
    if args.setting == "resident":
        engines["plain PyTorch"] = PlainLoop(model, AdapterConfig(), TrainConfig())
    step = Rows(args, rank).step(args.micro, 1)
    seconds = {name: [] for name in engines}
    losses = {name: [] for name in engines}
    for i in range(WARM_UP + args.repeat):
        for name in list(engines)[:: -1 if i % 2 else 1]:
            engine = engines[name]
            torch.distributed.barrier()
            begin = time.perf_counter()
            loss = engine.train_step([step], 1e-3)[0].loss / step.step_answer_tokens
            torch.distributed.barrier()
            losses[name].append(loss)
            if i >= WARM_UP:
                seconds[name].append(time.perf_counter() - begin)
    streamed = engines["layer-major"]
    out = {"seconds": seconds, "losses": losses}
    if hasattr(streamed, "store") and args.setting != "resident":
        streamed.store.take_loads()
        streamed.train_step([step], 1e-3)
        loads = streamed.store.take_loads()
        base = sum(u.nbytes for i, u in enumerate(streamed.store.units))
        out |= {"bytes": sum(loads.bytes.values()), "base": base, "waited": loads.waited_s}
        streamed._executor.evaluate([], [])
        streamed.store.take_loads()
        torch.distributed.barrier()
        begin = time.perf_counter()
        for _ in range(3 * args.repeat):
            streamed._executor.evaluate([], [])
        out["load"] = (time.perf_counter() - begin) * base / sum(streamed.store.take_loads().bytes.values())
    for engine in engines.values():
        engine.close()
    results.put((rank, out))
    leave_world()


def main() -> None:
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
    # Here and not on import: other benchmarks use parts of this file on a card.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    ranks = 2 if args.setting == "cluster" else 1
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as folder:
        if args.base:
            from fedspeed.models.catalogue import shape_of

            args.vocab = shape_of(args.base).vocab
        else:
            write_model(Path(folder), args, args.blocks)
        report(args, run_ranks(work, ranks, lambda r, port: (r, ranks, port, args.base or folder, args)))


def run_ranks(function, ranks: int, arguments) -> dict:
    """Run each rank as a process of its own: rank -> what `function(*arguments(rank, port), results=...)` put
    into `results` behind its rank.

    Raises:
        SystemExit: a rank ended without a result, whatever its exit code.
    """
    from fedspeed.net.ports import free_port

    port = free_port()
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [
        context.Process(target=function, args=arguments(r, port), kwargs={"results": results})
        for r in range(ranks)
    ]
    for process in processes:
        process.start()
    found = {}
    while len(found) < ranks:
        # Looked at before the queue is: what a rank has put before it ended is in the queue by then.
        ended = [rank for rank, process in enumerate(processes) if process.exitcode is not None]
        try:
            found.update([results.get(timeout=1)])
        except queue.Empty:
            if silent := [rank for rank in ended if rank not in found]:
                for process in processes:
                    process.terminate()
                code = processes[silent[0]].exitcode
                sys.exit(f"rank {silent[0]} ended with {code} and without a result; what it said is above")
    for process in processes:
        process.join()
    return found


def quartiles(theirs: list[float], ours: list[float]) -> tuple[float, float, float]:
    """Of the ratios of neighbouring steps: lower quartile, median, upper quartile; with one pair all the
    same.
    """
    ratios = [other / own for other, own in zip(theirs, ours)]
    if len(ratios) < 2:
        return ratios[0], ratios[0], ratios[0]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return low, middle, high


def report(args, found: dict) -> None:
    first = found[0]
    seconds = {name: statistics.median(values) for name, values in first["seconds"].items()}
    for name, value in seconds.items():
        print(
            f"{name:22} {value:8.3f} s a step   loss {first['losses'][name][0]:.6f} -> "
            f"{first['losses'][name][-1]:.6f}"
        )
    if args.setting == "resident":
        for name in seconds.keys() - {"layer-major"}:
            low, middle, high = quartiles(first["seconds"][name], first["seconds"]["layer-major"])
            half = f"half of {args.repeat} pairs between {low:.3f} and {high:.3f}"
            print(f"speed of layer-major beside {name}: {middle:.3f}x ({half})")
        return
    c = seconds["arithmetic"]
    load = first["load"]
    m = args.micro
    stock = seconds.get("stock's arithmetic", c) + 2 * m * load
    bound = stock / max(c, 2 * load)
    ratio = statistics.median(
        s / o for s, o in zip(first["seconds"]["stock"], first["seconds"]["layer-major"])
    )
    print(
        f"base {first['base'] / 1e6:.1f} MB; loaded in one step {first['bytes'] / first['base']:.3f} x "
        f"base; waited for loads {first['waited']:.3f} s"
    )
    print(
        f"C {c:.3f} s, L {load:.3f} s ({first['base'] / load / 1e9:.2f} GB/s); by the formula stock takes "
        f"{stock:.3f} s, "
        f"layer-major {max(c, 2 * load):.3f} s"
    )
    print(
        f"speed of layer-major beside stock: {ratio:.2f}x; bound {bound:.2f}x; reached {ratio / bound:.2f} "
        "of it"
    )
    print(
        json.dumps({
            "setting": args.setting,
            "ratio": ratio,
            "bound": bound,
            "c": c,
            "l": load,
            "seconds": seconds,
        })
    )


if __name__ == "__main__":
    main()
