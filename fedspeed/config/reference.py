"""What every key of a configuration means: the comments of `--print-config`, and docs/config.md.

Both are made from the `help` texts and bounds in the configuration dataclasses, so that there is one place to say it.
"""

import dataclasses
import textwrap
from collections.abc import Iterator
from typing import Any

from fedspeed.config.convert import Field, takes
from fedspeed.config.load import FIELDS, FREE
from fedspeed.config.run import RunConfig

UNITS = {"_s": "seconds", "_seconds": "seconds", "_gib": "GiB", "_kib": "KiB"}  # by how a key ends
COMMENT_COLUMNS = 100

_HEAD = """\
# Configuration reference

Made by `python -m fedspeed config-reference --out docs/config.md` from the `help` texts in the code; do not edit it by hand.

A run is configured by one YAML file (`--config FILE`) and by `key=value` words on the command line, which count more:
`python launch.py --config FILE train.lr=1e-4`. Every key has a default, so a file holds only what differs.
`python launch.py --config FILE --print-config` shows every value of a run with its meaning and where it came from;
`python -m fedspeed init run.yaml` writes a commented file to start from.

## Paths

A relative path of something that is read (a key marked "path" below) is looked for beside the YAML that names it, and if it is not
there, in the folder of the command. On the command line it is relative to the folder of the command. `~` is the home folder. A name
such as `org/model` that is no folder in either place is a hub name. Where something is written (`run.out`), a relative path starts
in the folder of the command. A run resumes from wherever the command is given, as long as `run.out` names the same folder.
"""


def meaning(key: str) -> str:
    """What a dotted key means, and in brackets which values it takes and in which unit."""
    field = FIELDS[key]
    return field.help if field.type is str else f"{field.help} [{_values(key, field)}]"


def section_meaning(name: str) -> str:
    """What a section of the configuration is about."""
    return next(f.metadata["help"] for f in dataclasses.fields(RunConfig) if f.name == name)


def comment(text: str, indent: str) -> Iterator[str]:
    """The lines of a YAML comment that says `text`."""
    yield from textwrap.wrap(text, COMMENT_COLUMNS, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ",
                             break_long_words=False, break_on_hyphens=False)


def markdown() -> str:
    """The configuration reference, docs/config.md."""
    values = dataclasses.asdict(RunConfig())
    sections = [f"## {name}\n\n{section_meaning(name)}\n\n{_table(name, block)}" for name, block in values.items() if name != FREE]
    return "\n".join([_HEAD, *sections, f"## {FREE}\n\n{section_meaning(FREE)} {_DEEPSPEED}"])


_DEEPSPEED = """`ds_configs/` holds `zero0.json` to `zero3.json` and variants with offload. A relative `base` is
looked for beside the YAML, in the working folder, in the project and in `ds_configs/`. `null` removes a key of the base file.
`--print-config` shows what DeepSpeed receives in the end.
"""


def _table(section: str, block: dict[str, Any]) -> str:
    rows = ["| key | default | values | meaning |", "| --- | --- | --- | --- |"]
    for name, default in block.items():
        field = FIELDS[f"{section}.{name}"]
        cells = (f"`{section}.{name}`", f"`{_shown(default)}`", _values(name, field), field.help)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def _values(key: str, field: Field) -> str:
    """Which values a key takes, with their unit."""
    if field.type is str:
        return "text" if field.path is None else "path"
    unit = next((unit for end, unit in UNITS.items() if key.endswith(end)), "")
    return takes(field) + (f", in {unit}" if unit else "")


def _shown(value: Any) -> str:
    """A default as a YAML would say it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return str(value) if value != "" else '""'
