"""Describe pieces of tokens, each of which goes through the model at once: prompts, and then what follows
them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fedspeed.engine.generation.batches import right_aligned
from fedspeed.engine.generation.cache import NO_TOKEN, Segment, View
from fedspeed.engine.generation.sampling import Draw, Sampling

Reader = Callable[[torch.Tensor, slice], torch.Tensor]


@dataclass(frozen=True, eq=False)
class Piece:
    """Tokens of some rows that are computed at once.

    Attributes:
        tokens, positions: [rows, T] int64; tokens stand on the right, positions are those in their sequences,
            0 where there is no token.
        view: what the tokens attend to, and where their keys and values go.
        wanted: (row, column) of the tokens whose logits are read, [k] int64 each. A token may come several
            times.
        read: makes a value of each wanted token's logits, from some of these, [c, vocabulary] fp32, and the
            slice of all wanted tokens that they are.
        reads_tokens: whether a value is a token (int64), and not a log-probability (fp32).
    """

    tokens: np.ndarray
    positions: np.ndarray
    view: View
    wanted: tuple[np.ndarray, np.ndarray]
    read: Reader
    reads_tokens: bool

    @property
    def count(self) -> int:
        """Return the number of values that are read."""
        return len(self.wanted[0])


@dataclass(frozen=True)
class Choose:
    """A reader of logits that chooses a token by each of them."""

    sampling: Sampling
    draws: Sequence[Draw]

    def __call__(self, logits: torch.Tensor, part: slice) -> torch.Tensor:
        return self.sampling.choose(logits, self.draws[part])


@dataclass(frozen=True)
class TokenScore:
    """A reader of logits that takes the log-probability of one token of each, and whether that token is the
    most likely one. Both are in one value, since a piece has one value for a token: the sign is positive for
    the most likely token, and negative for any other. `token_scores` separates them.

    Attributes:
        targets: these tokens, [k] int64.
    """

    targets: np.ndarray

    def __call__(self, logits: torch.Tensor, part: slice) -> torch.Tensor:
        targets = torch.from_numpy(self.targets[part]).to(logits.device)
        logprobs = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)
        return torch.where(logits.argmax(-1) == targets, logprobs.abs(), -logprobs.abs())


@dataclass(frozen=True, eq=False)
class TokenScores:
    """The scores of the tokens of a span.

    Attributes:
        logprobs: the log-probability of each token, [t] fp32.
        likeliest: whether it is the most likely token in its place, of equally likely ones the first, [t]
            bool.
    """

    logprobs: np.ndarray
    likeliest: np.ndarray


def token_scores(values: np.ndarray) -> TokenScores:
    """Separate the values that `TokenScore` reads, [t]."""
    return TokenScores(-np.abs(values).astype(np.float32), ~np.signbit(values))


def read_in_parts(piece: Piece, logits_of: Callable[[slice], torch.Tensor], rows: int) -> torch.Tensor:
    """Read the logits of a piece, at most `rows` of them at a time; returns its values [k].

    Args:
        logits_of: computes those of some wanted tokens, [c, vocabulary].
    """
    parts = [slice(start, start + rows) for start in range(0, piece.count, rows)]
    return torch.cat([piece.read(logits_of(part).float(), part) for part in parts])


class Group:
    """Contexts that are computed together, and the rows that follow them, each behind one of the contexts.

    Args:
        contexts: their tokens, [t] int64 each, without the prefix.
        prefix: keys and values that all of them begin with; None if there are none.
    """

    def __init__(self, contexts: Sequence[np.ndarray], prefix: Segment | None):
        self._contexts = contexts
        self._prefix = prefix
        self._before = 0 if prefix is None else prefix.positions.shape[1]
        self._context_segment = Segment(len(contexts))
        self._row_segment: Segment | None = None
        self._kept: np.ndarray | None = (
            None  # rows that go on, where others were dropped since the last piece
        )

    def begin(self, rows: np.ndarray, read: Reader, *, reads_tokens: bool) -> Piece:
        """Make the piece of the contexts.

        Args:
            rows: numbers of the contexts whose last tokens' logits are read, [k] int64.
            read, reads_tokens: see `Piece`.
        """
        tokens, real = right_aligned(self._contexts)
        positions = _positions(real, np.full(len(tokens), self._before))
        view = View(self._shared(len(tokens)), self._context_segment, positions)
        return Piece(
            tokens,
            np.maximum(positions, 0),
            view,
            wanted=(rows, np.full(len(rows), tokens.shape[1] - 1)),
            read=read,
            reads_tokens=reads_tokens,
        )

    def follow(
        self, behind: np.ndarray, tokens: Sequence[np.ndarray], read: Reader, *, reads_tokens: bool
    ) -> Piece:
        """Make the piece of what follows in each row; the logits of all its tokens are read.

        Args:
            behind: the context of each row, [rows] int64, the same as in the last call but for rows that were
                dropped.
            tokens: [t] int64 of each row.
            read, reads_tokens: see `Piece`.
        """
        together, real = right_aligned(tokens)
        kept = self._kept
        self._kept = None
        if self._row_segment is None:
            self._row_segment = Segment(len(tokens))
            kept = None
        lengths = np.array([len(context) for context in self._contexts])[behind]
        before = self._row_segment.positions if kept is None else self._row_segment.positions[kept]
        start = self._before + lengths + (before != NO_TOKEN).sum(1)
        positions = _positions(real, start)
        attended = [*self._shared(len(tokens)), (self._context_segment, behind)]
        rows, columns = np.nonzero(real)
        return Piece(
            together,
            np.maximum(positions, 0),
            View(attended, self._row_segment, positions, kept),
            wanted=(rows, columns),
            read=read,
            reads_tokens=reads_tokens,
        )

    def keep(self, rows: np.ndarray) -> None:
        """Drop all rows but some, [k] int64, from the next piece on."""
        self._kept = rows if self._kept is None else self._kept[rows]

    def _shared(self, rows: int) -> list[tuple[Segment, np.ndarray]]:
        return [] if self._prefix is None else [(self._prefix, np.zeros(rows, dtype=np.int64))]


def prefix_piece(tokens: np.ndarray) -> tuple[Segment, Piece]:
    """Make the piece of the common prefix of all contexts, [t] int64, and the segment for its keys and
    values. No logits of it are read.
    """
    segment = Segment(1)
    positions = np.arange(len(tokens))[None]
    return segment, unread_piece(tokens[None].astype(np.int64), positions, View([], segment, positions))


def unread_piece(tokens: np.ndarray, positions: np.ndarray, view: View) -> Piece:
    """Make a piece without logits to read on this rank. Arguments as for `Piece`."""
    none = np.zeros(0, dtype=np.int64)
    return Piece(tokens, positions, view, wanted=(none, none), read=read_nothing, reads_tokens=True)


def read_nothing(logits: torch.Tensor, part: slice) -> torch.Tensor:
    """Be the reader of a piece without logits to read: it must never be called."""
    raise AssertionError("no logits of this piece are read here")


def _positions(real: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Return the positions of tokens on the right, from start [rows] on; NO_TOKEN elsewhere."""
    return np.where(real, start[:, None] + np.cumsum(real, axis=1) - 1, NO_TOKEN)
