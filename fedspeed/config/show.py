"""The configuration as text (`--print-config`), as plain types (for the journal) and as a fingerprint."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedspeed.config.deepspeed_rules import leaves, run_values
from fedspeed.config.deepspeed_schema import AUTO, FORCED
from fedspeed.config.load import DEEPSPEED, DEFAULT, Loaded
from fedspeed.config.reference import comment, meaning, section_meaning
from fedspeed.config.run import RunConfig
from fedspeed.config.spelling import flow, plain, scalar
from fedspeed.federation.config import settled_server_lr

MAX_ALIGNED = 60  # columns of a line; longer lines do not move the comments of the others

# Sections and keys that do not change the arithmetic of a round. With federation.rounds and patience among
# them a run can be extended. `inputs` and `places` are in a journal's record only; the contents of inputs are
# compared separately (session.input_digests).
_OUTSIDE_FINGERPRINT = (
    "inputs",
    "places",
    "evaluation",
    "run.name",
    "run.out",
    "monitor",
    "checkpoint",
    "routing.deadline_s",
    "routing.identity",
    "routing.roster",
    "routing.listen",
    "cluster.start_timeout_s",
    "cluster.heartbeat_timeout_s",
    "cluster.finish_s",
    "cluster.max_restarts",
    "federation.rounds",
    "federation.patience",
    # These decide where data lies, not what is computed.
    "engine.activation_gib",
    "engine.base_gib",
    "engine.block_inputs",
    "engine.block_slots",
)

# Keys that earlier versions did not have, and the values with which a run is one of theirs.
_LATER_KEYS: dict[str, Any] = {
    "engine.logits_mib": "auto",
    "federation.public_rows": "",
    "adapter.rank_by_client": {},
    "data.held_out": "",
    "data.format": "auto",
    "data.too_long": "cut",
    "data.packing": False,
    "data.chat_template": "",
    "data.system_prompt": "",
}


def as_dict(config: RunConfig) -> dict[str, Any]:
    """Return every value as nested dicts and lists of plain types."""
    return plain(config)


def fingerprint(config: RunConfig) -> str:
    """Return the SHA-256, in hex, over everything that changes the arithmetic of a run.

    The deepspeed section only names its base file. Pass `replace(config, deepspeed=merged)` to include the
    content of the file instead of its name.
    """
    return hashlib.sha256(json.dumps(decisive(as_dict(config)), sort_keys=True).encode()).hexdigest()


def decisive(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values that change the arithmetic of a run.

    Args:
        values: from `as_dict`, or the record of an earlier version.
    """
    values = {section: dict(block) for section, block in values.items()}
    federation = values.get("federation", {})
    if federation.get("server_lr") == "auto":
        # auto and the number that it resolves to have the same fingerprint.
        federation["server_lr"] = settled_server_lr("auto", federation["server_optimizer"])
    for key, default in _LATER_KEYS.items():
        section, _, name = key.partition(".")
        if values.get(section, {}).get(name) == default:
            del values[section][name]
    for key in _OUTSIDE_FINGERPRINT:
        section, _, name = key.partition(".")
        if name:
            values.get(section, {}).pop(name, None)
        else:
            values.pop(section, None)
    return values


def render(loaded: Loaded, deepspeed: dict[str, Any], explained: bool = False) -> str:
    """Return YAML of every value with its source; loading it gives the same configuration.

    The resolved DeepSpeed configuration follows as comments, because as YAML it would replace the section
    that it was made from.

    Args:
        deepspeed: the merged section (`deepspeed.merge`).
        explained: whether a comment above each key describes it and its accepted values.
    """
    values = as_dict(loaded.config)
    sources = dict(loaded.sources)
    if loaded.config.federation.server_lr == "auto":
        sources["federation.server_lr"] += f", comes to {loaded.config.federation.server_step:g}"
    lines = _aligned(_lines(values, sources))
    origin = _Origin(loaded)
    resolved = _aligned(_lines(deepspeed, {key: origin(key, value) for key, value in leaves(deepspeed)}))
    title = "# What DeepSpeed receives; the engine replaces every auto once it knows the model."
    texts = list(_explained(lines)) if explained else [line.text for line in lines]
    return "\n".join([*texts, "", title, *(f"# {line.text}" for line in resolved)]) + "\n"


@dataclass(frozen=True)
class _Line:
    """A line of YAML with its dotted key and its source; a line that only opens a block has no source."""

    text: str
    key: str
    source: str


def _explained(lines: Sequence[_Line]) -> Iterator[str]:
    """Yield the lines of all sections with a comment above each key.

    Keys of DeepSpeed, and keys that the user has chosen (names of clusters), have no comment.
    """
    for line in lines:
        section, dot, _ = line.key.partition(".")
        if not dot:
            yield from ("", *comment(section_meaning(section), ""))
        elif section != DEEPSPEED and (text := meaning(line.key)):
            yield from comment(text, line.text[: len(line.text) - len(line.text.lstrip())])
        yield line.text


class _Origin:
    """Tells which source decided a key of the resolved DeepSpeed configuration."""

    def __init__(self, loaded: Loaded) -> None:
        self._sources = loaded.sources
        self._run_keys = {key: run_key for key, (_, run_key) in run_values(loaded.config).items()}
        self._base = loaded.config.deepspeed.get("base") or "FedSpeed"

    def __call__(self, key: str, value: Any) -> str:
        if key in self._run_keys:
            return self._run_keys[key]
        if value == AUTO:
            return "engine"
        if key in FORCED or value is None:
            return "FedSpeed"
        return self._sources.get(f"deepspeed.{key}", self._base)


def _lines(
    block: dict[str, Any], sources: dict[str, str], prefix: str = "", depth: int = 0
) -> Iterator[_Line]:
    """Yield the lines of nested dicts."""
    indent = "  " * depth
    for name, value in block.items():
        key = prefix + name
        if isinstance(value, dict) and value:
            yield _Line(f"{indent}{scalar(name)}:", key, "")
            yield from _lines(value, sources, f"{key}.", depth + 1)
        else:
            yield _Line(f"{indent}{scalar(name)}: {flow(value)}", key, sources.get(key, DEFAULT))


def _aligned(lines: Iterator[_Line]) -> Sequence[_Line]:
    rows = list(lines)
    width = max((len(line.text) for line in rows if line.source and len(line.text) <= MAX_ALIGNED), default=0)
    return [
        replace(line, text=f"{line.text:<{width}}  # {line.source}") if line.source else line for line in rows
    ]
