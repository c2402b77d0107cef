"""Values of records as strict JSON, and back.

A number that is not finite becomes one of the strings "NaN", "Infinity" and "-Infinity" (as in the JSON form
of protobuf), so that a diverged loss stays different from one that was not measured (null), and comes back as
it was.
"""

import math
from typing import Any, Literal, get_args, get_origin

NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def encode(value: Any) -> Any:
    """Convert a number, a text, a record, or a tuple of these for `json.dumps(..., allow_nan=False)`."""
    if hasattr(value, "to_json"):
        return value.to_json()
    if isinstance(value, tuple):
        return [encode(item) for item in value]
    if isinstance(value, float) and math.isnan(value):
        return "NaN"
    if isinstance(value, float) and math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return value


def decode(value: Any, kind: Any, name: str) -> Any:
    """Convert a value that `encode` has written back into the type `kind`.

    Args:
        kind: a type, a union of types, a Literal, a class with `from_json`, or a tuple of one of these.
        name: the name of the value, for the error.

    Raises:
        ValueError: the value is not of that type.
    """
    if get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{name} must be a list, found {value!r}")
        return tuple(decode(item, get_args(kind)[0], name) for item in value)
    if hasattr(kind, "from_json"):
        return kind.from_json(value)
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise ValueError(f"{name} must be one of {list(get_args(kind))}, found {value!r}")
        return value
    allowed = get_args(kind) or (kind,)
    if value is None and type(None) in allowed:
        return None
    if float in allowed and isinstance(value, str) and value in NON_FINITE:
        return NON_FINITE[value]
    if float in allowed and type(value) is int:
        return float(value)
    if isinstance(value, bool) is not (bool in allowed) or not isinstance(value, allowed):
        expected = kind.__name__ if isinstance(kind, type) else kind
        raise ValueError(f"{name} must be {expected}, found {value!r}")
    return value
