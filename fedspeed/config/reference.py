"""Descriptions of all configuration keys: the comments of `--print-config`, and docs/config.md.

Both are made from the `help` texts and bounds in the configuration dataclasses.
"""

import dataclasses
import textwrap
from collections.abc import Iterator
from typing import Any

from fedspeed.config.fields import (
    REQUIRED,
    Field,
    alternatives,
    describe,
    is_dataclass_type,
    item_variants,
    members,
    variants,
)
from fedspeed.config.reader import DEEPSPEED, FIELDS
from fedspeed.config.run import RunConfig
from fedspeed.config.spelling import flow

UNITS = {"_s": "seconds", "_seconds": "seconds", "_gib": "GiB", "_kib": "KiB"}  # by how a key ends
COMMENT_COLUMNS = 100

_HEAD = """\
# Configuration reference

Made by `python -m fedspeed config-reference --out docs/config.md` from the `help` texts in the code; do not
edit it by hand.

A run is configured by one YAML file (`--config FILE`) and by `key=value` arguments on the command line, which
override the file: `python launch.py --config FILE train.lr=1e-4`. Every key has a default, so a file holds
only what differs. `python launch.py --config FILE --print-config` shows every value of a run with its meaning
and where it came from; `python -m fedspeed init run.yaml` writes a commented file to start from.

## Lists, dictionaries, and values with a name

A list is written as `[9, 20]`, a dictionary as `{fast: 40, slow: 10}`; quote them on a command line. There,
an entry of a dictionary can also be given as a key: `train.local_steps_by_cluster.fast=40` changes one entry
and keeps the others of the YAML. A method has a name, which decides its other options: `federation.method:
{name: lora_average, rule: freeze_a}`, on the command line `federation.method.name=lora_average
federation.method.rule=freeze_a`; `federation.method: flexlora` is short for `{name: flexlora}`. Where the
command line names another method, the YAML's options of the first one are dropped.

## Presets of methods

Some methods have a preset, a YAML file in `fedspeed/federation/methods/presets/` with the settings that they
were published with. `federation.method.name=fs_llm` on the command line applies it: its values override those
of the YAML file, and other arguments of the command line override the preset. Its section `routing` is left
out where the user gives `routing.mode`, or a `routing.transport` between organisations (`tls`). Where the
YAML file itself names the method, its other keys override the preset. The run and `--dry-run` say which
values differ, and `--print-config` shows `preset fs_llm:LINE` beside what came from it.

## Paths

A relative path of something that is read (a key marked "path" below) is looked for in the folder of the YAML
that names it, then in the working folder. On the command line it is relative to the working folder. `~` is
the home folder. A name such as `org/model` that is no folder in either place is a hub name. Where something
is written (`run.out`), a relative path starts in the working folder. A run can be resumed from any working
folder, as long as `run.out` names the same folder.
"""


def meaning(key: str) -> str:
    """Return the description of a dotted key, with its accepted values and unit in brackets.

    Empty for a key that the user has chosen, such as the name of a cluster.
    """
    if key in FIELDS:
        return _meaning(key, FIELDS[key])
    parent = next(known for known in FIELDS if key.startswith(f"{known}."))
    texts = [_meaning(key, field) for inner, _, field in _inside(parent) if inner == key and field.help]
    return " Or: ".join(dict.fromkeys(texts))


def _meaning(key: str, field: Field) -> str:
    return field.help if field.type is str else f"{field.help} [{_values(key, field)}]"


def _inside(key: str) -> Iterator[tuple[str, str, Field]]:
    """Yield (dotted key, name of the variant it belongs to, field) of the fields inside a nested value."""
    type_ = FIELDS[key].type
    if union := item_variants(type_):
        type_ = union
        key = f"{key}[N]"
    by_name = variants(type_)
    for cls in by_name.values() or filter(is_dataclass_type, alternatives(type_)):
        name = next((name for name, variant in by_name.items() if variant is cls), "")
        for inner, field in members(cls).items():
            if not (by_name and inner == "name"):
                yield f"{key}.{inner}", name, field


def section_meaning(name: str) -> str:
    """Return the description of a section of the configuration."""
    return next(f.metadata["help"] for f in dataclasses.fields(RunConfig) if f.name == name)


def comment(text: str, indent: str) -> Iterator[str]:
    """Wrap a text into the lines of a YAML comment."""
    start = f"{indent}# "
    yield from textwrap.wrap(
        text,
        COMMENT_COLUMNS,
        initial_indent=start,
        subsequent_indent=start,
        break_long_words=False,
        break_on_hyphens=False,
    )


def markdown() -> str:
    """Return the configuration reference, docs/config.md."""
    names = [field.name for field in dataclasses.fields(RunConfig) if field.name != DEEPSPEED]
    sections = [f"## {name}\n\n{section_meaning(name)}\n\n{_table(name)}" for name in names]
    return "\n".join([_HEAD, *sections, f"## {DEEPSPEED}\n\n{section_meaning(DEEPSPEED)} {_DEEPSPEED}"])


_DEEPSPEED = """\
`ds_configs/` holds `zero0.json` to `zero3.json` and variants with offload. A relative `base` is looked for
in the folder of the YAML, the working folder, the project and `ds_configs/`. `null` removes a key of the
base file. `--print-config` shows the configuration that DeepSpeed receives.
"""


def _table(section: str) -> str:
    rows = ["| key | default | values | meaning |", "| --- | --- | --- | --- |"]
    for key, field in FIELDS.items():
        if key.startswith(f"{section}."):
            rows.append(_row(key, field, field.help))
            for inner, name, part in _inside(key):
                rows.append(_row(inner, part, f"{name}: {part.help}" if name else part.help))
    return "\n".join(rows) + "\n"


def _row(key: str, field: Field, help_: str) -> str:
    default = "none" if field.default is REQUIRED else f"`{_shown(field.default)}`"
    cells = (f"`{key}`", default, _values(key, field), help_)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _values(key: str, field: Field) -> str:
    """Return the accepted values of a key, with their unit."""
    if field.path is not None:
        return "path" if field.type is str else "path or a list of paths"
    if field.type is str:
        return "text"
    unit = next((unit for end, unit in UNITS.items() if key.endswith(end)), "")
    return describe(field) + (f", in {unit}" if unit else "")


def _shown(value: Any) -> str:
    """Return a default as it would be written in YAML."""
    if isinstance(value, float):
        return f"{value:g}"
    return flow(value)
