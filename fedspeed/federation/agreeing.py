"""What all participants of a run must have in common before its first round: the arrays of the global state,
by name and shape. The ranks of one participant build the same engine, but a method may have its server build
another one than clients (`Method.spec`).
"""

import hashlib
from collections.abc import Sequence

import numpy as np

from fedspeed.errors import ConfigError
from fedspeed.federation.arrays import Arrays
from fedspeed.federation.layout import Layout
from fedspeed.federation.link import ClientLink
from fedspeed.units import shortened_list

MAX_NAMED = 3  # arrays, or participants, that a message names


def check_arrays(link: ClientLink, state: Arrays, *, method: str, names: Sequence[str]) -> None:
    """Hold the arrays of this rank's first state against those of all participants. Collective over all
    ranks.

    Each tells a digest and a length; only where they differ, the names as well.

    Args:
        method: its name. names: of all participants, for the message.

    Raises:
        ConfigError: some have others; the same message on all ranks.
        LostPeerError: a participant is missing.
    """
    text = "\n".join(described(state)).encode()
    told = link.gather(_head(text))
    if (told == told[0]).all():
        return
    longest = int(np.ascontiguousarray(told[:, :8]).view(np.int64).max())
    texts = link.gather(np.frombuffer(text.ljust(longest, b"\n"), np.uint8).copy())
    arrays = [row.tobytes().decode(errors="replace").split("\n") for row in texts]
    raise ConfigError(difference(method, names, [frozenset(filter(None, lines)) for lines in arrays]))


def described(state: Arrays) -> list[str]:
    """Return a line for each array of a state: its name and its shape."""
    layout = Layout.of(state)
    return [f"{name} {list(shape)}" for name, shape in zip(layout.names, layout.shapes, strict=True)]


def difference(method: str, names: Sequence[str], arrays: Sequence[frozenset[str]]) -> str:
    """Return the message for participants whose states have different arrays.

    Args:
        names: of the participants. arrays: of each of them, see `described`.
    """
    common = frozenset.intersection(*arrays)
    groups: dict[frozenset[str], list[str]] = {}
    for name, own in zip(names, arrays, strict=True):
        groups.setdefault(own, []).append(name)
    parts = []
    for own, who in groups.items():
        has = "has" if len(who) == 1 else "have"
        own_arrays = shortened_list(sorted(own - common), MAX_NAMED)
        parts.append(f"{shortened_list(who, MAX_NAMED)} {has} {own_arrays or 'no more'}")
    return (
        f"federation.method={method}: the state has not the same arrays everywhere; beside {len(common)} "
        f"that all have, {'; '.join(parts)}. All roles must hold the same arrays by name and shape: what "
        "one of them does not train is frozen there. Look at what the method's spec changes by role (blocks, "
        "adapter.targets), and at its first_state"
    )


def _head(text: bytes) -> np.ndarray:
    """Return a text's length and digest: [40] uint8."""
    length = np.frombuffer(np.int64(len(text)).tobytes(), np.uint8)
    return np.concatenate([length, np.frombuffer(hashlib.sha256(text).digest(), np.uint8)])
