"""The configuration as text (`--print-config`), as plain types (the run journal) and as a fingerprint."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedspeed.config.deepspeed_rules import leaves, run_values
from fedspeed.config.deepspeed_schema import AUTO, FORCED
from fedspeed.config.load import DEFAULT, FREE, Loaded
from fedspeed.config.reference import comment, meaning, section_meaning
from fedspeed.config.run import RunConfig
from fedspeed.config.spelling import flow, plain, scalar
from fedspeed.federation.config import settled_server_lr

_WIDEST = 60  # a longer line does not push the comments of all others to the right

# What does not change the arithmetic of a round. federation.rounds and patience are here so that a run may be
# extended. `inputs` stands in a journal's record only: the content of what was read, which is compared for
# itself.
_OUTSIDE_FINGERPRINT = (
    "inputs",
    "places",
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
    # Where something is, and not what comes out.
    "engine.activation_gib",
    "engine.base_gib",
    "engine.block_inputs",
    "engine.block_slots",
)


def as_dict(config: RunConfig) -> dict[str, Any]:
    """Every value as nested dicts and lists of plain types."""
    return plain(config)


def fingerprint(config: RunConfig) -> str:
    """SHA-256, in hex, over everything that changes the arithmetic of a run.

    The section names its base file only; pass `replace(config, deepspeed=merged)` to have the content of the
    file count instead of its name.
    """
    return hashlib.sha256(json.dumps(decisive(as_dict(config)), sort_keys=True).encode()).hexdigest()


def decisive(values: dict[str, Any]) -> dict[str, Any]:
    """The part of `as_dict`, or of what an earlier version kept of it, that changes the arithmetic of a
    run.
    """
    values = {section: dict(block) for section, block in values.items()}
    federation = values.get("federation", {})
    if federation.get("server_lr") == "auto":
        # A run that was started with the number that it comes to goes on under either.
        federation["server_lr"] = settled_server_lr("auto", federation["server_optimizer"])
    if not federation.get("public_rows"):  # earlier versions had no such key
        federation.pop("public_rows", None)
    for key in _OUTSIDE_FINGERPRINT:
        section, _, name = key.partition(".")
        if name:
            values.get(section, {}).pop(name, None)
        else:
            values.pop(section, None)
    return values


def render(loaded: Loaded, deepspeed: dict[str, Any], explained: bool = False) -> str:
    """YAML of every value with its source, which loads back to the same configuration.

    The resolved DeepSpeed configuration follows as comments, because as YAML it would replace the section it
    comes from.

    Args:
        deepspeed: what `deepspeed.merge` made of the section.
        explained: whether comments above each value say what it means and what else it may be.
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
    """A line of YAML, the dotted key that it is about, and its source: empty where it only opens a block."""

    text: str
    key: str
    source: str


def _explained(lines: Sequence[_Line]) -> Iterator[str]:
    """The lines of all sections with comments above each key. A key of the deepspeed section is not ours to
    explain, nor is one that somebody else has chosen, such as the name of a cluster.
    """
    for line in lines:
        section, dot, _ = line.key.partition(".")
        if not dot:
            yield from ("", *comment(section_meaning(section), ""))
        elif section != FREE and (text := meaning(line.key)):
            yield from comment(text, line.text[: len(line.text) - len(line.text.lstrip())])
        yield line.text


class _Origin:
    """Who decided a key of the resolved DeepSpeed configuration."""

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
    """The lines of nested dicts."""
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
    width = max((len(line.text) for line in rows if line.source and len(line.text) <= _WIDEST), default=0)
    return [
        replace(line, text=f"{line.text:<{width}}  # {line.source}") if line.source else line for line in rows
    ]
