"""Values written as YAML, or as a `key=value` override on the command line."""

import dataclasses
import json
import re
from typing import Any

import yaml

# YAML 1.1 or 1.2 reads these as something else than text.
_YAML_WORDS = {"y", "n", "yes", "no", "on", "off", "true", "false", "null"}


def plain(value: Any) -> Any:
    """Copy a value of a configuration into dicts, lists and scalars."""
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {name: plain(inner) for name, inner in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def flow(value: Any) -> str:
    """Return a value of a configuration on one line: `[9, 20]`, `{name: clip, norm: 1.0}`, or a scalar."""
    value = plain(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{scalar(name)}: {flow(inner)}" for name, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(flow, value)) + "]"
    return scalar(value)


def scalar(value: Any) -> str:
    """Return a YAML scalar that YAML 1.1 and YAML 1.2 both read as `value`."""
    if isinstance(value, str):
        if re.fullmatch(r"[A-Za-z/][\w./-]*", value, re.ASCII) and value.lower() not in _YAML_WORDS:
            return value
        return yaml.safe_dump(value, default_style='"', width=float("inf"), allow_unicode=True).rstrip("\n")
    if isinstance(value, float):
        text = repr(value)
        return text if "." in text else text.replace("e", ".0e")  # YAML 1.1 reads 1e-05 as text
    return json.dumps(value)
