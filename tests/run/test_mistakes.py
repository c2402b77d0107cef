"""What people get wrong, and what they are told: a mistake a line, each refused with one message before
anything is started or written.

The commands run in this process: nothing of what is checked here needs a rank. That a launched run ends the
    same way, on all of its ranks, is
what `test_run_bad_input.py` shows.
"""

import gzip
import json
import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml
from launched import LLAMA, SETTINGS, tree
from safetensors.numpy import load_file, save_file

from fedspeed.cli import main
from tests.tiny import write_llama

ROWS = [{"instruction": f"{n} + 1 =", "output": str(n + 1), "category": "sum"} for n in range(40)]
GPT2 = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": 260,
    "n_positions": 64,
}


def nothing(here: Path) -> None:
    """The mistake needs no file of its own."""


@dataclass(frozen=True)
class Mistake:
    """A command line, and what its refusal says.

    Attributes:
        words: behind `fedspeed`; for `run`, the configuration in the working folder comes by itself.
        says: texts that stand in the message, all of them: what is wrong, where, and what to do.
        files: makes the files that the mistake is about, in the working folder.
        dry: found by `--dry-run` only, and else by the ranks: it takes the libraries that they load.
    """

    words: str
    says: tuple[str, ...]
    files: Callable[[Path], object] = nothing
    dry: bool = False


def written(name: str, text: str | bytes) -> Callable[[Path], object]:
    """Makes a file of this content."""
    return lambda here: (here / name).write_bytes(text if isinstance(text, bytes) else text.encode())


def rows(name: str, items: list) -> Callable[[Path], object]:
    """Makes a file of rows, a JSON object a line."""
    return written(name, "".join(json.dumps(item) + "\n" for item in items))


