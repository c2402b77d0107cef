"""A commented YAML to start from: for a task, the user's own rows, or the hosts of a hostfile."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedspeed.cluster.hostfile import read
from fedspeed.cluster.topology import place_clients
from fedspeed.config.paths import existing_path
from fedspeed.config.reference import comment, meaning, section_meaning
from fedspeed.config.spelling import scalar
from fedspeed.data.detect import Detected, detect
from fedspeed.errors import ConfigError
from fedspeed.models.checks import QUICKSTART_BASE

HUB_BASE = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
Values = dict[str, dict[str, Any]]

_TINY: Values = {  # learns the built-in task in a minute on two cores
    "adapter": {"method": "lora", "lora_rank": 8, "alpha": 16.0, "targets": "all-linear"},
    "data": {"max_tokens": 64, "val_fraction": 0.1},
    "train": {"local_steps": 10, "micro_batch": 16, "lr": 5e-3},
    "federation": {"rounds": 12},
}
_USUAL: Values = {
    "adapter": {"method": "lora", "lora_rank": 8, "alpha": 16.0, "targets": "attention"},
    "data": {"max_tokens": 512, "val_fraction": 0.02},
    "train": {
        "local_steps": 30,
        "micro_batch": 4,
        "lr": 3e-4,
        "clip": 1.0,
        "schedule": "cosine",
        "warmup_steps": 30,
    },
    "federation": {"rounds": 30},
}
TASKS = {
    "builtin": (4, "meta"),
    "gsm8k": (3, "iid"),
    "dolly": (8, "meta"),
    "codealpaca": (9, "meta"),
}  # (clients, split)
CLIENTS = 3  # for the user's own rows in one file
MAX_FILES_AS_CLIENTS = 64  # more files are more likely parts of one data set than an owner each


@dataclass(frozen=True)
class Starter:
    """A starter file: its text, and remarks for the user."""

    text: str
    remarks: tuple[str, ...]


def starter(target: Path, task: str, rows: Path | None, hostfile: Path | None, base: str) -> Starter:
    """Return the YAML for the file `target`.

    Args:
        task: one of TASKS; ignored where there are `rows`.
        rows: a file with the user's own rows, a pattern or a folder of files; None for a task.
        hostfile: gives the hosts; None where there is none.
        base: model.base as the command gives it; empty for one that suits the task.

    Raises:
        DataError: the rows cannot be read, or their fields not be recognised.
        HostfileError, PlanError: there are no hosts, or too few.
    """
    remarks = []
    data: dict[str, Any]
    values: Values
    if rows is None:
        clients, split = TASKS[task]
        data = {"task": task}
    else:
        found = detect(str(rows))
        clients = CLIENTS
        split = "iid"
        each_a_client = hostfile is None and 1 < found.files <= MAX_FILES_AS_CLIENTS
        if each_a_client:
            clients = found.files
            split = "file"
        data = {"task": "file", "path": _path_in(rows, target), "format": found.format, **_fields(found)}
        remarks.append(_description(rows, found, each_a_client))
    hosts = read(hostfile).hosts if hostfile else ()
    if hosts and (rows is not None or task == "builtin"):
        clients = len(hosts)
        if split == "meta" and clients > 6:  # there are six categories of the built-in task's rows
            split = "iid"
    shared = bool(hosts) and any(host.slots > 1 and host.gpu for host in hosts)
    if hosts:
        place_clients(hosts, clients, "auto")
        remarks.append(
            f"{hostfile}: {len(hosts)} hosts, {sum(host.slots for host in hosts)} ranks, {clients} clients"
        )
    tiny = rows is None and task == "builtin"
    values = {
        "model": {"base": _base(base, target) or (QUICKSTART_BASE if tiny else HUB_BASE), "dtype": "auto"}
    }
    for section, block in (_TINY if tiny else _USUAL).items():
        values[section] = dict(block)
    values["data"] = {**data, "clients": clients, "split": split, **values["data"]}
    if shared:
        values["engine"] = {"activation_checkpointing": True}
    values["routing"] = {"mode": "auto"}
    values["deepspeed"] = {"base": "zero3.json" if shared else "zero0.json"}
    return Starter(_text(target, hostfile, values), tuple(remarks))


def _text(target: Path, hostfile: Path | None, values: Values) -> str:
    command = f"deepspeed --hostfile {hostfile} launch.py" if hostfile else "python launch.py"
    lines = [
        f"# Check it:  python launch.py --config {target} --dry-run",
        f"# Run it:    {command} --config {target}",
        f'# Ask it:    python -m fedspeed chat {target.stem} "..."',
        "# Keys that are not here have their defaults: docs/config.md explains them all.",
    ]
    for section, block in values.items():
        lines += ["", *comment(section_meaning(section), ""), f"{section}:"]
        for name, value in block.items():
            if section != "deepspeed":
                lines += comment(meaning(f"{section}.{name}"), "  ")
            lines.append(f"  {name}: {scalar(value)}")
    return "\n".join(lines) + "\n"


def _base(base: str, target: Path) -> str:
    """Return `model.base` as the YAML names it: a path for an existing folder or file, else the same text."""
    return _path_in(Path(base), target) if base and existing_path(base) else base


def _path_in(path: Path, target: Path) -> str:
    """Return an input's path for the YAML: relative if it is below the YAML's folder, else absolute."""
    relative = os.path.relpath(path, target.parent)
    return os.path.abspath(path) if relative.startswith("..") else relative


def _fields(found: Detected) -> dict[str, str]:
    """Return the keys for fields whose names are not the defaults."""
    fields: dict[str, str] = {
        part: getattr(found.fields, part) for part in ("instruction", "input", "output", "category")
    }
    return {f"{part}_field": name for part, name in fields.items() if name and name != part}


def _description(rows: Path, found: Detected, each_a_client: bool) -> str:
    fields = found.fields
    parts = [f"format {found.format}"]
    if found.format == "instruction":
        parts = [
            f"instruction from {fields.instruction!r}",
            f"input from {fields.input!r}" if fields.input else "no input",
            f"answer from {fields.output!r}",
        ]
    category = f"category from {fields.category!r} ({found.categories} categories)"
    parts.append(category if fields.category else "no category")
    each = ", each a client" if each_a_client else " (data.split=file makes each a client)"
    files = f"{found.files} files{each}" if found.files > 1 else ""
    seen = f"by the first {found.rows} rows; correct the YAML if this is not so"
    return f"{rows}: {', '.join(filter(None, [files, *parts]))}, {seen}"


def check_target(target: Path) -> None:
    """Check that a YAML can be written to `target`.

    Raises:
        ConfigError: the file exists, its name is not that of a YAML, or its folder is missing.
    """
    if target.suffix not in (".yaml", ".yml"):
        raise ConfigError(
            f"{target}: a run's configuration is a YAML file; give it a name such as "
            f"{target.name or 'run'}.yaml"
        )
    if target.exists() or target.is_symlink():
        raise ConfigError(f"{target}: exists already, and is not overwritten; move it, or give another name")
    if not target.parent.is_dir():
        raise ConfigError(f"{target}: there is no folder {target.parent}; make it, or give another name")
