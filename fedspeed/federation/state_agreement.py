"""The check, before the first round, that all participants have the same arrays in the global state, by name
and shape. A method may have its server build another engine than its clients (`Method.spec`), so they could
differ.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

from fedspeed.errors import ConfigError
from fedspeed.federation.arrays import Arrays
from fedspeed.federation.layout import Layout
from fedspeed.federation.link import ClientLink
from fedspeed.text_safety import quoted
from fedspeed.units import shortened_list

MAX_NAMED = 3  # arrays, or participants, that a message names
MAX_TEXT = 1 << 24  # bytes of the names and shapes of a state


def check_arrays(link: ClientLink, state: Arrays, *, method: str, names: Sequence[str]) -> None:
    """Compare the arrays of this rank's first state with those of all participants. Collective over all
    ranks.

    Participants exchange a digest and a length, and the names and shapes only where the digests differ.

    Args:
        method: its name. names: of all participants, for the message.

    Raises:
        ConfigError: the arrays differ; the same message on all ranks.
        LostPeerError: a participant is missing.
    """
    text = "\n".join(array_lines(state)).encode()
    headers = link.gather(_header(text))
    if (headers == headers[0]).all():
        return
    lengths = np.ascontiguousarray(headers[:, :8]).view(np.int64)[:, 0]
    if invalid := [name for name, length in zip(names, lengths, strict=True) if not 0 < length <= MAX_TEXT]:
        raise ConfigError(
            f"{shortened_list(invalid, MAX_NAMED)} announced names of arrays of less than one byte, or of "
            f"more than {MAX_TEXT}; all must run the same version of FedSpeed"
        )
    longest = int(lengths.max())
    texts = link.gather(np.frombuffer(text.ljust(longest, b"\n"), np.uint8).copy())
    lines_of = [row.tobytes().decode(errors="replace").split("\n") for row in texts]
    received = [frozenset(quoted(line) for line in lines if line) for lines in lines_of]
    raise ConfigError(difference(method, names, received))


def array_lines(state: Arrays) -> list[str]:
    """Return a line of text for each array of a state: its name and its shape."""
    layout = Layout.of(state)
    return [f"{name} {list(shape)}" for name, shape in zip(layout.names, layout.shapes, strict=True)]


def difference(method: str, names: Sequence[str], arrays: Sequence[frozenset[str]]) -> str:
    """Return the error message for participants whose states have different arrays.

    Args:
        names: of the participants. arrays: by participant, its `array_lines`.
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
        f"{len(common)} that all have, {'; '.join(differences)}. All roles must have the same arrays by name "
        "and shape; an array that a role does not train is frozen there. Look at what the method's spec "
        "changes by role (blocks, adapter.targets), and at its first_state"
    )


def _header(text: bytes) -> np.ndarray:
    """Return a text's length and digest: [40] uint8."""
    length = np.frombuffer(np.int64(len(text)).tobytes(), np.uint8)
    return np.concatenate([length, np.frombuffer(hashlib.sha256(text).digest(), np.uint8)])
