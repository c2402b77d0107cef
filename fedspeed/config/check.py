"""Rules between the values of a run. Pure: no file, no device, no hostfile is looked at."""

import operator
from collections.abc import Iterator
from dataclasses import dataclass

from fedspeed.config.deepspeed_rules import clashes
from fedspeed.config.run import RunConfig
from fedspeed.config.spelling import flow
from fedspeed.federation.methods.config import METHODS
from fedspeed.schedule.limits import QUANTISED

# Values of engine.matmul and the only model.dtype whose products each changes.
MATMUL_TYPES = {"fp16_accumulation": "fp16", "tf32": "fp32"}
LONGEST_NAME = 200  # of a run, in bytes: its folder is also renamed to NAME.1 by --fresh


@dataclass(frozen=True)
class Conflict:
    """`keys` are the dotted keys that do not go together, `text` says why not and what to do."""

    keys: tuple[str, ...]
    text: str


def problems(config: RunConfig) -> list[str]:
    """One line for each rule that `config` breaks, naming keys, values and remedy."""
    return [conflict.text for conflict in conflicts(config)]


def conflicts(config: RunConfig) -> list[Conflict]:
    """The same, with the keys that take part."""
    rules = (
        _names,
        _adapter,
        _engine,
        _pipeline,
        _sites,
        _staleness,
        _budget,
        _secrets,
        _method,
        _server,
        _training,
        _clients,
    )
    found = [conflict for rule in rules for conflict in rule(config)]
    section = {key: value for key, value in config.deepspeed.items() if key != "base"}
    for clash in clashes(section, config):
        found.append(Conflict((f"deepspeed.{clash.key}", *clash.run_keys), f"deepspeed.{clash.text}"))
    return found


def _names(config: RunConfig) -> Iterator[Conflict]:
    if not config.model.base:
        yield Conflict(
            ("model.base",),
            "model.base is empty; give the folder of a Hugging Face causal LM or "
            "its hub name, for example model.base=deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
        )
    if "/" in config.run.name or config.run.name in (".", ".."):
        yield Conflict(
            ("run.name",),
            f"run.name is {config.run.name!r}, but names one folder; put its parent into run.out",
        )
    if (length := len(config.run.name.encode())) > LONGEST_NAME:
        yield Conflict(
            ("run.name",),
            f"run.name has {length} bytes; give one of at most {LONGEST_NAME}, file systems end at 255",
        )
    if not config.run.out:
        yield Conflict(
            ("run.out",),
            "run.out is empty; name the folder that holds the runs, or write . for the working folder",
        )


def _adapter(config: RunConfig) -> Iterator[Conflict]:
    method = config.adapter.method
    if method != "lora" and not METHODS[config.federation.method.name].any_weights:
        others = ", ".join(name for name, entry in METHODS.items() if entry.any_weights)
        yield Conflict(
            ("federation.method", "adapter.method"),
            f"{_named(config)} works on LoRA factors, but adapter.method is {method}; choose a "
            f"federation.method that averages whatever is trained ({others}), or adapter.method=lora",
        )
    if method != "lora" and config.adapter.start_from:
        yield Conflict(
            ("adapter.start_from", "adapter.method"),
            f"adapter.start_from={config.adapter.start_from} is a PEFT adapter, but "
            f"adapter.method is {method}; choose adapter.method=lora, or give the starting "
            "weights as model.base",
        )
    targets = config.adapter.targets
    if method == "lora" and not (targets and all(name.strip() for name in targets)):
        yield Conflict(
            ("adapter.targets",),
            f"adapter.targets is {flow(targets)}; write attention, "
            "all-linear, or a list of names such as [q_proj, v_proj]",
        )
    if method == "full" and config.engine.tier not in ("auto", "stock"):
        yield Conflict(
            ("engine.tier", "adapter.method"),
            f"engine.tier={config.engine.tier} says where a frozen base lives, but "
            "adapter.method=full freezes nothing; set engine.tier=auto, or train LoRA or some "
            "blocks",
        )
    if method == "blocks":
        if config.adapter.blocks == ():
            yield Conflict(
                ("adapter.blocks",),
                "adapter.blocks is [], so that nothing would train; write "
                "{last: N}, or numbers of blocks from 0, such as [10, 12, 13]",
            )
        if config.model.init == "random":
            yield Conflict(
                ("adapter.method", "model.init"),
                "adapter.method=blocks keeps the other blocks "
                "of a pretrained model, but model.init=random has none; give a pretrained base, "
                "or choose adapter.method=full",
            )


