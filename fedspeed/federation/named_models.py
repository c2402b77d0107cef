"""The models that a method has evaluated and exported (`Method.models`), by name."""

import re
from collections.abc import Collection, Mapping

from fedspeed.federation.arrays import Arrays
from fedspeed.federation.methods.base import Method

COMMON = "adapter"  # the model of all clients that have none of their own
OWN = "client-"  # prefix of a client's own model
NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")  # of a model, and of the folder that it is exported to


def own_model(client: int) -> str:
    """Return the name of a client's own model in `Method.models`."""
    return f"{OWN}{client}"


def is_own_model(name: str) -> bool:
    """Return whether a name in `Method.models` is that of a client's own model."""
    return name.startswith(OWN)


def has_own_models(method: Method) -> bool:
    """Return whether a method may have more models than the common one, so that ranks may evaluate different
    numbers of them.
    """
    return type(method).models is not Method.models


def models_of(method: Method, state: Arrays, memory: Mapping[int, Arrays]) -> dict[str, Arrays]:
    """Return the models that are evaluated (`Method.models`).

    Raises:
        ValueError: the method returns no common model, or a name that is not valid for a folder.
    """
    return _checked(method, method.models(state, memory))


def exports_of(method: Method, state: Arrays, memory: Mapping[int, Arrays]) -> dict[str, Arrays]:
    """Return the models that are exported (`Method.exports`).

    Raises:
        ValueError: see `models_of`.
    """
    return _checked(method, method.exports(state, memory))


def _checked(method: Method, models: dict[str, Arrays]) -> dict[str, Arrays]:
    """Return models, with a common one and valid names.

    Raises:
        ValueError: see `models_of`.
    """
    kind = type(method).__name__
    if COMMON not in models:
        raise ValueError(f"{kind}.models gives no {COMMON!r}, for clients without a model of their own")
    invalid = sorted(n for n in models if not NAME.fullmatch(n) or n.split("-")[-1] == "last")
    if invalid:
        raise ValueError(
            f"{kind}.models calls a model {invalid[0]!r}; small letters, digits and single dashes make a "
            "name, and its last word is not 'last'"
        )
    return models


def assigned_models(models: dict[str, Arrays], clients: Collection[int]) -> list[tuple[Arrays, list[int]]]:
    """Return the models to evaluate, each with the clients that it is evaluated for: a client's own model for
    that client, and the common model for all others. Models of other names are only exported.
    """
    others = [client for client in clients if own_model(client) not in models]
    own = [(models[own_model(client)], [client]) for client in clients if own_model(client) in models]
    return [(models[COMMON], others), *own] if others else own
