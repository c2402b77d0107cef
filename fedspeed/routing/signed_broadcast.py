"""Content that one participant sends to all and signs, with a check that it sent the same to everybody."""

from collections.abc import Sequence

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedspeed.routing.anonymous.crypto import AuthenticationError, check_signature, digest
from fedspeed.routing.exchange import Exchange


class SignedBroadcast:
    """Signs what the sender sends, and detects equivocation: other content for some than for others.

    Each participant has one.
    """

    def __init__(
        self,
        exchange: Exchange,
        key: Ed25519PrivateKey,
        members: Sequence[bytes],
        settings: bytes,
        *,
        speaker: int,
        names: Sequence[str],
    ):
        """Describe the participants.

        Args:
            exchange: of this participant. key: its private key.
            members: public keys of all participants, 32 bytes each, in the transport's order.
            settings: digest of what all have in common, so that a signature of another run is not valid here.
            speaker: number of the participant that sends. names: of all participants, for messages.
        """
        self._exchange = exchange
        self._key = key
        self._members = tuple(members)
        self._settings = settings
        self._speaker = speaker
        self._names = tuple(names)

    def sign(self, label: str, content: np.ndarray) -> np.ndarray:
        """Return this participant's signature of content: [64] uint8.

        Args:
            label: what the content is, such as a round's state; never the same twice in a run.
        """
        return np.frombuffer(self._key.sign(self._statement(label, content)), np.uint8).copy()

    def problem(self, label: str, received: np.ndarray, signature: np.ndarray) -> str:
        """Compare what the participants have received, and return what is wrong with it, the same text on all
        of them: empty if all have received the same content, signed by the sender. All participants call it.

        Raises:
            LostPeerError: a participant is missing.
        """
        statement = self._statement(label, received)
        try:
            check_signature(self._members[self._speaker], signature.tobytes(), statement)
            is_signed = True
        except AuthenticationError:
            is_signed = False
        rows = self._exchange.gather(np.frombuffer(statement + bytes([is_signed]), np.uint8).copy())
        of_sender = rows[self._speaker, :-1].tobytes()
        unsigned = [name for name, row in zip(self._names, rows, strict=True) if not row[-1]]
        different = [
            name for name, row in zip(self._names, rows, strict=True) if row[:-1].tobytes() != of_sender
        ]
        faults = []
        if different:
            faults.append(f"{', '.join(different)} received another result than it has itself")
        if unsigned:
            faults.append(f"{', '.join(unsigned)} received one that it has not signed")
        if not faults:
            return ""
        return (
            f"{label}: what {self._names[self._speaker]} sent is not the same for all: {'; '.join(faults)}. "
            "Look into that host; the same command goes on from the last round that is kept"
        )

    def _statement(self, label: str, content: np.ndarray) -> bytes:
        """Return what is signed: a digest of the run, the label and the content."""
        return digest(b"statement", self._settings, label.encode(), content.tobytes())