def _engine(config: RunConfig) -> Iterator[Conflict]:
    if config.engine.base_gib and config.engine.tier in ("stock", "resident", *QUANTISED):
        yield Conflict(
            ("engine.base_gib", "engine.tier"),
            f"engine.base_gib={config.engine.base_gib:g} says how much of the device a streamed "
            f"base may take, but engine.tier={config.engine.tier} streams none; leave one of them "
            "out",
        )
    if config.engine.base_gib and config.engine.resident_blocks:
        yield Conflict(
            ("engine.base_gib", "engine.resident_blocks"),
            f"engine.base_gib={config.engine.base_gib} and engine.resident_blocks="
            f"{config.engine.resident_blocks} both say what the base's memory is for, slots or "
            "blocks that stay; set one of them, the second with engine.block_slots",
        )
    wanted = MATMUL_TYPES.get(config.engine.matmul)
    if wanted and config.model.dtype not in (wanted, "auto"):
        yield Conflict(
            ("engine.matmul", "model.dtype"),
            f"engine.matmul={config.engine.matmul} changes products of {wanted} numbers, but "
            f"model.dtype={config.model.dtype} has none; set engine.matmul=default, or "
            f"model.dtype={wanted}",
        )


def _pipeline(config: RunConfig) -> Iterator[Conflict]:
    scope = config.engine.pipeline
    if scope == "none":
        if config.engine.cuts != "auto":
            yield Conflict(
                ("engine.cuts", "engine.pipeline"),
                f"engine.cuts={flow(config.engine.cuts)} are those of a pipeline's stages, but "
                "engine.pipeline=none; set engine.pipeline=client, or leave engine.cuts out",
            )
        return
    if config.adapter.method != "lora":
        yield Conflict(
            ("engine.pipeline", "adapter.method"),
            f"engine.pipeline={scope} trains LoRA in every stage, but adapter.method="
            f"{config.adapter.method}; choose adapter.method=lora, or engine.pipeline=none",
        )
    if config.engine.base_reads != "gather":
        yield Conflict(
            ("engine.pipeline", "engine.base_reads"),
            f"engine.base_reads={config.engine.base_reads} reads other ranks' parts of the base, "
            f"but with engine.pipeline={scope} every rank has its own; leave it out",
        )
    if config.engine.tier in ("ram", "nvme") and config.engine.cuts != "auto":
        yield Conflict(
            ("engine.cuts", "engine.tier"),
            f"engine.cuts={flow(config.engine.cuts)} are those of stages that stay, but "
            f"engine.tier={config.engine.tier} deals chunks of blocks to the ranks in turn; leave "
            "engine.cuts out",
        )
    if scope == "client":
        return
    if config.federation.local_optimizer == "keep":
        yield Conflict(
            ("engine.pipeline", "federation.local_optimizer"),
            "federation.local_optimizer=keep would carry every client's moments over all ranks of "
            "the cluster in each round, which engine.pipeline=cluster does not do; set "
            "federation.local_optimizer=reset, or engine.pipeline=client",
        )
    if config.engine.tier not in ("auto", "resident"):
        yield Conflict(
            ("engine.pipeline", "engine.tier"),
            f"engine.tier={config.engine.tier} loads blocks, but with engine.pipeline=cluster "
            "every rank keeps its own; set engine.tier=resident, or engine.pipeline=client",
        )


def _named(config: RunConfig) -> str:
    return f"federation.method.name={config.federation.method.name}"


def _sites(config: RunConfig) -> Iterator[Conflict]:
    if not config.routing.between_organisations:
        return
    transport = config.routing.transport
    if config.model.dtype == "auto":
        yield Conflict(
            ("model.dtype", "routing.transport"),
            f"model.dtype=auto is decided among the ranks of one job, but routing.transport={transport} "
            "has a job on each site, and all must compute in one type; name it on every site: "
            "model.dtype=bf16 where all have GPUs with bf16, fp16 where one is older, fp32 where "
            "one trains on CPUs",
        )
    if config.federation.clients_per_round:
        yield Conflict(
            ("federation.clients_per_round", "routing.transport"),
            "federation.clients_per_round draws among the clients of one job, but "
            f"routing.transport={transport} has a job on each site; leave it out",
        )


