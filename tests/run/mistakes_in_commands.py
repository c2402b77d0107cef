"""Mistakes on the command line, in the configuration file and in the hostfile."""

from tests.run.mistakes import Mistake, written

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
