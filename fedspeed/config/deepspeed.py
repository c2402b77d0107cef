"""Merging of a run's `deepspeed:` section into one plain DeepSpeed configuration.

The section names a JSON file as `base`, and its other keys override that file. `auto` means that FedSpeed
decides: values that the run's other sections give are filled in here; values that depend on the model stay
`auto` (`ENGINE_AUTOS`) until the engine is built.
"""

import json
from pathlib import Path
from typing import Any

from fedspeed.config.deepspeed_rules import Finding, at, clashes, incoherences, run_values
from fedspeed.config.deepspeed_schema import ENGINE_AUTOS, FORCED
from fedspeed.config.run import RunConfig
from fedspeed.errors import ConfigError
from fedspeed.files import json_value

__all__ = ["ENGINE_AUTOS", "merge", "zero_stage"]

_PROJECT = Path(__file__).resolve().parents[2]


def merge(section: dict[str, Any], config: RunConfig, root: Path) -> dict[str, Any]:
    """Return the DeepSpeed configuration of a run.

    Args:
        section: `RunConfig.deepspeed`: an optional `base` (a JSON file) and keys that override it. `null`
            removes a key.
        config: the run's configuration, whose values replace `auto`.
        root: folder of the run's YAML (`Loaded.folder`); a relative `base` is looked for there, then in the
            working folder, the project and its ds_configs.

    Returns:
        Plain DeepSpeed configuration without `optimizer` and `scheduler` (the engine builds its own). Only
        keys of `ENGINE_AUTOS` may still be `auto`.

    Raises:
        ConfigError: with every conflict between the file, the section and the run.
    """
    base, base_name = _read_base(section.get("base"), root)
    section = {key: value for key, value in section.items() if key != "base"}
    merged = _overlay(_overlay({}, base), section)
    findings = clashes(merged, config)
    known = {finding.key for finding in findings}
    findings += [finding for finding in incoherences(merged, config) if finding.key not in known]
    if findings:
        raise ConfigError([_placed(finding, section, base, base_name) for finding in findings])
    return _fill(merged, config)


def zero_stage(merged: dict[str, Any]) -> int:
    """Return the ZeRO stage, 0 to 3, of a merged configuration."""
    return int(at(merged, "zero_optimization.stage") or 0)


def _fill(merged: dict[str, Any], config: RunConfig) -> dict[str, Any]:
    """Fill in the run's values; change and return `merged`, which has been checked."""
    merged.pop("optimizer", None)  # says the same as train.*
    merged.pop("train_batch_size", None)  # DeepSpeed computes it from the ranks of a client
    for key, (value, _) in run_values(config).items():
        block, _, name = key.rpartition(".")
        if not block:
            merged[name] = value
        elif value or block in merged:
            merged.setdefault(block, {})[name] = value
    merged.setdefault("steps_per_print", None)  # null: DeepSpeed prints nothing per step
    return merged | FORCED


def _overlay(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Merge nested dicts into new ones; None in `above` removes the key."""
    result = dict(below)
    for key, value in above.items():
        if value is None:
            result.pop(key, None)
        elif isinstance(value, dict):
            result[key] = _overlay(result[key] if isinstance(result.get(key), dict) else {}, value)
        else:
            result[key] = value
    return result


def _placed(finding: Finding, section: dict[str, Any], base: dict[str, Any], base_name: str) -> str:
    in_base = at(section, finding.key) is None and at(base, finding.key) is not None
    return (f"{base_name}: " if in_base else "deepspeed.") + finding.text


def _read_base(base: Any, root: Path) -> tuple[dict[str, Any], str]:
    """Return (content, name for messages) of the base file; an empty configuration if there is none."""
    if base in (None, ""):
        return {}, ""
    if not isinstance(base, str):
        raise ConfigError(
            f"deepspeed.base is {json.dumps(base)}, but must name a JSON file, for example zero3.json"
        )
    path = Path(base).expanduser()
    folders = (root, Path.cwd(), _PROJECT, _PROJECT / "ds_configs")
    candidates = list(dict.fromkeys(folder / path for folder in folders))
    found = next((candidate for candidate in candidates if candidate.is_file()), None)
    if found is None:
        looked = ", ".join(str(candidate) for candidate in candidates)
        raise ConfigError(
            f"deepspeed.base is {base}, but there is no such file (looked for {looked}); "
            "ds_configs/ holds zero0.json to zero3.json"
        )
    try:
        content = json_value(found.read_text(encoding="utf-8"), object_pairs_hook=_without_duplicates)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{found}:{error.lineno}: is not JSON ({error.msg}); mend this line or the one above it"
        ) from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{found}: {error}; mend the file or name another one as deepspeed.base") from error
    if not isinstance(content, dict):
        raise ConfigError(
            f"{found}: holds {type(content).__name__}, not the keys of a DeepSpeed "
            "configuration; see ds_configs/zero3.json"
        )
    return content, base


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is given twice")
    return result
