"""What one participant says to all, signed by it, and held against what all others have heard of it."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fedspeed.routing.anonymous.crypto import Refused, check_signature, digest
from fedspeed.routing.exchange import Exchange


class SignedBroadcast:
    """Signs what the speaker says, and finds out whether it has said the same to all; one a participant.

    Args:
        exchange: of this participant. key: its private key (Ed25519).
        members: public keys of all participants, 32 bytes each, in the transport's order.
        settings: digest of what all have in common, so that nothing of another run passes for this one's.
        speaker: number of the participant that speaks. names: of all participants, for messages.
    """

    def __init__(
        self,
        exchange: Exchange,
        key: Any,
        members: Sequence[bytes],
        settings: bytes,
        *,
        speaker: int,
        names: Sequence[str],
    ):
        self._exchange, self._key, self._members, self._settings = exchange, key, tuple(members), settings
        self._speaker, self._names = speaker, tuple(names)

    def sign(self, about: str, said: np.ndarray) -> np.ndarray:
        """Return this participant's signature of what it says: [64] uint8.

        Args:
            about: what it is about, such as the round: never the same twice in a run.
        """
        return np.frombuffer(self._key.sign(self._statement(about, said)), np.uint8).copy()

    def problem(self, about: str, heard: np.ndarray, signature: np.ndarray) -> str:
        """Return what is wrong with what the participants have heard, the same text on all of them; empty if
        nothing is: each has heard the same, signed by the speaker. Collective over the participants.

        Raises:
            LostPeerError: a participant is missing.
        """
        statement = self._statement(about, heard)
        try:
            check_signature(self._members[self._speaker], signature.tobytes(), statement)
            is_signed = True
        except Refused:
            is_signed = False
        table = self._exchange.gather(np.frombuffer(statement + bytes([is_signed]), np.uint8).copy())
        unsigned = [name for name, row in zip(self._names, table, strict=True) if not row[-1]]
        other = [
            name
            for name, row in zip(self._names, table, strict=True)
            if row[:-1].tobytes() != table[self._speaker, :-1].tobytes()
        ]
        found = []
        if other:
            found.append(f"{', '.join(other)} heard another result than it has itself")
        if unsigned:
            found.append(f"{', '.join(unsigned)} heard one that it has not signed")
        if not found:
            return ""
        told = f"{about}: what {self._names[self._speaker]} told is not the same for all: {'; '.join(found)}"
        return f"{told}. Look into that host; the same command goes on from the last round that is kept"

    def _statement(self, about: str, said: np.ndarray) -> bytes:
        return digest(b"statement", self._settings, about.encode(), said.tobytes())
