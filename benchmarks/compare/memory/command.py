"""`fedspeed bench memory`: peak memory of a client's device in a local step, method by method."""

import argparse
import json
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from benchmarks.compare.results import ROOT, add_folders, keep

METHODS = (
    "fedspeed_ram",
    "fs_llm",
    "fs_llm_offload",
    "fate_llm",
    "fedbiot",
    "m2fedsa",
    "spry",
    "fedavg_lora",
    "zero3_offload",
    "fedspeed",
)
# The memory of a client's step does not depend on how often the server aligns.
SETTINGS = {"fedbiot": ("federation.method.initial_alignment_steps=0", "federation.method.alignment_steps=1")}
LEAST = "fedspeed_ram"
# What its least memory is made of: one thing switched off, on the model of over 1 B parameters only.
OFF = {
    "least_resident": ("least memory, but the base on the device", "engine.tier=resident"),
    "least_activations": ("least memory, but activations kept", "engine.activation_gib=auto"),
    "least_logits": ("least memory, but all logits at once", "engine.logits_mib=65536"),
}
DEPTHS = (6, 12, 24, 48)
NARROW = 1024
# Over 1 B parameters with 22 blocks: TinyLlama's width and depth, with as many heads for keys as for queries.
WIDE = (22, 2048)
TOKENS = 1000  # of the one row of a step, as FederatedScope-LLM's configuration of GSM8K has
VOCAB = 32_000
PUBLIC_ROWS = 4


class Model(NamedTuple):
    """A Llama with drawn weights: decoder blocks and hidden size."""

    blocks: int
    hidden: int


def add(commands: argparse._SubParsersAction) -> None:
    """Add the part and its arguments to the parser."""
    parser = commands.add_parser(
        "memory",
        help="device memory of a local step, method by method, against depth and on a model of over 1 B",
        description="Run one local step of one client with each method on models of several depths, with "
        "drawn weights, in bf16, and write memory.json, memory.md and memory.png. On a CPU device memory is "
        "that of all tensors that would be on the device. A step that is there is not repeated.",
    )
    parser.add_argument(
        "--methods", default=",".join(METHODS), metavar="NAME,NAME", help="the first is the reference"
    )
    parser.add_argument(
        "--blocks", default=",".join(map(str, DEPTHS)), metavar="N,N", help=f"depths at hidden size {NARROW}"
    )
    parser.add_argument(
        "--without-1b", action="store_true", help="leave out the model of over 1 B parameters"
    )
    parser.add_argument(
        "--tokens", type=int, default=TOKENS, help=f"of the row of a step (default: {TOKENS})"
    )
    parser.add_argument(
        "--cap", type=float, default=11.0, metavar="GIB", help="say what does not fit (default: 11)"
    )
    add_folders(parser, "memory")
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure what is missing, and write the results; return the exit code."""
    from benchmarks.compare.measured.arms import chosen
    from benchmarks.compare.measured.records import Run
    from benchmarks.compare.memory.records import Size, read

    methods = arguments.methods.split(",")
    arms = chosen(methods, {name: SETTINGS[name] for name in methods if name in SETTINGS})
    path = arguments.out / "memory.json"
    models = [Model(int(blocks), NARROW) for blocks in arguments.blocks.split(",") if blocks]
    models += [] if arguments.without_1b else [Model(*WIDE)]
    begin = time.monotonic()
    kept = read(path) if path.is_file() else None
    same = kept.sizes if kept is not None and kept.tokens == arguments.tokens else ()
    sizes: dict[Model, Size] = {Model(size.blocks, size.hidden): size for size in same}
    todo = [(model, arm) for model in models for arm in arms]
    if LEAST in methods and not arguments.without_1b:
        todo += [(Model(*WIDE), arm) for arm in without_one_thing()]
    titles = (kept.titles if same else {}) | {arm.name: arm.title for _, arm in todo}
    for number, (model, arm) in enumerate(todo, 1):
        folder = arguments.out / f"{model.blocks}x{model.hidden}"
        empty = prepare(folder, model, arguments.tokens)
        size = sizes.get(model, empty)
        wanted = arguments_of(arm, folder)
        if any(own.arguments == wanted and own.status == "finished" for own in size.runs):
            sizes[model] = size
            continue
        print(f"[{number} of {len(todo)}] {model.blocks} blocks of {model.hidden}: {arm.name}", flush=True)
        found = step(arm, folder)
        print(f"    {_outcome(found)}; {time.monotonic() - begin:.0f} s", flush=True)
        others: tuple[Run, ...] = tuple(own for own in size.runs if own.arm != arm.name)
        sizes[model] = size.model_copy(update={"runs": (*others, found)})
        _write(sizes, titles, arguments)
    _write(sizes, titles, arguments)
    keep(path, arguments.keep)
    print((arguments.out / "memory.md").read_text(encoding="utf-8"))
    return int(any(own.status == "failed" for size in sizes.values() for own in size.runs))


def without_one_thing() -> list:
    """Return FedSpeed's arm of least memory with one thing switched off, in each way."""
    from benchmarks.compare.measured.arms import ARMS, merged

    least = ARMS[LEAST]
    return [
        replace(least, name=name, title=f"FedSpeed, {title}", settings=merged(least.settings, (setting,)))
        for name, (title, setting) in OFF.items()
    ]


