"""What every key of a configuration means: the comments of `--print-config`, and docs/config.md.

Both are made from the `help` texts and bounds in the configuration dataclasses, so that there is one place to
say it.
"""

import dataclasses
import textwrap
from collections.abc import Iterator
from typing import Any

from fedspeed.config.fields import REQUIRED, Field, alternatives, item_variants, members, takes, variants
from fedspeed.config.reader import FIELDS, FREE
from fedspeed.config.run import RunConfig
from fedspeed.config.spelling import flow

UNITS = {"_s": "seconds", "_seconds": "seconds", "_gib": "GiB", "_kib": "KiB"}  # by how a key ends
COMMENT_COLUMNS = 100

_HEAD = """\
# Configuration reference

Made by `python -m fedspeed config-reference --out docs/config.md` from the `help` texts in the code; do not
edit it by hand.

A run is configured by one YAML file (`--config FILE`) and by `key=value` words on the command line, which
count more: `python launch.py --config FILE train.lr=1e-4`. Every key has a default, so a file holds only what
differs. `python launch.py --config FILE --print-config` shows every value of a run with its meaning and where
it came from; `python -m fedspeed init run.yaml` writes a commented file to start from.

## Lists, dictionaries, and values with a name

A list is written as `[9, 20]`, a dictionary as `{fast: 40, slow: 10}`; quote them on a command line. What is
inside a dictionary is a key of its own there: `train.local_steps_by_cluster.fast=40` changes one value of
those that the YAML has. A method has a name, which decides what else it may be told: `federation.method:
{name: lora_average, rule: freeze_a}`, on the command line `federation.method.name=lora_average
federation.method.rule=freeze_a`; `federation.method: flexlora` is short for `{name: flexlora}`. Another name
on the command line leaves the YAML's options of the first one out.

## Paths

A relative path of something that is read (a key marked "path" below) is looked for beside the YAML that names
it, and if it is not there, in the folder of the command. On the command line it is relative to the folder of
the command. `~` is the home folder. A name such as `org/model` that is no folder in either place is a hub
name. Where something is written (`run.out`), a relative path starts in the folder of the command. A run
resumes from wherever the command is given, as long as `run.out` names the same folder.
"""


def meaning(key: str) -> str:
    """What a dotted key means, and in brackets which values it takes and in which unit; empty for a key that
    somebody else has chosen, such as the name of a cluster.
    """
    if key in FIELDS:
        return _meaning(key, FIELDS[key])
    parent = next(known for known in FIELDS if key.startswith(f"{known}."))
    told = [_meaning(key, field) for inner, _, field in _inside(parent) if inner == key and field.help]
    return " Or: ".join(dict.fromkeys(told))


def _meaning(key: str, field: Field) -> str:
    return field.help if field.type is str else f"{field.help} [{_values(key, field)}]"


def _inside(key: str) -> Iterator[tuple[str, str, Field]]:
    """(dotted key, name of the variant that it belongs to, field) of what a value of several values is made
    of.
    """
    type_ = FIELDS[key].type
    if union := item_variants(type_):
        type_ = union
        key = f"{key}[N]"
    named = variants(type_)
    for part in named.values() or filter(dataclasses.is_dataclass, alternatives(type_)):
        name = next((name for name, variant in named.items() if variant is part), "")
        for inner, field in members(part).items():
            if not (named and inner == "name"):
                yield f"{key}.{inner}", name, field


def section_meaning(name: str) -> str:
    """What a section of the configuration is about."""
    return next(f.metadata["help"] for f in dataclasses.fields(RunConfig) if f.name == name)


def comment(text: str, indent: str) -> Iterator[str]:
    """The lines of a YAML comment that says `text`."""
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
    """The configuration reference, docs/config.md."""
    names = [field.name for field in dataclasses.fields(RunConfig) if field.name != FREE]
    sections = [f"## {name}\n\n{section_meaning(name)}\n\n{_table(name)}" for name in names]
    return "\n".join([_HEAD, *sections, f"## {FREE}\n\n{section_meaning(FREE)} {_DEEPSPEED}"])


_DEEPSPEED = """`ds_configs/` holds `zero0.json` to `zero3.json` and variants with offload. A relative `base`
is looked for beside the YAML, in the working folder, in the project and in `ds_configs/`. `null` removes a
key of the base file. `--print-config` shows what DeepSpeed receives in the end.
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
    """Which values a key takes, with their unit."""
    if field.type is str:
        return "text" if field.path is None else "path"
    unit = next((unit for end, unit in UNITS.items() if key.endswith(end)), "")
    return takes(field) + (f", in {unit}" if unit else "")


def _shown(value: Any) -> str:
    """A default as a YAML would say it."""
    if isinstance(value, float):
        return f"{value:g}"
    return flow(value)