def _staleness(config: RunConfig) -> Iterator[Conflict]:
    if not config.federation.staleness:
        return
    remedy = "with federation.staleness=1; set federation.staleness=0, or choose another"
    if not METHODS[config.federation.method.name].adds_deltas:
        yield Conflict(
            ("federation.staleness", "federation.method"),
            f"{_named(config)} does not say that a late update may be added to its state, as it is {remedy}",
        )
    if config.federation.local_optimizer == "keep":
        yield Conflict(
            ("federation.staleness", "federation.local_optimizer"),
            f"federation.local_optimizer=keep would be a round ahead of the state it belongs to {remedy}",
        )


def _budget(config: RunConfig) -> Iterator[Conflict]:
    federation = config.federation
    if (federation.round_budget == "seconds") != (federation.round_seconds > 0):
        yield Conflict(
            ("federation.round_budget", "federation.round_seconds"),
            f"federation.round_budget={federation.round_budget} with federation.round_seconds="
            f"{federation.round_seconds:g}; a budget of seconds needs both, "
            "federation.round_budget=seconds and federation.round_seconds above 0",
        )
    if federation.round_budget != "seconds":
        return
    if not METHODS[federation.method.name].adds_deltas:
        yield Conflict(
            ("federation.round_budget", "federation.method"),
            f"{_named(config)} does not say that it averages deltas, but with "
            "federation.round_budget=seconds clients have trained for different numbers of steps; "
            "choose another method, or a budget of steps",
        )
    if config.train.local_steps_by_cluster:
        yield Conflict(
            ("federation.round_budget", "train.local_steps_by_cluster"),
            "train.local_steps_by_cluster gives clusters a number of steps, and "
            "federation.round_budget=seconds as many as fit; leave one of them out",
        )


def _secrets(config: RunConfig) -> Iterator[Conflict]:
    """What tells of single clients does not go together with routing that hides them."""
    if not config.routing.sums_only:
        return
    federation = config.federation
    told = {}
    if not METHODS[federation.method.name].sums_only:
        told["method"] = f"{_named(config)} needs every client's own values"
    if drawn := federation.clients_per_round:
        told["clients_per_round"] = (
            f"federation.clients_per_round={drawn} makes sums of few clients, and of changing ones"
        )
    if federation.compare_alone:
        told["compare_alone"] = "federation.compare_alone=true shows what each client's rows are worth"
    if federation.local_optimizer == "keep":
        told["local_optimizer"] = (
            "federation.local_optimizer=keep keeps each client's moments in the run's folder"
        )
    for key, why in told.items():
        yield Conflict(
            (f"federation.{key}", "routing.mode"),
            f"{why}, which routing.mode={config.routing.mode} with "
            f"routing.transport={config.routing.transport} is there to hide; set "
            "routing.mode=plain inside one trust domain, or leave it out",
        )


def _method(config: RunConfig) -> Iterator[Conflict]:
    federation = config.federation
    entry = METHODS[federation.method.name]
    step = 1.0 if federation.server_lr == "auto" else federation.server_lr
    plain = []
    if not entry.server_optimizers:
        plain += [("server_optimizer", federation.server_optimizer, "none"), ("server_lr", step, 1.0)]
    if not entry.adds_deltas:
        plain.append(("local_optimizer", federation.local_optimizer, "reset"))
    for key, value, wanted in plain:
        if value != wanted:
            yield Conflict(
                ("federation.method", f"federation.{key}"),
                f"{_named(config)} does not say that its new state is the old one and a change "
                f"of each array, so that federation.{key}={value} might mix what does not belong "
                f"together; set it to {wanted}, or choose another method",
            )
    if federation.updates and not entry.adds_deltas:
        names = ", ".join(update.name for update in federation.updates)
        yield Conflict(
            ("federation.updates", "federation.method"),
            f"federation.updates ({names}) are about deltas that are averaged, but {_named(config)} "
            "does not say that it averages any; leave federation.updates out, or choose another method",
        )
    if entry.folds and config.engine.compile_blocks:
        yield Conflict(
            ("engine.compile_blocks", "federation.method"),
            "engine.compile_blocks=true computes all blocks by the code of one, but "
            f"{_named(config)} adds to each block what is its own; set engine.compile_blocks=false, "
            "or choose another method",
        )
    for chosen in (federation.method, *federation.updates):
        if rules := getattr(chosen, "problems", None):
            for keys, text in rules(config):
                yield Conflict(keys, text)


