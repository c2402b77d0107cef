"""The arrays of a run's state: the union of the arrays of all roles. A method may have its server build
another engine than its clients (`Method.spec`), and then each role has arrays that the other lacks.

Before the first round, all participants announce the names and shapes of their arrays. All clients must have
the same ones, and an array that clients and server have must have one shape. Arrays that only one role has
are sent by that role. What a participant announces is data: its size is bounded, and names and shapes are
checked before anything is allocated for them.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedspeed.errors import ConfigError
from fedspeed.federation.arrays import Arrays, are_finite
from fedspeed.federation.layout import Layout
from fedspeed.federation.link import ClientLink
from fedspeed.files import foreign_json
from fedspeed.models.folded import trainable
from fedspeed.text_safety import quoted
from fedspeed.units import shortened_list

MAX_NAMED = 3  # arrays, or participants, that a message names
MAX_TEXT = 1 << 24  # bytes of the names and shapes of a state
MAX_DIMENSION = 1 << 31
_NAME = re.compile(r"[\w.:-]{1,300}", re.ASCII)  # of a parameter, or KIND:NAME
Shape = tuple[int, ...]


@dataclass(frozen=True)
class RunArrays:
    """The arrays that a run begins with.

    Attributes:
        arrays: fp32 by name, of all roles; the same on all ranks.
        server_only, clients_only: names of trainable arrays (models.folded.trainable) that only the engine of
            that role has.
    """

    arrays: Arrays
    server_only: frozenset[str] = frozenset()
    clients_only: frozenset[str] = frozenset()


def united_arrays(
    link: ClientLink,
    own: Arrays,
    *,
    server: int,
    is_server: bool,
    names: Sequence[str],
    method: str,
    max_mib: int,
) -> RunArrays:
    """Unite the arrays of all roles. Collective over all ranks.

    Participants exchange a digest and a length first, and the rest only where the digests differ.

    Args:
        own: arrays of this rank's engine, by their names in the state. is_server: whether it is the server's.
        server: number of the server among the participants. names: of all participants, for messages.
        method: its name. max_mib: routing.message_mib, the most that a role may send.

    Raises:
        ConfigError: the arrays contradict each other, or an announcement is invalid; the same message on all
            ranks.
        LostPeerError: a participant is missing.
    """
    text = announcement(own)
    headers = link.gather(_header(text))
    if (headers == headers[0]).all():
        return RunArrays(own)
    lengths = np.ascontiguousarray(headers[:, :8]).view(np.int64)[:, 0]
    if invalid := [name for name, length in zip(names, lengths, strict=True) if not 0 < length <= MAX_TEXT]:
        raise ConfigError(
            f"{shortened_list(invalid, MAX_NAMED)} announced names of arrays of less than one byte, or of "
            f"more than {MAX_TEXT}; all must run the same version of FedSpeed"
        )
    texts = link.gather(np.frombuffer(text.ljust(int(lengths.max())), np.uint8).copy())
    layouts = [announced(row.tobytes(), name) for row, name in zip(texts, names, strict=True)]
    if problem := contradiction(method, names, layouts, server):
        raise ConfigError(problem)
    clients = layouts[0 if server else 1]
    only_server = _without(layouts[server], clients)
    only_clients = _without(clients, layouts[server])
    for shapes, sender in ((only_server, "the server"), (only_clients, "clients")):
        mib = 4 * _layout(shapes).size / 2**20
        if mib > max_mib:
            raise ConfigError(
                f"routing.message_mib={max_mib}: of federation.method={method}, {sender} alone would send "
                f"{mib:.0f} MiB of arrays; raise it"
            )
    united = own | _sent(link, own, only_server, is_server) | _sent(link, own, only_clients, not is_server)
    if not are_finite(united):
        raise ConfigError(
            f"federation.method={method}: an array that only one role has is not finite before any training; "
            "check the weights in model.base and adapter.start_from"
        )
    return RunArrays(
        {name: united[name] for name in sorted(united)},
        server_only=frozenset(trainable(only_server)),
        clients_only=frozenset(trainable(only_clients)),
    )


def announcement(arrays: Arrays) -> bytes:
    """Return the names and shapes of arrays as JSON, in the order of names."""
    layout = Layout.of(arrays)
    return json.dumps(list(zip(layout.names, layout.shapes))).encode()


def announced(text: bytes, sender: str) -> dict[str, Shape]:
    """Return the shapes of the arrays that a participant has announced, by name.

    Raises:
        ConfigError: the text is no announcement.
    """
    try:
        return _shapes(foreign_json(text, MAX_TEXT))
    except ValueError as error:
        raise ConfigError(
            f"{sender} announced arrays that cannot be read ({quoted(error)}); all must run the same version "
            "of FedSpeed"
        ) from error


def _shapes(value: object) -> dict[str, Shape]:
    """Return the shapes by name that a received value lists. Raises ValueError if it lists none."""
    if not isinstance(value, list) or not value:
        raise ValueError("no list of arrays")
    found: dict[str, Shape] = {}
    for entry in value:
        if not isinstance(entry, list) or len(entry) != 2:
            raise ValueError("no pair of a name and a shape")
        name, shape = entry
        if not isinstance(name, str) or not _NAME.fullmatch(name) or name in found:
            raise ValueError(f"the name {str(name)[:80]!r}")
        is_shape = isinstance(shape, list) and 0 < len(shape) <= 4
        if not is_shape or not all(type(n) is int and 0 < n < MAX_DIMENSION for n in shape):
            raise ValueError(f"the shape {str(shape)[:80]} of {name}")
        found[name] = tuple(shape)
    return found


def contradiction(
    method: str, names: Sequence[str], layouts: Sequence[Mapping[str, Shape]], server: int
) -> str:
    """Return why the arrays of participants have no union; empty if they have one.

    Args:
        names, layouts: of the participants. server: number of the server among them.
    """
    clients = [number for number in range(len(names)) if number != server]
    ours = [set(layouts[number].items()) for number in clients]
    if any(other != ours[0] for other in ours):
        return difference(method, [names[number] for number in clients], [_lines(one) for one in ours])
    common = layouts[server].keys() & layouts[clients[0]].keys()
    served = {(name, shape) for name, shape in layouts[server].items() if name in common}
    kept = {(name, shape) for name, shape in ours[0] if name in common}
    if served == kept:
        return ""
    return difference(method, [names[clients[0]], names[server]], [_lines(kept), _lines(served)])


def _lines(arrays: set[tuple[str, Shape]]) -> frozenset[str]:
    """Return a line of text for each array: its name and its shape."""
    return frozenset(f"{name} {list(shape)}" for name, shape in arrays)


def difference(method: str, names: Sequence[str], arrays: Sequence[frozenset[str]]) -> str:
    """Return the error message for participants with different arrays, where they must be the same.

    Args:
        names: of the participants. arrays: by participant, a line for each array.
    """
    common = frozenset.intersection(*arrays)
    groups: dict[frozenset[str], list[str]] = {}
    for name, lines in zip(names, arrays, strict=True):
        groups.setdefault(lines, []).append(name)
    differences = []
    for lines, members in groups.items():
        have = "has" if len(members) == 1 else "have"
        additional = shortened_list(sorted(lines - common), MAX_NAMED)
        differences.append(f"{shortened_list(members, MAX_NAMED)} {have} {additional or 'no more'}")
    return (
        f"federation.method={method}: participants have different arrays in their states; in addition to "
        f"{len(common)} that all have, {'; '.join(differences)}. All clients must have the same arrays by "
        "name and shape, and an array of clients and server must have one shape. Look at what the method's "
        "spec changes (blocks, adapter.targets, adapter.lora_rank), and at its arrays_of"
    )


def _without(shapes: Mapping[str, Shape], others: Mapping[str, Shape]) -> dict[str, Shape]:
    return {name: shape for name, shape in shapes.items() if name not in others}


def _layout(shapes: Mapping[str, Shape]) -> Layout:
    names = tuple(sorted(shapes))
    return Layout(names, tuple(shapes[name] for name in names))


def _sent(link: ClientLink, own: Arrays, shapes: Mapping[str, Shape], sends: bool) -> Arrays:
    """Return the arrays that only one role has, as its first participant sends them. Collective over all
    ranks.

    Args:
        shapes: of these arrays. sends: whether this rank is of that role.
    """
    if not shapes:
        return {}
    layout = _layout(shapes)
    vector = layout.flatten(own) if sends else np.zeros(layout.size, np.float32)
    received = link.share(vector, float(sends))
    assert received is not None, "a participant of that role has announced these arrays"
    return layout.unflatten(received)


def _header(text: bytes) -> np.ndarray:
    """Return a text's length and digest: [40] uint8."""
    length = np.frombuffer(np.int64(len(text)).tobytes(), np.uint8)
    return np.concatenate([length, np.frombuffer(hashlib.sha256(text).digest(), np.uint8)])
