"""Pieces of tokens, each of which goes through the model at once: prompts, and then what follows them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fedspeed.engine.generation.batches import right_aligned
from fedspeed.engine.generation.cache import NOTHING, Segment, View
from fedspeed.engine.generation.sampling import Draw, Sampling

Reader = Callable[[torch.Tensor, slice], torch.Tensor]


@dataclass(frozen=True, eq=False)
class Piece:
    """Tokens of some rows, with all that the model must be told about them.

    Attributes:
        tokens, positions: [rows, T] int64; tokens stand on the right, positions are those in their sequences,
            0 where no token is.
        view: what they see, and where their keys and values go.
        wanted: (row, column) of the tokens whose logits are read, [k] int64 each. A token may come several
            times.
        read: makes a value of each wanted token's logits. It gets some of them, [c, vocabulary] fp32, and
            which they are.
        whole: whether a value is a token (int64), and not a log-probability (fp32).
    """

    tokens: np.ndarray
    positions: np.ndarray
    view: View
    wanted: tuple[np.ndarray, np.ndarray]
    read: Reader
    whole: bool

    @property
    def count(self) -> int:
        """How many values it gives."""
        return len(self.wanted[0])


@dataclass(frozen=True)
class Choose:
    """Read logits by choosing a token for each of them."""

    sampling: Sampling
    draws: Sequence[Draw]

    def __call__(self, logits: torch.Tensor, part: slice) -> torch.Tensor:
        return self.sampling.choose(logits, self.draws[part])


@dataclass(frozen=True)
class LogProbability:
    """Read logits by taking the log-probability of one token of each. targets: [k] int64."""

    targets: np.ndarray

    def __call__(self, logits: torch.Tensor, part: slice) -> torch.Tensor:
        targets = torch.from_numpy(self.targets[part]).to(logits.device).unsqueeze(-1)
        return logits.gather(-1, targets).squeeze(-1) - logits.logsumexp(-1)


def read_in_parts(piece: Piece, logits_of: Callable[[slice], torch.Tensor], rows: int) -> torch.Tensor:
    """Read the logits of a piece, at most `rows` of them at a time; returns its values [k].

    Args:
        logits_of: gives those of some wanted tokens, [c, vocabulary].
    """
    parts = [slice(start, start + rows) for start in range(0, piece.count, rows)]
    return torch.cat([piece.read(logits_of(part).float(), part) for part in parts])


class Group:
    """Contexts that are computed together, and the rows that follow them, each behind one of the contexts.

    Args:
        contexts: their tokens, [t] int64 each, without what `prefix` holds. prefix: keys and values that all
            of them begin with, None if there are none.
    """

    def __init__(self, contexts: Sequence[np.ndarray], prefix: Segment | None):
        self._contexts = contexts
        self._prefix = prefix
        self._before = 0 if prefix is None else prefix.positions.shape[1]
        self._tail = Segment(len(contexts))
        self._own: Segment | None = None
        self._kept: np.ndarray | None = None  # rows that go on, where others were let go since the last piece

    def begin(self, rows: np.ndarray, read: Reader, whole: bool) -> Piece:
        """Make the piece of the contexts. rows: which contexts' last tokens are read, [k] int64."""
        tokens, real = right_aligned(self._contexts)
        positions = _positions(real, np.full(len(tokens), self._before))
        view = View(self._shared(len(tokens)), self._tail, positions)
        columns = np.full(len(rows), tokens.shape[1] - 1)
        return Piece(tokens, np.maximum(positions, 0), view, wanted=(rows, columns), read=read, whole=whole)

    def follow(self, behind: np.ndarray, tokens: Sequence[np.ndarray], read: Reader, whole: bool) -> Piece:
        """Make the piece of what follows in each row, all of whose tokens are read.

        Args:
            behind: the context of each row, [rows] int64, the same as in the last call but for rows that were
                let go.
            tokens: [t] int64 of each row.
        """
        together, real = right_aligned(tokens)
        kept = self._kept
        self._kept = None
        if self._own is None:
            self._own = Segment(len(tokens))
            kept = None
        lengths = np.array([len(context) for context in self._contexts])[behind]
        own = self._own.positions if kept is None else self._own.positions[kept]
        start = self._before + lengths + (own != NOTHING).sum(1)
        positions = _positions(real, start)
        view = View([*self._shared(len(tokens)), (self._tail, behind)], self._own, positions, kept)
        return Piece(
            together, np.maximum(positions, 0), view, wanted=np.nonzero(real), read=read, whole=whole
        )

    def keep(self, rows: np.ndarray) -> None:
        """Let go of all rows but some, [k] int64, from the next piece on."""
        self._kept = rows if self._kept is None else self._kept[rows]

    def _shared(self, rows: int) -> list[tuple[Segment, np.ndarray]]:
        return [] if self._prefix is None else [(self._prefix, np.zeros(rows, dtype=np.int64))]


def prefix_piece(tokens: np.ndarray) -> tuple[Segment, Piece]:
    """Make the piece of what all contexts begin with, [t] int64, of which nothing is read; and where its keys
    will be.
    """
    segment = Segment(1)
    positions = np.arange(len(tokens))[None]
    none = np.zeros(0, dtype=np.int64)
    view = View([], segment, positions)
    return segment, Piece(
        tokens[None].astype(np.int64), positions, view, wanted=(none, none), read=unread, whole=True
    )


def unread(logits: torch.Tensor, part: slice) -> torch.Tensor:
    """Stand for the reader of a piece of which nothing is read."""
    raise AssertionError("nothing of this piece is read here")


def _positions(real: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Positions [rows, T] of tokens on the right, from start [rows] on; NOTHING where there is none."""
    return np.where(real, start[:, None] + np.cumsum(real, axis=1) - 1, NOTHING)
