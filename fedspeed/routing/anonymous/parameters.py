"""The public parameters of an attempt, which all its members agree on beforehand."""

from dataclasses import dataclass

from fedspeed.routing.anonymous.crypto import digest


@dataclass(frozen=True)
class PublicParameters:
    """What the members of an attempt agree on beforehand. Where they do not, the signatures of the first
    phase fail, since everything that is signed or derived is bound to `context`.

    Attributes:
        members: identity keys (Ed25519, 32 bytes) in the order of the roster.
        length: how many 32-bit integers each member adds to the sum.
        settings: digest of everything that must be equal on all sites: roster, base, tokenizer, run.
        attempt: its number in the run, the retries of an exchange counted too.
        masked: whether integers are masked. If not, the owner of a chunk sees each member's integers, without
            its name.
        relays: relays on the path of a cell. 0: cells go straight to the owner, who sees whose they are.
        chunk_length: upper bound of the integers in a chunk.
        cipher: a name of `crypto.CIPHERS`.
        threshold: the fewest members that must be left: more than half, so that no two groups that cannot
            hear each other both go on.
        subject: digest of what is summed. It is compared after the first phase, with a message of its own,
            and not part of the context.
    """

    members: tuple[bytes, ...]
    length: int
    settings: bytes
    attempt: int = 0
    masked: bool = True
    relays: int = 2
    chunk_length: int = 1 << 18
    cipher: str = "aes-128-gcm"
    threshold: int = 2
    subject: bytes = bytes(32)

    @property
    def context(self) -> bytes:
        """The digest of all parameters: the context of every signature and key until the beacon is known."""
        parts = (
            self.length,
            self.attempt,
            self.masked,
            self.relays,
            self.chunk_length,
            self.cipher,
            self.threshold,
        )
        return digest(b"fedspeed sum", self.settings, repr(parts).encode(), *self.members)