def _server(config: RunConfig) -> Iterator[Conflict]:
    federation = config.federation
    entry = METHODS[config.federation.method.name]
    if federation.public_rows and not entry.public_rows:
        yield Conflict(
            ("federation.public_rows", "federation.method"),
            f"federation.public_rows={federation.public_rows} would not be read, because "
            f"{_named(config)} has no server that trains on rows; leave it out, or choose another "
            "method",
        )
    if entry.public_rows and not federation.public_rows:
        yield Conflict(
            ("federation.public_rows", "federation.method"),
            f"the server of {_named(config)} trains on public rows, and federation.public_rows is "
            "empty; name a json, jsonl or jsonl.gz file on the server's host",
        )
    if not entry.server:
        return
    against = (
        ("engine.pipeline", config.engine.pipeline != "none", "none", "is laid over ranks of clients"),
        (
            "federation.staleness",
            federation.staleness == 1,
            "0",
            "trains while the exchange is under way, in which nobody may speak to the server",
        ),
        (
            "federation.compare_alone",
            federation.compare_alone,
            "false",
            "trains clients without anybody else",
        ),
        (
            "routing.transport",
            config.routing.between_organisations,
            "auto",
            "has a job on each site, but a server needs one job",
        ),
    )
    for key, is_set, wanted, why in against:
        if is_set:
            value = flow(operator.attrgetter(key)(config))
            yield Conflict(
                (key, "federation.method"),
                f"{key}={value} {why}, and {_named(config)} has a server; set {key}={wanted}, "
                "or choose another method",
            )


def _training(config: RunConfig) -> Iterator[Conflict]:
    train = config.train
    if train.momentum and train.optimizer != "sgd":
        yield Conflict(
            ("train.momentum", "train.optimizer"),
            f"train.momentum={train.momentum:g} is for sgd, but train.optimizer is "
            f"{train.optimizer}; choose train.optimizer=sgd, or train.momentum=0 and set "
            "train.beta1",
        )


def notes(config: RunConfig) -> list[str]:
    """What goes together, but hardly as it was meant."""
    train = config.train
    rounds = config.federation.rounds
    steps = max([train.local_steps, *train.local_steps_by_cluster.values()])
    if not train.lr:
        return [
            "train.lr=0: no weight moves, so that nothing is learned; give a rate above 0, unless that "
            "is meant"
        ]
    if train.warmup_steps <= rounds * steps:
        return []
    return [
        f"train.warmup_steps={train.warmup_steps}, but the run has only {rounds} x {steps} local steps, "
        f"so that train.lr={train.lr:g} is never reached; lower train.warmup_steps"
    ]


def _clients(config: RunConfig) -> Iterator[Conflict]:
    sampled = config.federation.clients_per_round
    clients = config.data.clients
    if sampled > clients:
        yield Conflict(
            ("federation.clients_per_round", "data.clients"),
            f"federation.clients_per_round={sampled} of data.clients={clients}; "
            "choose at most that many, or federation.clients_per_round=0 for all",
        )
    if config.federation.patience and not config.data.val_fraction:
        yield Conflict(
            ("federation.patience", "data.val_fraction"),
            f"federation.patience={config.federation.patience} waits for a better held-out loss, "
            "but data.val_fraction=0 holds nothing out; set data.val_fraction above 0, or "
            "federation.patience=0",
        )
    if config.data.task == "file" and not config.data.path:
        yield Conflict(
            ("data.path", "data.task"),
            "data.task=file needs data.path; give a json, jsonl or jsonl.gz file, or a hub data set",
        )
    if config.data.task == "builtin" and config.data.path:
        yield Conflict(
            ("data.path", "data.task"),
            f"data.path={config.data.path} would not be read, because data.task=builtin makes its "
            "rows; choose data.task=file (or the task that the file belongs to), or leave "
            "data.path out",
        )
