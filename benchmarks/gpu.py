"""A model that does not fit on the card, under a cap on the card's memory: layer-major execution beside pure arithmetic and beside DeepSpeed's offload.

    python benchmarks/gpu.py --model deepseek-ai/DeepSeek-R1-Distill-Qwen-7B --cap 11 --dtype bf16
    python benchmarks/gpu.py --model deepseek-ai/DeepSeek-R1-Distill-Qwen-14B --cap 24 --dtype fp16 --blocks 12   (a quarter of its depth: loads alike)

Random weights; a step of --micro micro-batches of one row of --tokens tokens, LoRA on attention. Each system runs in a process of its own:
    arithmetic     the same execution with everything resident and no cap: what a step costs if loads were free
    layer-major    the base in host RAM (page-locked), under the cap
    offload        stock DeepSpeed ZeRO-3 with offload_param and activation checkpointing, under the cap
Without an accelerator it runs too, uncapped, for a look at the script itself.
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

from benchmarks.layer_major import Rows, ds_config, run_ranks  # noqa: E402

# name -> (tier, activation checkpointing, ZeRO stage, capped)
SYSTEMS = {"arithmetic": ("resident", False, 2, False), "layer-major": ("ram", False, 2, True), "offload": ("stock", True, 3, True)}


def write_model(folder: Path, shape, blocks: int) -> None:
    from transformers import LlamaConfig, Qwen2Config

    family = {"llama": LlamaConfig, "qwen2": Qwen2Config}[shape.family]
    family(hidden_size=shape.hidden, intermediate_size=shape.intermediate, num_hidden_layers=blocks, num_attention_heads=shape.heads,
           num_key_value_heads=shape.kv_heads, vocab_size=shape.vocab, max_position_embeddings=4096, tie_word_embeddings=shape.tied,
           bos_token_id=1, eos_token_id=2, pad_token_id=0).save_pretrained(folder)


def work(name: str, port: int, folder: str, args, results) -> None:
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    import torch

    from fedspeed.data.config import TrainConfig
    from fedspeed.engine.build import build_engine
    from fedspeed.engine.config import EngineConfig
    from fedspeed.engine.world import join_world, leave_world, quiet
    from fedspeed.models.catalogue import shape_of
    from fedspeed.models.config import AdapterConfig, ModelConfig
    from fedspeed.monitor.clock import StageClock, peak_bytes

    tier, checkpointing, stage, capped = SYSTEMS[name]
    quiet()
    join_world(600)
    if torch.cuda.is_available() and capped:
        torch.cuda.set_per_process_memory_fraction(args.cap * 2**30 / torch.cuda.get_device_properties(0).total_memory)
    config = ds_config(stage, args.dtype, 2 * shape_of(folder).block) | {"fp16": {"enabled": args.dtype == "fp16", "initial_scale_power": 8}}
    if stage == 3:
        config["zero_optimization"]["offload_param"] = {"device": "cpu", "pin_memory": True}
    options = EngineConfig(tier=tier, activation_checkpointing=checkpointing, slots=args.slots, base_gib=args.base_gib if tier == "ram" else 0.0)
    try:
        engine = build_engine(ModelConfig(base=folder, init="random", dtype=args.dtype), AdapterConfig(), TrainConfig(), options, config,
                              [(0,)], StageClock(), Path(folder) / "swap", 0)
        engine.load(engine.state())
        step, seconds, losses = Rows(args, 0).step(args.micro, 1), [], []
        for i in range(args.warm_up + args.repeat):
            begin = time.perf_counter()
            losses.append(engine.train_step([step], 1e-4)[0].loss / step.step_answer_tokens)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if i >= args.warm_up:
                seconds.append(time.perf_counter() - begin)
    except torch.OutOfMemoryError as error:
        results.put((0, {"failed": str(error).split(". ")[0]}))
        os._exit(0)
    waited = engine.store.take_loads().waited_s / (args.warm_up + args.repeat) if hasattr(engine, "store") else None
    results.put((0, {"seconds": statistics.median(seconds), "losses": losses, "peak": peak_bytes() if torch.cuda.is_available() else engine.device_bytes,
                     "waited": waited}))
    engine.close()
    leave_world()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", help="a known model, or a folder with config.json")
    parser.add_argument("--cap", type=float, default=11, help="GiB of device memory")
    parser.add_argument("--base-gib", type=float, default=0.0, help="of it, for blocks that stay on the device (0: none stay)")
    for name, default in (("blocks", 0), ("micro", 16), ("tokens", 512), ("repeat", 3), ("warm-up", 1), ("slots", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp16", "fp32"))
    parser.add_argument("--systems", default=",".join(SYSTEMS), help="which of them")
    args = parser.parse_args()
    from fedspeed.models.catalogue import shape_of

    shape = shape_of(args.model)
    if shape.family == "gpt2":
        parser.error(f"--model={args.model}: this benchmark knows Llama and Qwen2")
    args.vocab, tokens, found = shape.vocab, args.micro * args.tokens, {}
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as folder:
        write_model(Path(folder), shape, args.blocks or shape.layers)
        for name in args.systems.split(","):
            begin = time.perf_counter()
            found[name] = one = run_ranks(work, 1, lambda rank, port, name=name: (name, port, folder, args))[0]
            if "failed" in one:
                print(f"{name:12} does not run: {one['failed']}", flush=True)
                continue
            waited = f"   waited for loads {one['waited']:.3f} s" if one["waited"] is not None else ""
            print(f"{name:12} {one['seconds']:8.3f} s a step   {tokens / one['seconds']:9.0f} tokens/s   peak {one['peak'] / 2**30:6.2f} GiB   "
                  f"loss {one['losses'][0]:.4f} -> {one['losses'][-1]:.4f}{waited}   ({time.perf_counter() - begin:.0f} s in all)", flush=True)
    took = {name: one["seconds"] for name, one in found.items() if "seconds" in one}
    if "layer-major" in took:
        for name in took.keys() - {"layer-major"}:
            print(f"layer-major has {took[name] / took['layer-major']:.3f} times the speed of {name}")
    print(json.dumps({"model": args.model, "cap": args.cap, "dtype": args.dtype, "tokens": tokens, "systems": found}))


if __name__ == "__main__":
    main()
