"""How long a row may be for a base: a table of positions has an end, and rotated positions beyond those of
pretraining have never been met. Pure, from the values of a config.json.
"""

from collections.abc import Mapping

from fedspeed.errors import ModelError
from fedspeed.models.families.registry import FAMILIES
from fedspeed.models.json_object import read_object
from fedspeed.models.local_config import config_file


def check_length(base: str, max_tokens: int) -> list[str]:
    """Notes about `data.max_tokens` on this base; none where its config.json is not at hand.

    Raises:
        ModelError: rows may be longer than the base's table of positions.
    """
    path = config_file(base)
    if path is None:
        return []
    config = read_object(path, "a model configuration")
    key, end = _learned(config)
    if key:
        if isinstance(end, int) and max_tokens > end:
            raise ModelError(
                f"data.max_tokens={max_tokens}: model.base={base} has a table of {end} positions ({key}) and "
                "none beyond; set "
                f"data.max_tokens={end}"
            )
        return []
    reach = rotary_reach(config)
    if reach and max_tokens > reach:
        return [
            f"data.max_tokens={max_tokens}, but model.base={base} was made for {reach} positions "
            "(max_position_embeddings, rope_scaling); of what lies "
            f"beyond it has learned nothing. Set data.max_tokens={reach}, or scale its positions "
            "(rope_scaling in its config.json)"
        ]
    return []


def table_end(config: Mapping) -> int | None:
    """Positions in a base's table of learned ones, None if it has no such table."""
    key, end = _learned(config)
    return end if key and isinstance(end, int) else None


def _learned(config: Mapping) -> tuple[str, int]:
    """(key of the length of a base's table of learned positions, the length); an empty key if it has none."""
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None or family.table is None:
        return "", 0
    return family.table.key, config.get(family.table.key) or family.table.default


def unscaled_end(config: Mapping) -> int | None:
    """Return the number of positions up to which the rotary frequencies of a base are the same for rows of
    all lengths; None where they always are. Beyond it, a token of a longer row gets other ones, at every
    position (LongRoPE, Ding et al., 2024; dynamic NTK scaling).
    """
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = scaling.get("rope_type") or scaling.get("type")
    if kind == "longrope":
        return scaling.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    return config.get("max_position_embeddings") if kind == "dynamic" else None


def rotary_reach(config: Mapping) -> int:
    """Positions that a base with rotary embeddings was made for, stretched by its scaling if that has a
    factor; 0 if it does not say.
    """
    known = config.get("max_position_embeddings")
    if not isinstance(known, int) or isinstance(known, bool):
        return 0
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    factor = scaling.get("factor") if isinstance(scaling, Mapping) else None
    if not isinstance(factor, int | float) or factor <= 1:
        return known
    return max(known, int(factor * (scaling.get("original_max_position_embeddings") or known)))
