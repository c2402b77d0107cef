"""Rules about the run's name, the base, the adapter, the local training and the data."""

from collections.abc import Iterator

from fedspeed.config.rules.conflict import Conflict, chosen_method
from fedspeed.config.run import RunConfig
from fedspeed.config.spelling import flow
from fedspeed.data.config import path_text
from fedspeed.federation.methods.config import METHODS

MAX_NAME_BYTES = 200  # of a run's name: --fresh renames its folder to NAME.1, and file systems end at 255


def check_names(config: RunConfig) -> Iterator[Conflict]:
    if not config.model.base:
        yield Conflict(
            ("model.base",),
            "model.base is empty; give the folder of a Hugging Face causal LM or "
            "its hub name, for example model.base=deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
        )
    if "/" in config.run.name or config.run.name in (".", ".."):
        yield Conflict(
            ("run.name",),
            f"run.name is {config.run.name!r}, but must name one folder; put its parent into run.out",
        )
    if (length := len(config.run.name.encode())) > MAX_NAME_BYTES:
        yield Conflict(
            ("run.name",),
            f"run.name has {length} bytes; choose one of at most {MAX_NAME_BYTES}, file systems allow 255",
        )
    if not config.run.out:
        yield Conflict(
            ("run.out",), "run.out is empty; give the folder that holds the runs, or . for the working folder"
        )


def check_adapter(config: RunConfig) -> Iterator[Conflict]:
    method = config.adapter.method
    if method != "lora" and not METHODS[config.federation.method.name].any_weights:
        others = ", ".join(name for name, entry in METHODS.items() if entry.any_weights)
        yield Conflict(
            ("federation.method", "adapter.method"),
            f"{chosen_method(config)} works on LoRA factors, but adapter.method is {method}; choose a "
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


def check_training(config: RunConfig) -> Iterator[Conflict]:
    train = config.train
    if train.momentum and train.optimizer != "sgd":
        yield Conflict(
            ("train.momentum", "train.optimizer"),
            f"train.momentum={train.momentum:g} is for sgd, but train.optimizer is "
            f"{train.optimizer}; choose train.optimizer=sgd, or train.momentum=0 and set "
            "train.beta1",
        )


def check_clients(config: RunConfig) -> Iterator[Conflict]:
    sampled = config.federation.clients_per_round
    clients = config.data.clients
    if sampled > clients:
        yield Conflict(
            ("federation.clients_per_round", "data.clients"),
            f"federation.clients_per_round={sampled} of data.clients={clients}; "
            "choose at most that many, or federation.clients_per_round=0 for all",
        )
    if config.federation.patience and not config.data.val_fraction and not config.data.held_out:
        yield Conflict(
            ("federation.patience", "data.val_fraction"),
            f"federation.patience={config.federation.patience} waits for a better held-out loss, "
            "but data.val_fraction=0 holds nothing out; set data.val_fraction above 0, give "
            "data.held_out, or "
            "federation.patience=0",
        )
    if config.data.task == "file" and not config.data.path:
        yield Conflict(
            ("data.path", "data.task"),
            "data.task=file needs data.path; give a file, a pattern, a folder, a list of these, or a hub "
            "data set",
        )
    if config.data.task != "file" and config.data.format != "auto":
        yield Conflict(
            ("data.format", "data.task"),
            f"data.format={config.data.format} has no effect, because data.task={config.data.task} has a "
            "format of its own; choose data.task=file, or leave data.format out",
        )
    if config.data.task == "builtin" and config.data.split == "file":
        yield Conflict(
            ("data.split", "data.task"),
            "data.split=file makes each file of data.path a client, and data.task=builtin reads no file; "
            "choose data.task=file, or another data.split",
        )
    if config.data.task == "builtin" and config.data.path:
        yield Conflict(
            ("data.path", "data.task"),
            f"data.path={path_text(config.data.path)} would not be read, because data.task=builtin makes its "
            "rows; choose data.task=file (or the task that the file belongs to), or leave "
            "data.path out",
        )
    if config.data.task == "builtin" and config.data.held_out:
        yield Conflict(
            ("data.held_out", "data.task"),
            f"data.held_out={path_text(config.data.held_out)} would not be read, because data.task=builtin "
            "makes its rows; choose data.task=file (or the task that the file belongs to), or leave "
            "data.held_out out",
        )


def check_template(config: RunConfig) -> Iterator[Conflict]:
    """Yield the keys of chat templates that data.template does not use."""
    template = config.data.template
    if template == "chat" or (template == "auto" and config.data.task != "builtin"):
        return
    for key, value in (
        ("data.chat_template", config.data.chat_template),
        ("data.system_prompt", config.data.system_prompt),
    ):
        if value:
            yield Conflict(
                (key, "data.template"),
                f"{key} would have no effect, because data.template={template} is no chat template"
                f"{' for the built-in task' if template == 'auto' else ''}; set data.template=chat, or leave "
                f"{key} out",
            )
