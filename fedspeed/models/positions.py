"""How long a row may be for a base: a table of positions has an end, rotations that depend on the longest row
of a micro-batch are refused, and rotated positions beyond those of pretraining are unknown to the model.
Pure, from the values of a config.json.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedspeed.errors import ModelError
from fedspeed.models.families.registry import FAMILIES
from fedspeed.models.json_object import read_object
from fedspeed.models.local_config import config_file

LONGROPE = ("longrope", "su")


@dataclass(frozen=True)
class RowLimit:
    """The most tokens that a row may have, and why: what follows "the model has" in a sentence."""

    tokens: int
    reason: str


def check_length(base: str, max_tokens: int) -> list[str]:
    """Return notes about `data.max_tokens` on this base; none where its config.json is not on this machine.

    Raises:
        ModelError: rows may be longer than the model can compute them exactly.
    """
    path = config_file(base)
    if path is None:
        return []
    config = read_object(path, "a model configuration")
    limit = row_limit(config)
    if limit is not None and max_tokens > limit.tokens:
        raise ModelError(
            f"data.max_tokens={max_tokens}: model.base={base} has {limit.reason}; set "
            f"data.max_tokens={limit.tokens}"
        )
    reach = rotary_reach(config)
    if reach and max_tokens > reach:
        return [
            f"data.max_tokens={max_tokens}, but model.base={base} was made for {reach} positions "
            "(max_position_embeddings, rope_scaling) and has not learned what lies beyond. Set "
            f"data.max_tokens={reach}, or scale its positions (rope_scaling in its config.json)"
        ]
    return []


def row_limit(config: Mapping[str, Any]) -> RowLimit | None:
    """Return the most tokens that a row may have; None where there is no limit.

    A learned table of positions has an end. The rotary types dynamic and longrope take other frequencies for
    all rows of a micro-batch once its longest row, padding included, exceeds the original length: the result
    of a row would depend on the rows that it is computed with.

    Raises:
        ModelError: the rotary type changes with the length, and config.json does not say at which.
    """
    table, length = _learned(config)
    if table:
        return RowLimit(length, f"a table of {length} positions ({table}) and none beyond")
    for scaling in _scalings(config):
        kind = scaling.get("rope_type") or scaling.get("type")
        if kind != "dynamic" and not _is_longrope(config, kind):
            continue
        original = _original_length(config, scaling, kind)
        if not original:
            raise ModelError(
                f"rope_scaling of type {kind} changes all rows of a micro-batch once one is longer than the "
                "original length, which config.json does not say; set max_position_embeddings (longrope: "
                "original_max_position_embeddings) in it"
            )
        return RowLimit(
            original,
            f"rotary positions of type {kind} (rope_scaling), which change for all rows of a micro-batch "
            f"once one is longer than {original} tokens",
        )
    return None


def _is_longrope(config: Mapping[str, Any], kind: object) -> bool:
    family = FAMILIES.get(str(config.get("model_type")))
    return kind in LONGROPE or (family is not None and kind in family.read_as_longrope)


def _original_length(config: Mapping[str, Any], scaling: Mapping[str, Any], kind: object) -> int:
    """Return the length beyond which a rotary type changes; 0 where the file does not say."""
    family = FAMILIES.get(str(config.get("model_type")))
    default = family.original_positions if family is not None else 0
    known = config.get("max_position_embeddings")
    original = known if kind == "dynamic" else _first(scaling, config) or default or known
    return original if isinstance(original, int) and not isinstance(original, bool) else 0


def _first(*places: Mapping[str, Any]) -> Any:
    return next((p[key] for p in places if p.get(key := "original_max_position_embeddings")), None)


def _learned(config: Mapping[str, Any]) -> tuple[str, int]:
    """Return (key of the length of a base's table of learned positions, the length); an empty key if it has
    none.
    """
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None or family.table is None:
        return "", 0
    length = config.get(family.table.key) or family.table.default
    return (family.table.key, length) if isinstance(length, int) else ("", 0)


def _scalings(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return how a base scales rotated positions, once or for each kind of block; full attention first."""
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(scaling, Mapping):
        return []
    by_kind = [scaling.get(kind) for kind in ("full_attention", "sliding_attention")]
    found = [one for one in by_kind if isinstance(one, Mapping)]
    return found or [scaling]


def rotary_reach(config: Mapping[str, Any]) -> int:
    """Return the number of positions that a base with rotary embeddings was made for, stretched by the factor
    of its scaling if it has one; 0 if the file does not say.
    """
    known = config.get("max_position_embeddings")
    if not isinstance(known, int) or isinstance(known, bool):
        return 0
    family = FAMILIES.get(str(config.get("model_type")))
    scaling = next(iter(_scalings(config)), {})
    factor = scaling.get("factor")
    if not isinstance(factor, int | float) or factor <= 1 or (family and family.positions_are_scaled):
        return known
    return max(known, int(factor * (scaling.get("original_max_position_embeddings") or known)))
