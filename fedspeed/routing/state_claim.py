"""What members sign of a run's state after a round: digests, sizes, and the numbers that go with them."""

import math
import struct
from dataclasses import dataclass
from itertools import chain

SHA256 = 32  # bytes
NO_BEST = -1  # stands for the best round where nothing has been evaluated
_FORMAT = struct.Struct(">32s q IQ32s q d IQ32s q ? d")
MAX_ROUND = 1 << 40


@dataclass(frozen=True)
class TensorsDigest:
    """Describe tensors: their digest, and the size of a message that carries them.

    Attributes:
        text_bytes: length of the text that names folded arrays.
        values: number of float32 values of all tensors.
        sha256: over names, shapes and values of all tensors.
    """

    text_bytes: int
    values: int
    sha256: bytes

    @property
    def message_bytes(self) -> int:
        """The size of a message that carries the tensors."""
        return self.text_bytes + 4 * self.values


NO_TENSORS = TensorsDigest(0, 0, bytes(SHA256))


@dataclass(frozen=True, kw_only=True)
class StateClaim:
    """Describe the state of a run after a round.

    Attributes:
        run: digest of the session in which the run began, which tells it from other runs of equal settings.
        round: its number. state: of the tensors that the journal stores.
        best_round: the round with the lowest held-out loss, NO_BEST where nothing has been evaluated.
        best_loss: of that round, 0 without one. best: of its global tensors.
        stale: evaluations since the best one.
        alignment: of the updates in this round, under staleness (`Progress.update_alignment`).
    """

    run: bytes
    round: int
    state: TensorsDigest
    best_round: int = NO_BEST
    best_loss: float = 0.0
    best: TensorsDigest = NO_TENSORS
    stale: int = 0
    alignment: float | None = None

    BYTES = _FORMAT.size

    @property
    def has_best(self) -> bool:
        """Whether any round, or the start, has been evaluated."""
        return self.best_round != NO_BEST

    def pack(self) -> bytes:
        """Return the claim as BYTES bytes, the same for equal claims."""
        values = (
            (self.run, self.round),
            _fields(self.state),
            (self.best_round, self.best_loss),
            _fields(self.best),
            (self.stale, self.alignment is not None, self.alignment or 0.0),
        )
        return _FORMAT.pack(*chain(*values))

    @classmethod
    def unpack(cls, packed: bytes) -> "StateClaim":
        """Return the claim of `pack`.

        Raises:
            ValueError: it is none.
        """
        if len(packed) != cls.BYTES:
            raise ValueError(f"{len(packed)} bytes where a state has {cls.BYTES}")
        fields = _FORMAT.unpack(packed)
        best_round, best_loss = fields[5:7]
        stale, has_alignment, alignment = fields[10:]
        claim = cls(
            run=fields[0],
            round=fields[1],
            state=TensorsDigest(*fields[2:5]),
            best_round=best_round,
            best_loss=best_loss,
            best=TensorsDigest(*fields[7:10]),
            stale=stale,
            alignment=alignment if has_alignment else None,
        )
        is_possible = (
            0 <= claim.round <= MAX_ROUND and NO_BEST <= best_round <= claim.round and 0 <= stale <= MAX_ROUND
        )
        if not is_possible or not (math.isfinite(best_loss) and math.isfinite(alignment)):
            raise ValueError(
                f"impossible numbers: round {claim.round}, best round {best_round} with a loss of "
                f"{best_loss:g}, {stale} evaluations since, alignment {alignment:g}"
            )
        return claim

    def describe(self) -> str:
        """Return the claim as a few words for messages."""
        return f"round {self.round} ({self.state.sha256.hex()[:12]})"

    def describe_numbers(self) -> str:
        """Return the claim with all that is signed of it, for messages."""
        best = f"best round {self.best_round} with a loss of {self.best_loss}" if self.has_best else "no best"
        return f"{self.describe()}, {best}, {self.stale} evaluations since, alignment {self.alignment}"


def _fields(tensors: TensorsDigest) -> tuple[int, int, bytes]:
    return tensors.text_bytes, tensors.values, tensors.sha256
