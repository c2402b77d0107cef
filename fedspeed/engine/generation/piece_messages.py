"""Describe pieces to the other ranks of a cluster's pipeline: where tokens stand and what they attend to, but
no token.

Each rank stores keys and values of its own blocks for the rows of all clients. So it follows, by numbers,
which of its own segments stand for those of a row's owner.
"""

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fedspeed.engine.generation.cache import Segment, View
from fedspeed.engine.generation.pieces import Piece, unread_piece

Integers = tuple[int, ...]


@dataclass(frozen=True)
class PieceMessage:
    """A piece without its tokens.

    Attributes:
        into: number of the segment that it is added to. kept: rows of it that go on; None: all.
        before: (number of a segment that is attended to, the row of it that belongs to each row).
        width: new slots of a row. positions: of all new slots, row by row.
    """

    into: int
    kept: Integers | None
    before: tuple[tuple[int, Integers], ...]
    width: int
    positions: Integers

    @classmethod
    def of(cls, piece: Piece) -> "PieceMessage":
        """Describe a piece."""
        view = piece.view
        before = tuple((segment.number, tuple(rows.tolist())) for segment, rows in view.before)
        kept = None if view.kept is None else tuple(view.kept.tolist())
        positions = view.positions
        return cls(
            view.into.number,
            kept,
            before,
            positions.shape[1],
            positions=tuple(positions.reshape(-1).tolist()),
        )

    def integers(self) -> list[int]:
        """Encode the message for `read`."""
        kept = [-1] if self.kept is None else [len(self.kept), *self.kept]
        before = [value for number, rows in self.before for value in (number, len(rows), *rows)]
        return [self.into, *kept, len(self.before), *before, self.width, len(self.positions), *self.positions]

    @classmethod
    def read(cls, integers: Iterator[int], into: int) -> "PieceMessage":
        """Decode what `integers` returns, whose first integer has been read as `into`."""

        def take(count: int) -> Integers:
            return tuple(next(integers) for _ in range(count))

        count = next(integers)
        kept = None if count < 0 else take(count)
        before = []
        for _ in range(next(integers)):
            number = next(integers)
            before.append((number, take(next(integers))))
        width = next(integers)
        return cls(into, kept, tuple(before), width, positions=take(next(integers)))


class PieceSender:
    """Encodes this rank's pieces of each pass, and which of its segments are gone since the last pass."""

    def __init__(self) -> None:
        self._alive: dict[int, weakref.ref] = {}

    def integers(self, pieces: Sequence[Piece]) -> list[int]:
        """Encode this rank's pieces for `PieceReceiver.pieces`."""
        gone = [number for number, segment in self._alive.items() if segment() is None]
        for number in gone:
            del self._alive[number]
        self._alive |= {piece.view.into.number: weakref.ref(piece.view.into) for piece in pieces}
        return [len(gone), *gone, *(value for piece in pieces for value in PieceMessage.of(piece).integers())]


class PieceReceiver:
    """Follows the pieces of one other rank, with segments of this rank that stand for the other's."""

    def __init__(self) -> None:
        self._segments: dict[int, Segment] = {}

    def pieces(self, integers: Sequence[int]) -> list[Piece]:
        """Decode what `PieceSender.integers` returned: pieces without tokens, whose input comes from other
        ranks.
        """
        rest = iter(integers)
        for _ in range(next(rest)):
            self._segments.pop(next(rest), None)
        return [self._piece(PieceMessage.read(rest, into)) for into in rest]

    def _piece(self, message: PieceMessage) -> Piece:
        positions = np.array(message.positions, dtype=np.int64).reshape(-1, message.width)
        into = self._segments.setdefault(message.into, Segment(len(positions)))
        before = [(self._segments[number], np.array(rows, dtype=np.int64)) for number, rows in message.before]
        kept = None if message.kept is None else np.array(message.kept, dtype=np.int64)
        view = View(before, into, positions, kept)
        return unread_piece(np.zeros_like(positions), np.maximum(positions, 0), view)
