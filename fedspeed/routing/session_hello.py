"""The beginning of a session between sites: all agree on a digest that no earlier start can have had.

Each site draws a random nonce and sends it to all, and then everybody's nonces as it has received them. So
every site knows that the list is new, since its own nonce is in it. Under this list all sign a digest of
their settings. The session is a digest of all that, and every later signature is over it: one of an earlier
start is not valid, and no site incriminates itself by a restart.
"""

import secrets
from collections.abc import Sequence

from fedspeed.errors import FedSpeedError
from fedspeed.routing.agreed_broadcast import Group, Verdict, broadcast, raise_verdict
from fedspeed.routing.anonymous.crypto import digest

NONCE = 32  # bytes


def open_session(group: Group, roster: bytes, settings: bytes) -> bytes:
    """Return the digest of a new session, the same on all sites: 32 bytes. Collective.

    Args:
        roster: digest of the roster. settings: digest of what must be equal on all sites.

    Raises:
        FedSpeedError: sites have other settings, or were sent different things; names them.
        LostPeerError: a site is missing.
    """
    nonces = group.send_all(secrets.token_bytes(NONCE), "the nonce of its start")
    lists = group.send_all(b"".join(nonces), "the list of all nonces")
    raise_verdict(group, Verdict(pairs=contradictions(lists, group.me)), "the start of the session")
    context = digest(b"start", roster, *nonces)
    bodies = broadcast(group, context, "the digest of the settings", settings)
    differing = frozenset(i for i, body in enumerate(bodies) if body != settings)
    if differing:
        raise FedSpeedError(
            f"{group.list_names(differing)} signed a digest of other settings than this site "
            f"({settings.hex()[:12]} here), and showed this site the same ones",
            remedy="ask that site; all must run the same version of FedSpeed",
        )
    return digest(b"session", context, *bodies)


def contradictions(lists: Sequence[bytes], me: int) -> frozenset[frozenset[int]]:
    """Return the pairs of sites that contradict each other about a nonce. Pure.

    Args:
        lists: by site, the nonces of all that it has received. me: number of this site.
    """
    own = _nonces(lists[me])
    pairs = set()
    for witness, sent in enumerate(lists):
        for speaker, (theirs, here) in enumerate(zip(_nonces(sent), own, strict=True)):
            if theirs != here:
                pairs.add(frozenset({witness, speaker if speaker != witness else me}))
    return frozenset(pairs)


def _nonces(joined: bytes) -> list[bytes]:
    return [joined[start : start + NONCE] for start in range(0, len(joined), NONCE)]
