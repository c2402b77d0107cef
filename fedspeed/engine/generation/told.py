"""What the ranks of a cluster's pipeline tell each other of pieces: where tokens stand, and what they look
back at; no token.

Each rank keeps keys and values of its own blocks for the rows of all clients. So it follows, by numbers,
which segments of its own stand for those of a row's owner.
"""

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fedspeed.engine.generation.cache import Segment, View
from fedspeed.engine.generation.pieces import Piece, unread

Rows = tuple[int, ...]


@dataclass(frozen=True)
class ToldPiece:
    """A piece without its tokens.

    Attributes:
        into: number of the segment that it is added to. kept: rows of it that go on; None: all.
        before: (number of a segment that is looked back at, its row that each row sees).
        width: new slots of a row. positions: of all new slots, row by row.
    """

    into: int
    kept: Rows | None
    before: tuple[tuple[int, Rows], ...]
    width: int
    positions: Rows

    @classmethod
    def of(cls, piece: Piece) -> "ToldPiece":
        """Make what is told of a piece."""
        view = piece.view
        before = tuple((segment.number, tuple(rows.tolist())) for segment, rows in view.before)
        kept = None if view.kept is None else tuple(view.kept.tolist())
        return cls(
            view.into.number,
            kept,
            before,
            view.positions.shape[1],
            tuple(view.positions.reshape(-1).tolist()),
        )

    def integers(self) -> list[int]:
        """All of it, as `read` takes it."""
        kept = [-1] if self.kept is None else [len(self.kept), *self.kept]
        before = [value for number, rows in self.before for value in (number, len(rows), *rows)]
        return [self.into, *kept, len(self.before), *before, self.width, len(self.positions), *self.positions]

    @classmethod
    def read(cls, integers: Iterator[int], into: int) -> "ToldPiece":
        """Read what `integers` gives, whose first one has been read."""

        def take(count: int) -> Rows:
            return tuple(next(integers) for _ in range(count))

        count = next(integers)
        kept = None if count < 0 else take(count)
        before = []
        for _ in range(next(integers)):
            number = next(integers)
            before.append((number, take(next(integers))))
        width = next(integers)
        return cls(into, kept, tuple(before), width, take(next(integers)))


class Told:
    """The pieces of one pass as a rank tells them, and which of its segments are gone since it told the last
    ones.
    """

    def __init__(self):
        self._alive: dict[int, weakref.ref] = {}

    def integers(self, pieces: Sequence[Piece]) -> list[int]:
        """Give what is told of a rank's own pieces."""
        gone = [number for number, segment in self._alive.items() if segment() is None]
        for number in gone:
            del self._alive[number]
        self._alive |= {piece.view.into.number: weakref.ref(piece.view.into) for piece in pieces}
        return [len(gone), *gone, *(value for piece in pieces for value in ToldPiece.of(piece).integers())]


class Followed:
    """Segments that stand for those of one other rank."""

    def __init__(self):
        self._segments: dict[int, Segment] = {}

    def pieces(self, integers: Sequence[int]) -> list[Piece]:
        """Make pieces of what `Told.integers` gives, to be computed without tokens, from what comes from
        other ranks.
        """
        rest = iter(integers)
        for _ in range(next(rest)):
            self._segments.pop(next(rest), None)
        return [self._followed(ToldPiece.read(rest, into)) for into in rest]

    def _followed(self, told: ToldPiece) -> Piece:
        positions = np.array(told.positions, dtype=np.int64).reshape(-1, told.width)
        into = self._segments.setdefault(told.into, Segment(len(positions)))
        before = [(self._segments[number], np.array(rows, dtype=np.int64)) for number, rows in told.before]
        kept = None if told.kept is None else np.array(told.kept, dtype=np.int64)
        none = np.zeros(0, dtype=np.int64)
        view = View(before, into, positions, kept)
        return Piece(
            np.zeros_like(positions),
            np.maximum(positions, 0),
            view,
            wanted=(none, none),
            read=unread,
            whole=True,
        )
