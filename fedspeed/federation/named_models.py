"""The models that a method gives to be evaluated and exported (`Method.models`), by name."""

import re
from collections.abc import Collection, Mapping

from fedspeed.federation.arrays import Arrays
from fedspeed.federation.methods.base import Method

COMMON = "adapter"  # the model that all clients have, unless they have one of their own
OWN = "client-"
NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")  # of a model: a folder is called after it


def own_model(client: int) -> str:
    """Return the name that a client's own model has in `Method.models`."""
    return f"{OWN}{client}"


def is_own_model(name: str) -> bool:
    """Say whether a name of `Method.models` is that of a client's own model."""
    return name.startswith(OWN)


def has_own_models(method: Method) -> bool:
    """Say whether a method may give more models than the common one, and ranks unequally many of them."""
    return type(method).models is not Method.models


def models_of(method: Method, state: Arrays, memory: Mapping[int, Arrays]) -> dict[str, Arrays]:
    """Return what is evaluated and exported (`Method.models`).

    Raises:
        ValueError: the method gives no common model, or a name that no folder may be called after.
    """
    models = method.models(state, memory)
    kind = type(method).__name__
    if COMMON not in models:
        raise ValueError(f"{kind}.models gives no {COMMON!r}, for clients without a model of their own")
    if wrong := sorted(n for n in models if not NAME.fullmatch(n) or n.split("-")[-1] == "last"):
        raise ValueError(
            f"{kind}.models calls a model {wrong[0]!r}; small letters, digits and single dashes make a name, "
            "and its last word is not 'last'"
        )
    return models


def whose(models: dict[str, Arrays], clients: Collection[int]) -> list[tuple[Arrays, list[int]]]:
    """Return the models to evaluate, each with the clients that it is evaluated for: a client's own one for
    that client, the common one for all others. Models of other names are only exported.
    """
    others = [client for client in clients if own_model(client) not in models]
    own = [(models[own_model(client)], [client]) for client in clients if own_model(client) in models]
    return [(models[COMMON], others), *own] if others else own