def _write(sizes, titles: dict[str, str], arguments: argparse.Namespace) -> None:
    """Write what is measured."""
    from benchmarks.compare.memory.records import Memory
    from benchmarks.compare.memory.report import write

    write(Memory.now(tuple(sizes.values()), titles, arguments.tokens, arguments.cap), arguments.out)


def prepare(folder: Path, model: Model, tokens: int):
    """Write a model's configuration, rows and the run's YAML into a folder, and return the empty result."""
    from benchmarks.common import write_model
    from benchmarks.compare.memory.records import Size
    from fedspeed.models.catalogue import shape_of

    folder.mkdir(parents=True, exist_ok=True)
    write_model(folder / "base", argparse.Namespace(hidden=model.hidden, vocab=VOCAB), model.blocks)
    for name, rows in (("rows", 2), ("public", PUBLIC_ROWS)):
        lines = [json.dumps({"instruction": "", "output": text}) for text in _texts(rows, tokens)]
        (folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    (folder / "run.yaml").write_text(f"""
model: {{base: {folder}/base, init: random, dtype: bf16, tokenizer: bytes}}
adapter: {{method: lora, lora_rank: 8, alpha: 16, targets: [q_proj, v_proj]}}
data:
  {{task: file, path: {folder}/rows.jsonl, clients: 1, template: plain, max_tokens: {tokens},
    val_fraction: 0.5, max_val_rows: 1}}
train: {{local_steps: 1, micro_batch: 1, accumulation: 1, lr: 1e-3}}
federation: {{rounds: 1, evaluate_every: 1}}
routing: {{mode: plain}}
deepspeed: {{base: {os.path.relpath(ROOT / "ds_configs" / "zero0.json", folder)}}}
""")
    return Size(blocks=model.blocks, hidden=model.hidden, parameters=shape_of(str(folder / "base")).total)


def arguments_of(arm, folder: Path) -> tuple[str, ...]:
    """Return the arguments of an arm's local step."""
    from benchmarks.compare.measured import arms

    overrides = ("engine.threads=2", f"federation.public_rows={folder}/public.jsonl")
    return arms.arguments_of(arm, folder / "run.yaml", overrides, 0)


def step(arm, folder: Path):
    """Run one local step of an arm."""
    from benchmarks.compare.measured.runs import measure

    arguments = arguments_of(arm, folder)
    return measure(
        arm, 0, config=folder / "run.yaml", arguments=arguments, folder=folder / "runs", evaluates=False
    )


def _texts(rows: int, tokens: int) -> Iterator[str]:
    """Yield different texts, each of which fills a row in bytes."""
    for row in range(rows):
        yield "".join(chr(97 + (row + 7 * place) % 26) for place in range(tokens - 2))


def _outcome(found) -> str:
    if found.status == "failed":
        return f"failed: {found.reason}"
    return f"{(found.device_bytes or 0) / 2**30:.3f} GiB on a client's device"