def model(
    name: str, config: dict | str | None, weights: dict | None = None, **files: str
) -> Callable[[Path], object]:
    """Makes a model folder: config.json, and weights where they are given; `a__b` among `files` is the file
    a.b.
    """

    def make(here: Path) -> None:
        folder = here / name
        folder.mkdir()
        if config is not None:
            (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
        if weights is not None:
            save_file(weights, folder / "model.safetensors")
        for file, text in files.items():
            (folder / file.replace("__", ".")).write_text(text)

    return make


def changed_llama(name: str, **changes) -> Callable[[Path], object]:
    """Makes a whole model folder whose config.json then says something else."""

    def make(here: Path) -> None:
        folder = Path(write_llama(here / name))
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return make


def in_eight_bits(name: str) -> Callable[[Path], object]:
    """Makes a whole model folder one of whose weights is stored as whole numbers."""

    def make(here: Path) -> None:
        weights = Path(write_llama(here / name)) / "model.safetensors"
        save_file(load_file(weights) | {"model.norm.weight": np.ones(64, np.int8)}, weights)

    return make


def cut(name: str, left: int) -> Callable[[Path], object]:
    """Makes a model folder whose weights end too early."""

    def make(here: Path) -> None:
        model(name, LLAMA, {"model.norm.weight": np.ones(64, np.float32)})(here)
        path = here / name / "model.safetensors"
        os.truncate(path, left if left > 0 else path.stat().st_size + left)

    return make


def saved_adapter(
    name: str, module: str = "model.layers.0.self_attn.q_proj", **config
) -> Callable[[Path], object]:
    """Makes a PEFT folder with factors beside one matrix of 64 x 64."""

    def make(here: Path) -> None:
        folder = here / name
        folder.mkdir()
        known = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": [module.rpartition(".")[2]]}
        (folder / "adapter_config.json").write_text(json.dumps(known | config))
        shapes = {"A": (4, 64), "B": (64, 4)}
        save_file(
            {
                f"base_model.model.{module}.lora_{factor}.weight": np.ones(shape, np.float32)
                for factor, shape in shapes.items()
            },
            folder / "adapter_model.safetensors",
        )

    return make


def pickled_adapter(name: str) -> Callable[[Path], object]:
    """Makes a PEFT folder as a trainer of an earlier time leaves it."""

    def make(here: Path) -> None:
        saved_adapter(name)(here)
        (here / name / "adapter_model.safetensors").rename(here / name / "adapter_model.bin")
        for file in ("_base.bin", "optimizer.pt", "training_args.bin"):
            (here / name / file).write_text("")

    return make


FILE = "run data.task=file data.split=iid "
COMMAND_LINE = {
    "unknown key": Mistake(
        "run train.learning_rate=1", ("command line", "train.learning_rate", "did you mean train.lr?")
    ),
    "name from another trainer": Mistake("run lora_alpha=32", ("lora_alpha", "did you mean adapter.alpha?")),
    "word for a number": Mistake("run train.lr=fast", ("command line", "train.lr", "fast")),
    "too small": Mistake("run federation.rounds=0", ("federation.rounds", "at least 1")),
    "no key=value": Mistake("run fresh", ("'fresh'", "key=value")),
    "unknown option": Mistake("run --hostfiles x", ("--hostfiles",)),
    "empty config": Mistake("run --config ''", ("--config", "is empty; name a file")),
    "empty hostfile": Mistake("run --hostfile ''", ("--hostfile", "is empty; name a file")),
    "unknown command": Mistake("train", ("'train'", "invalid choice")),
    "no command": Mistake("", ("COMMAND",)),
    "choice that is none": Mistake("run model.dtype=float16", ("model.dtype", "float16", "fp16")),
    "boolean in words": Mistake("run monitor.plot=maybe", ("monitor.plot", "maybe", "true")),
    "fraction for a number": Mistake(
        "run train.local_steps=2.5", ("train.local_steps", "2.5", "whole number")
    ),
    "not finite": Mistake("run train.lr=.nan", ("train.lr", "nan")),
    "negative": Mistake("run train.lr=-1", ("train.lr", "-1")),
    "section for a value": Mistake("run train=1", ("train",)),
    "list for a value": Mistake("run 'train.lr=[1]'", ("train.lr", "a list")),
    "rank of LoRA": Mistake("run adapter.lora_rank=0", ("adapter.lora_rank", "at least 1")),
    "absurd rank of LoRA": Mistake("run adapter.lora_rank=1e9", ("adapter.lora_rank",)),
    "absurd clients": Mistake("run data.clients=999999999999", ("data.clients", "at most 10000")),
    "absurd ranks": Mistake("run cluster.local_ranks=100000", ("cluster.local_ranks=100000", "at most")),
    "seed below zero": Mistake("run run.seed=-1", ("run.seed", "-1")),
    "a path for a name": Mistake("run run.name=a/b", ("run.name", "run.out")),
    "name too long": Mistake(f"run run.name={'x' * 300}", ("run.name", "at most 200")),
    "no model": Mistake("run model.base=", ("model.base is empty",)),
    "aggregation for LoRA only": Mistake(
        "run adapter.method=full federation.method=flexlora",
        ("federation.method.name=flexlora", "adapter.method", "lora_average"),
    ),
    "unknown DeepSpeed base": Mistake(
        "run deepspeed.base=zero9.json", ("deepspeed.base", "zero9.json", "zero3.json")
    ),
    "unknown DeepSpeed key": Mistake(
        "run deepspeed.zero_optimisation.stage=2", ("zero_optimisation", "zero_optimization")
    ),
    "batch size in DeepSpeed": Mistake(
        "run deepspeed.train_micro_batch_size_per_gpu=7",
        ("train_micro_batch_size_per_gpu", "train.micro_batch"),
    ),
    "momentum of AdamW": Mistake("run train.momentum=0.9", ("train.momentum", "sgd")),
    "patience without held-out rows": Mistake(
        "run federation.patience=2 data.val_fraction=0", ("federation.patience", "data.val_fraction")
    ),
    "more sampled than there are": Mistake(
        "run federation.clients_per_round=9", ("federation.clients_per_round=9", "data.clients=3")
    ),
    "sampling under masks": Mistake(
        "run routing.mode=mask federation.clients_per_round=2 federation.local_optimizer=reset "
        "cluster.local_ranks=3",
        ("federation.clients_per_round", "routing.mode"),
    ),
    "too few to hide": Mistake(
        "run routing.mode=mix+mask federation.local_optimizer=reset",
        ("routing.mode=mix+mask", "2 participants", "plain"),
    ),
    "mpi without mpirun": Mistake(
        "run routing.transport=mpi", ("routing.transport=mpi", "mpirun", "routing.transport=gloo")
    ),
    "site without keys": Mistake(
        "run routing.transport=tls routing.mode=mix+mask data.clients=1 federation.local_optimizer=reset "
        "model.dtype=fp32",
        ("routing.identity",),
    ),
    "site without a numeric type": Mistake(
        "run routing.transport=tls data.clients=1 federation.local_optimizer=reset",
        ("model.dtype=auto", "routing.transport=tls", "name it on every site"),
    ),
    "type of DeepSpeed's own": Mistake(
        "run deepspeed.fp16.enabled=true",
        ("deepspeed.fp16.enabled is true, but model.dtype is auto", "model.dtype=fp16"),
    ),
    "no type of DeepSpeed's": Mistake(
        "run deepspeed.bf16.enabled=false", ("bf16.enabled is false, but model.dtype is auto", "such as fp32")
    ),
    "more ranks than there are": Mistake(
        "run cluster.ranks_per_client=7", ("cluster.ranks_per_client=7", "at most 2")
    ),
    "unknown cluster": Mistake("run train.local_steps_by_cluster.slow=3", ("no cluster slow takes part",)),
    "bad list of clusters": Mistake(
        "run train.local_steps_by_cluster=slow=3", ("train.local_steps_by_cluster", "{slow: 3}")
    ),
    "aggregation of earlier versions": Mistake(
        "run federation.aggregation=svd", ("no key federation.aggregation", "federation.method.name=flexlora")
    ),
    "method that is none": Mistake(
        "run federation.method=flexlra", ("federation.method.name", "did you mean flexlora?")
    ),
    "option of another method": Mistake(
        "run federation.method.name=flexlora federation.method.rule=alternate",
        ("federation.method.rule", "where federation.method.name is flexlora"),
    ),
    "list of cuts as text": Mistake("run engine.cuts=1,2", ("engine.cuts", "'engine.cuts=[1, 2]'")),
    "pipeline of one rank": Mistake(
        "run engine.pipeline=client", ("engine.pipeline=client", "cluster.ranks_per_client=2")
    ),
    "cuts without a pipeline": Mistake("run engine.cuts=[1]", ("engine.cuts", "engine.pipeline=client")),
    "two budgets": Mistake(
        "run engine.tier=ram engine.base_gib=1 engine.resident_blocks=1",
        ("engine.base_gib", "engine.resident_blocks"),
    ),
    "budget without seconds": Mistake(
        "run federation.round_budget=seconds", ("federation.round_budget", "federation.round_seconds")
    ),
    "budget too small": Mistake("run engine.tier=ram engine.base_gib=0.00000001", ("set engine.base_gib=",)),
    "budget too small for what auto comes to": Mistake(
        "run engine.tier=ram engine.base_gib=0.0002", ("set engine.base_gib=",), dry=True
    ),
    "blocks that are none": Mistake(
        "run adapter.method=blocks adapter.blocks=[] model.init=pretrained",
        ("adapter.blocks", "nothing would train", "{last: N}"),
    ),
    "probe that is not there": Mistake(
        "run cluster.probe=nosuch.json",
        ("nosuch.json: cannot be read as a probe's file", "fedspeed probe --out"),
    ),
    "place that cannot be written": Mistake(
        "run run.out=/proc", ("run.out=/proc", "cannot be written to", "another place")
    ),
    "place with too long a name": Mistake(
        f"run run.out={'x' * 300}", ("x" * 300, "cannot be used", "too long")
    ),
    "place that is a file": Mistake(
        "run run.out=mine", ("run.out=mine", "not a folder", "another place"), written("mine", "")
    ),
}
CONFIGURATION = {
    "key that is none": Mistake(
        "run --config bad.yaml",
        ("bad.yaml:1: there is no key train.lrr", "train.lr"),
        written("bad.yaml", "train: {lrr: 2}\n"),
    ),
    "two faults": Mistake(
        "run --config bad.yaml",
        ("3 problems", "bad.yaml:2", "bad.yaml:3", "model.base is empty"),
        written("bad.yaml", "train:\n  lr: x\n  micro_batch: 2.5\n"),
    ),
    "no YAML": Mistake(
        "run --config bad.yaml", ("bad.yaml", "is not YAML"), written("bad.yaml", "train: [\n")
    ),
    "tabs": Mistake(
        "run --config bad.yaml", ("bad.yaml:2", "is not YAML"), written("bad.yaml", "train:\n\tlr: 1\n")
    ),
    "key twice": Mistake(
        "run --config bad.yaml",
        ("bad.yaml:2", "'lr' is given twice"),
        written("bad.yaml", "train: {lr: 1,\n lr: 2}\n"),
    ),
    "list": Mistake("run --config bad.yaml", ("bad.yaml",), written("bad.yaml", "- train\n")),
    "empty": Mistake(
        "run --config bad.yaml", ("bad.yaml", "is empty", "quickstart.yaml"), written("bad.yaml", "")
    ),
    "not text": Mistake(
        "run --config bad.yaml", ("bad.yaml", "not UTF-8"), written("bad.yaml", b"\xff\xfe\x00")
    ),
    "missing": Mistake("run --config rum.yaml", ("rum.yaml", "no such file", "run.yaml")),
    "folder": Mistake("run --config .", ("cannot be read", "YAML")),
}
HOSTS = {
    "missing": Mistake("run --hostfile nowhere", ("nowhere", "no such hostfile", "NAME slots=N")),
    "host twice": Mistake(
        "run --hostfile hosts",
        ("hosts:2: host a is named twice (line 1)", "add the slots up"),
        written("hosts", "a slots=1\na slots=2\n"),
    ),
    "no slots": Mistake(
        "run --hostfile hosts",
        ("hosts:1: slots=0 of host a", "delete the line"),
        written("hosts", "a slots=0\n"),
    ),
    "unknown fact": Mistake(
        "run --hostfile hosts",
        ("hosts:2: unknown fact `colour`",),
        written("hosts", "a slots=2\n# fed-host a colour=red\n"),
    ),
    "no host": Mistake("run --hostfile hosts", ("names no host", "NAME slots=N"), written("hosts", "")),
    "absurd slots": Mistake(
        "run --hostfile hosts",
        ("more than one host has", "at most 1024"),
        written("hosts", "localhost slots=999999999\n"),
    ),
    "too many ranks": Mistake(
        "run --hostfile hosts",
        ("too many for one machine", "at most"),
        written("hosts", "".join(f"h{n} slots=1024\n" for n in range(99))),
    ),
    "plan without hosts": Mistake("plan --model gpt3-125m", ("--hostfile",)),
    "plan of an unknown model": Mistake(
        "plan --hostfile hosts --model gpt5",
        ("gpt5",),
        written("hosts", "a slots=1\n# fed-host a gpu=rtx3090\n"),
    ),
    "plan for an unknown card": Mistake(
        "plan --hostfile hosts --model gpt3-125m", ("a",), written("hosts", "a slots=1\n")
    ),
}
DATA = {
    "missing": Mistake(FILE + "data.path=gone.jsonl", ("data.path=gone.jsonl", "no such file")),
    "no path": Mistake(FILE, ("data.task=file needs data.path",)),
    "path of a generated task": Mistake(
        "run data.path=rows.jsonl", ("data.path=rows.jsonl", "data.task=builtin"), rows("rows.jsonl", ROWS)
    ),
    "empty": Mistake(
        FILE + "data.path=rows.jsonl", ("rows.jsonl", "the file holds no rows"), written("rows.jsonl", "")
    ),
    "torn": Mistake(
        FILE + "data.path=rows.jsonl",
        ("rows.jsonl:2: not JSON", "one JSON object a line"),
        written("rows.jsonl", '{"instruction": "a", "output": "b"}\n{"instruction": "a", "out\n'),
    ),
    "other fields": Mistake(
        FILE + "data.path=rows.jsonl",
        ("rows.jsonl:1: no field 'instruction'", "data.instruction_field"),
        rows("rows.jsonl", [{"question": "a", "output": "b"}]),
    ),
    "not UTF-8": Mistake(
        FILE + "data.path=rows.jsonl",
        ("rows.jsonl:1: not UTF-8", "save the file as UTF-8"),
        written("rows.jsonl", b'{"instruction": "\xfc", "output": "b"}\n'),
    ),
    "unknown kind": Mistake(
        FILE + "data.path=rows.txt",
        ("rows.txt", "unknown kind of file", ".jsonl"),
        written("rows.txt", "a\n"),
    ),
    "JSON that is no list": Mistake(
        FILE + "data.path=rows.json", ("rows.json", "one JSON list"), written("rows.json", "{}")
    ),
    "lines called .json": Mistake(
        FILE + "data.path=rows.json",
        ("rows.json", "name it .jsonl"),
        written("rows.json", '{"a": 1}\n{"a": 2}\n'),
    ),
    "row that is a list": Mistake(
        FILE + "data.path=rows.jsonl", ("rows.jsonl:1",), written("rows.jsonl", "[1, 2]\n")
    ),
    "number for an answer": Mistake(
        FILE + "data.path=rows.jsonl",
        ("rows.jsonl:1", "output"),
        rows("rows.jsonl", [{"instruction": "a", "output": {"b": 1}}]),
    ),
    "damaged gzip": Mistake(
        FILE + "data.path=rows.jsonl.gz",
        ("rows.jsonl.gz", "damaged gzip", "copy or download it again"),
        written("rows.jsonl.gz", b"no gzip at all"),
    ),
    "cut gzip": Mistake(
        FILE + "data.path=rows.jsonl.gz",
        ("rows.jsonl.gz", "truncated"),
        written("rows.jsonl.gz", gzip.compress(b'{"instruction": "a", "output": "b"}\n' * 99)[:-12]),
    ),
    "too few rows": Mistake(
        "run data.max_rows=2", ("2 rows are too few for 3 clients", "no row for client 2", "data.clients")
    ),
    "too few for a draw": Mistake(
        "run data.clients=10000 data.split=lda", ("120 rows are too few for 10000 clients",)
    ),
    "no categories": Mistake(
        "run data.task=file data.path=rows.jsonl data.split=meta",
        ("data.split=meta", "category", "data.split=iid"),
        rows("rows.jsonl", [{"instruction": "a", "output": "b"}] * 9),
    ),
    "answers all cut away": Mistake(
        "run data.max_tokens=8",
        ("data.max_tokens=8 cuts away the whole answer", "raise data.max_tokens"),
        dry=True,
    ),
    "rows of another task": Mistake(
        "run data.task=gsm8k data.path=rows.jsonl",
        ("rows.jsonl", "GSM8K"),
        rows("rows.jsonl", [{"question": "a", "answer": "b"}]),
    ),
    "folder of many files": Mistake(
        FILE + "data.path=.",
        ("task=file needs one data file", "2"),
        lambda here: (rows("a.jsonl", ROWS)(here), rows("b.jsonl", ROWS)(here)),
    ),
}
MODELS = {
    "missing": Mistake("run model.base=gone/", ("model.base", "gone/", "does not exist", "config.json")),
    "no config.json": Mistake("run model.base=base", ("config.json", "no such file"), model("base", None)),
    "config.json cut": Mistake(
        "run model.base=base", ("config.json", "cannot be read as a model configuration"), model("base", "{")
    ),
    "config.json of something else": Mistake(
        "run model.base=base", ("config.json", "no model_type"), model("base", "{}")
    ),
    "config.json with a list": Mistake(
        "run model.base=base", ("config.json", "but list"), model("base", "[]")
    ),
    "another family": Mistake(
        "run model.base=base",
        ("model_type is 'mamba', which FedSpeed does not train", "llama, qwen2, gpt2"),
        model("base", {**LLAMA, "model_type": "mamba"}),
    ),
    "no weights": Mistake("run model.init=pretrained", ("no model.safetensors",)),
    "weights cut to nothing": Mistake(
        "run model.init=pretrained model.base=base", ("truncated", "copy it again"), cut("base", 4)
    ),
    "weights cut in the header": Mistake(
        "run model.init=pretrained model.base=base", ("truncated", "copy it again"), cut("base", 60)
    ),
    "weights cut by a byte": Mistake(
        "run model.init=pretrained model.base=base", ("truncated", "copy it again"), cut("base", -1)
    ),
    "shard missing": Mistake(
        "run model.init=pretrained model.base=base",
        ("model-00002.safetensors", "missing"),
        model(
            "base",
            LLAMA,
            model__safetensors__index__json='{"weight_map": {"model.norm.weight": '
            '"model-00002.safetensors"}}',
        ),
    ),
    "weights of another architecture": Mistake(
        "run model.init=pretrained model.base=base",
        ("model.embed_tokens.weight", "another architecture"),
        model("base", LLAMA, {"transformer.wte.weight": np.ones((260, 64), np.float32)}),
    ),
    "weights of another size": Mistake(
        "run model.init=pretrained model.base=base",
        ("model.safetensors", "config.json asks for"),
        changed_llama("base", hidden_size=32),
    ),
    "a file that is no config.json": Mistake(
        "run model.base=other.json", ("other.json is a file", "config.json"), written("other.json", "{}")
    ),
    "a hub name without a network": Mistake(
        "run model.base=org/nosuch", ("org/nosuch is no folder here", "HF_HUB_OFFLINE is set", "hf download")
    ),
    "a shipped model without its weights": Mistake(
        "run model.base=gpt3-125m model.init=pretrained", ("no model.safetensors", "model.init=random")
    ),
    "weights of another depth": Mistake(
        "run model.init=pretrained model.base=base",
        ("no weight named model.layers.2.",),
        changed_llama("base", num_hidden_layers=3),
    ),
    "weights in pickles": Mistake(
        "run model.init=pretrained model.base=base",
        ("pytorch_model.bin", "save_pretrained"),
        model("base", LLAMA, pytorch_model__bin=""),
    ),
    "weights in pickles beside a trainer's files": Mistake(
        "run model.init=pretrained model.base=base",
        ("but pytorch_model.bin",),
        model(
            "base",
            LLAMA,
            adapter_model__bin="",
            optimizer__pt="",
            pytorch_model__bin="",
            training_args__bin="",
        ),
    ),
    "a trainer's files without weights": Mistake(
        "run model.init=pretrained model.base=base",
        ("no model.safetensors.index.json; give", "model.init=random"),
        model("base", LLAMA, optimizer__bin="", rng_state_0__pth="", scheduler__pt="", training_args__bin=""),
    ),
    "weights in eight bits": Mistake(
        "run model.init=pretrained model.base=base",
        ("model.norm.weight in I8", "equantise", "save_pretrained"),
        in_eight_bits("base"),
    ),
    "config.json of a quantised model": Mistake(
        "run model.base=base",
        ("quantization_config", "dequantise"),
        model("base", {**LLAMA, "quantization_config": {"quant_method": "fp8"}}),
    ),
    "vocabulary too small": Mistake(
        "run model.base=base",
        ("vocab_size=10", "ids up to 258"),
        model("base", {**LLAMA, "vocab_size": 10, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}),
        dry=True,
    ),
    "rows beyond the table of positions": Mistake(
        "run model.base=base data.max_tokens=65",
        ("data.max_tokens=65", "64 positions", "set data.max_tokens=64"),
        model("base", GPT2),
    ),
    "no tokenizer": Mistake(
        "run model.tokenizer=auto", ("holds no tokenizer", "model.tokenizer=bytes"), dry=True
    ),
    "tokenizer missing": Mistake(
        "run model.tokenizer=nonexist", ("model.tokenizer=nonexist", "no such folder"), dry=True
    ),
    "targets that match nothing": Mistake(
        "run adapter.targets=[nothing]",
        ("command line", "adapter.targets=[nothing]", "it has q_proj, k_proj"),
    ),
    "target with a slip": Mistake(
        "run adapter.targets=[q_proj,vproj]",
        ("has no vproj", "did you mean v_proj?", "it has q_proj, k_proj"),
    ),
    "adapter that moved its base": Mistake(
        "run adapter.start_from=pissa",
        ("init_lora_weights=pissa", "path_initial_model_for_weight_conversion"),
        saved_adapter("pissa", init_lora_weights="pissa"),
    ),
    "adapter with magnitudes": Mistake(
        "run adapter.start_from=dora",
        ("use_dora=true is DoRA", "merge_and_unload"),
        saved_adapter("dora", use_dora=True),
    ),
    "adapter of another family": Mistake(
        "run adapter.start_from=gpt2",
        ("is on c_attn", "llama", "belongs to another base"),
        saved_adapter("gpt2", "transformer.h.0.attn.c_attn"),
    ),
    "adapter without its tensors": Mistake(
        "run adapter.start_from=half",
        ("lacks", "layers.1.self_attn.q_proj", "another base"),
        saved_adapter("half"),
        dry=True,
    ),
    "targets empty": Mistake("run 'adapter.targets=[q_proj, \"\"]'", ("adapter.targets", "attention")),
    "adapter in a pickle": Mistake(
        "run adapter.start_from=old", ("but adapter_model.bin", "save_pretrained"), pickled_adapter("old")
    ),
    "adapter missing": Mistake("run adapter.start_from=gone", ("adapter.start_from", "gone", "PEFT folder")),
    "adapter that is a model": Mistake(
        "run adapter.start_from=model", ("adapter_config.json", "no such file")
    ),
    "adapter for a whole model": Mistake(
        "run adapter.method=full adapter.start_from=model",
        ("adapter.start_from", "adapter.method is full", "model.base"),
    ),
    "head in a streamed tier": Mistake(
        "run engine.tier=ram adapter.targets=[q_proj,lm_head]", ("lm_head", "set engine.tier=stock"), dry=True
    ),
}
KINDS = {
    "command line": COMMAND_LINE,
    "configuration": CONFIGURATION,
    "hosts": HOSTS,
    "data": DATA,
    "models": MODELS,
}
MISTAKES = {f"{kind}: {name}": mistake for kind, table in KINDS.items() for name, mistake in table.items()}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The working folder: a model's config.json and a run's YAML."""
    monkeypatch.chdir(tmp_path)
    model("model", LLAMA)(tmp_path)
    (tmp_path / "run.yaml").write_text(
        yaml.safe_dump({
            **SETTINGS,
            "model": {"base": "model", **SETTINGS["model"]},
            "monitor": {"progress": False},
        })
    )
    return tmp_path


def told(words: str, monkeypatch, capfd) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command that must not start anything."""

    def start(*_):
        raise AssertionError("nothing has refused it")

    monkeypatch.setattr("fedspeed.session.local_run.supervise", start)
    argv = shlex.split(words)
    if argv[:1] == ["run"] and "--config" not in argv:
        argv += ["--config", "run.yaml"]
    try:
        code = main(argv)
    except SystemExit as ended:
        code = ended.code
    return code, *capfd.readouterr()


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_at_once(here, monkeypatch, capfd, name):
    mistake = MISTAKES[name]
    mistake.files(here)
    before = tree(here)
    code, out, err = told(mistake.words + " --dry-run" * mistake.dry, monkeypatch, capfd)
    print(err)
    assert code == 2 and out == "", err
    assert "Traceback" not in err and err.count(": error:") == 1
    assert [text for text in mistake.says if text not in err] == []
    assert tree(here) == before


@pytest.mark.parametrize(
    "words",
    [
        "run train.lr=fast",
        "run --fast",
        "run model.base=nosuch",
        "run model.base=nosuch --dry-run",
        "plan --model gpt3-125m",
        "plan --hostfile nosuch --model gpt3-125m",
        "simulate --hostfile nosuch",
        "audit train.lr=fast",
        "audit --modes=none",
    ],
)
def test_a_mistake_is_told_as_json_too(here, monkeypatch, capfd, words):
    code, out, err = told(f"{words} --json", monkeypatch, capfd)
    (line,) = out.splitlines()
    found = json.loads(line)
    assert (code, found["event"], found["exit_code"]) == (2, "error", 2)
    assert f"error: {found['error']}\n" in err


def test_what_a_base_has_no_place_for_is_noted(here, monkeypatch, capfd):
    weights = Path(write_llama(here / "base")) / "model.safetensors"
    save_file(load_file(weights) | {"model.norm.bias": np.ones(64, np.float32)}, weights, {"format": "pt"})
    code, out, err = told("run model.init=pretrained model.base=base --dry-run", monkeypatch, capfd)
    assert code == 0, err
    assert (
        "note     base: 1 tensor has no place in the model of config.json and is not used: model.norm.bias"
        in out
    )


@pytest.mark.parametrize(
    "words", ["engine.tier=stock", "adapter.method=full", "adapter.targets=[lm_head] --dry-run"]
)
def test_what_deepspeeds_nvme_offload_lacks_is_told_at_once(here, monkeypatch, capfd, words):
    """Whatever leads to stock execution; what trains outside the blocks is known to the dry run only, and to
    the ranks before they build.
    """
    monkeypatch.setenv("CC", "no-such-compiler")
    code, _, err = told(f"run deepspeed.base=zero3_nvme.json {words}", monkeypatch, capfd)
    assert (
        code == 2
        and "needs DeepSpeed's async_io" in err
        and "a C compiler (`no-such-compiler`): apt install gcc" in err
    )


def test_the_table_is_long_enough_and_the_check_can_fail(here, monkeypatch, capfd):
    assert len(MISTAKES) >= 80
    with pytest.raises(AssertionError, match="nothing has refused it"):
        told("run", monkeypatch, capfd)
