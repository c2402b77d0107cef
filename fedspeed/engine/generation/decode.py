"""Generate answers, and score given ones, as a series of pieces that any engine can compute.

Both are generators: they yield the pieces that can be computed now, in any order, are sent the values of
each, and return their result. So they depend on no engine, no ranks and no weights.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import numpy as np

from fedspeed import activity
from fedspeed.engine.generation.batches import (
    BatchLimits,
    Context,
    common_prefix,
    divide_contexts,
    divide_rows,
)
from fedspeed.engine.generation.cache import Segment
from fedspeed.engine.generation.pieces import Choose, Group, Piece, TokenScore, prefix_piece
from fedspeed.engine.generation.sampling import Draw, Sampling

# Yields pieces, is sent their values, and returns a list.
PieceSeries = Generator[list[Piece], list[np.ndarray], list]
Row = tuple[int, int]  # an answer: (prompt, sample), both counted over the whole call


@dataclass(frozen=True)
class Span:
    """Tokens to score, [t] int64, of the sequence with this number in the whole call.

    Attributes:
        context: number of its context in a group.
    """

    context: int
    sequence: int
    tokens: np.ndarray


@dataclass(frozen=True, kw_only=True)
class AnswerSettings:
    """What is asked of each prompt.

    Attributes:
        max_new: tokens of an answer at most. samples: answers a prompt.
        stop: tokens that end an answer and are not part of it.
        sampling: how tokens are chosen.
        is_done: called with an answer's tokens after each new one; True ends the answer, which keeps them.
        progress: units of the current activity that an answer counts as.
    """

    max_new: int
    samples: int
    stop: frozenset[int]
    sampling: Sampling
    is_done: Callable[[Sequence[int]], bool] | None = None
    progress: float = 0.0


class GroupAnswers:
    """The answers of one group while they grow.

    Args:
        rows: of each context of the group, the answers that follow it.
    """

    def __init__(self, rows: Sequence[Sequence[Row]], group: Group, settings: AnswerSettings):
        self._group = group
        self._settings = settings
        self._behind = np.repeat(np.arange(len(rows)), [len(some) for some in rows])
        self._open_rows = [row for some in rows for row in some]
        self._last = np.zeros(0, dtype=np.int64)
        self.tokens: dict[Row, list[int]] = {row: [] for row in self._open_rows}
        self._position = 0

    @property
    def open(self) -> bool:
        """Whether any row may get another token."""
        return bool(self._open_rows) and self._position < self._settings.max_new

    def piece(self) -> Piece:
        """Make the piece whose values are each open row's next token."""
        draws = [Draw(prompt, sample, self._position) for prompt, sample in self._open_rows]
        read = Choose(self._settings.sampling, draws)
        if self._position == 0:
            return self._group.begin(self._behind, read, reads_tokens=True)
        last = list(self._last.reshape(-1, 1))
        return self._group.follow(self._behind, last, read, reads_tokens=True)

    def add(self, chosen: np.ndarray) -> None:
        """Add each open row's next token, [open rows] int64; rows that have stopped are dropped."""
        going = np.array([self._goes_on(row, token) for row, token in zip(self._open_rows, chosen.tolist())])
        self._last = chosen
        self._position = self._position + 1
        self._advance(going)
        if going.all():
            return
        rows = np.nonzero(going)[0]
        self._group.keep(rows)
        self._behind = self._behind[rows]
        self._last = self._last[rows]
        self._open_rows = [self._open_rows[row] for row in rows]

    def _advance(self, going: np.ndarray) -> None:
        """Count a token of each open row as progress, and of rows that have stopped the tokens that are not
        needed.

        Args:
            going: whether each row goes on: [open rows] bool.
        """
        unused = self._settings.max_new - self._position
        tokens = len(going) + unused * int((~going).sum())
        activity.advance(self._settings.progress * tokens / self._settings.max_new)

    def _goes_on(self, row: Row, token: int) -> bool:
        """Add a token to an answer unless it is a stop token; returns whether the answer goes on."""
        if token in self._settings.stop:
            return False
        tokens = self.tokens[row]
        tokens.append(token)
        return self._settings.is_done is None or not self._settings.is_done(tokens)


def generate_answers(
    prompts: Sequence[tuple[int, np.ndarray]], settings: AnswerSettings, limits: BatchLimits
) -> PieceSeries:
    """Generate answers; returns [(prompt, sample, tokens [t] int64)].

    Args:
        prompts: (number in the whole call, tokens [t] int64) of those that are computed here.
    """
    if not prompts or not settings.max_new:
        return [
            (number, sample, np.zeros(0, dtype=np.int64))
            for number, _ in prompts
            for sample in range(settings.samples)
        ]
    prefix, before = yield from _prefix([tokens for _, tokens in prompts])
    jobs = []  # (tokens of a context without the prefix, the rows that follow it)
    for number, tokens in prompts:
        context = Context(len(tokens) - before, settings.samples, settings.max_new, 1)
        for part in divide_rows(context, limits, before):
            jobs.append((tokens[before:], [(number, sample) for sample in part]))
    sizes = [Context(len(tokens), len(rows), settings.max_new, 1) for tokens, rows in jobs]
    answers = []
    for batch in divide_contexts(sizes, limits, before):
        groups = []
        for numbers in batch:
            contexts = Group([jobs[i][0] for i in numbers], prefix)
            groups.append(GroupAnswers([jobs[i][1] for i in numbers], contexts, settings))
        while going := [group for group in groups if group.open]:
            values = yield [group.piece() for group in going]
            for group, chosen in zip(going, values):
                group.add(chosen)
        for group in groups:
            answers += [(*row, np.array(tokens, dtype=np.int64)) for row, tokens in group.tokens.items()]
    return answers


def score_spans(
    sequences: Sequence[tuple[int, np.ndarray, tuple[int, int]]], limits: BatchLimits, progress: float = 0.0
) -> PieceSeries:
    """Score the tokens of spans, given all that stands before each; returns [(sequence, values [b - a] of
    `TokenScore`)].

    What several spans follow is computed once, as is what all sequences begin with.

    Args:
        sequences: (number in the whole call, tokens [t] int64, span (a, b) with 1 <= a < b <= t).
        progress: units of the current activity that a sequence counts as.
    """
    if not sequences:
        return []
    behind: dict[bytes, list[tuple[int, np.ndarray]]] = {}  # context -> (sequence, tokens of its span)
    for number, tokens, (a, b) in sequences:
        context = tokens[:a].astype(np.int64).tobytes()
        behind.setdefault(context, []).append((number, tokens[a:b].astype(np.int64)))
    contexts = [np.frombuffer(context, dtype=np.int64) for context in behind]
    prefix, before = yield from _prefix(contexts)
    jobs = []  # (tokens of a context without the prefix, the spans that follow it)
    for tokens, spans in zip(contexts, behind.values()):
        for part in divide_rows(_context_of(tokens[before:], spans), limits, before):
            jobs.append((tokens[before:], [spans[i] for i in part]))
    scored = []
    for batch in divide_contexts([_context_of(*job) for job in jobs], limits, before):
        groups = []
        for numbers in batch:
            spans_of_group = [Span(at, *one) for at, i in enumerate(numbers) for one in jobs[i][1]]
            groups.append((Group([jobs[i][0] for i in numbers], prefix), spans_of_group))
        done = yield from _score_batch(groups)
        activity.advance(progress * len(done))
        scored += done
    return scored


def _score_batch(groups: Sequence[tuple[Group, list[Span]]]) -> PieceSeries:
    """Score the spans of some groups; returns [(sequence, values [t] of `TokenScore`)]."""
    first = yield [_contexts_piece(group, spans) for group, spans in groups]
    longer = [(group, [span for span in spans if len(span.tokens) > 1]) for group, spans in groups]
    longer = [(group, spans) for group, spans in longer if spans]
    values = (yield [_spans_piece(group, spans) for group, spans in longer]) if longer else []
    rest: dict[int, np.ndarray] = {}
    for (_, spans), logprobs in zip(longer, values):
        ends = np.cumsum([len(span.tokens) - 1 for span in spans])[:-1]
        rest |= {span.sequence: part for span, part in zip(spans, np.split(logprobs, ends))}
    none = np.zeros(0, dtype=np.float32)
    return [
        (span.sequence, np.concatenate([logprob[None], rest.get(span.sequence, none)]))
        for (_, spans), logprobs in zip(groups, first)
        for span, logprob in zip(spans, logprobs)
    ]


def _context_of(context: np.ndarray, spans: Sequence[tuple[int, np.ndarray]]) -> Context:
    """Return the sizes of a context and the spans that follow it; a span's last token is not computed."""
    more = max(len(tokens) - 1 for _, tokens in spans)
    return Context(len(context), len(spans), more, max(1, more))


def _contexts_piece(group: Group, spans: Sequence[Span]) -> Piece:
    """Make the piece of a group's contexts, which scores the first token of each span."""
    first = np.array([span.tokens[0] for span in spans])
    return group.begin(np.array([span.context for span in spans]), TokenScore(first), reads_tokens=False)


def _spans_piece(group: Group, spans: Sequence[Span]) -> Piece:
    """Make the piece of spans without their last tokens, which scores all their tokens but the first."""
    targets = np.concatenate([span.tokens[1:] for span in spans])
    behind = np.array([span.context for span in spans])
    before_last = [span.tokens[:-1] for span in spans]
    return group.follow(behind, before_last, TokenScore(targets), reads_tokens=False)


def _prefix(
    contexts: Sequence[np.ndarray],
) -> Generator[list[Piece], list[np.ndarray], tuple[Segment | None, int]]:
    """Compute what all contexts begin with; returns (its keys and values, the number of its tokens)."""
    before = common_prefix(contexts)
    if not before or len(contexts) == 1:
        return None, 0
    segment, piece = prefix_piece(contexts[0][:before])
    yield [piece]
    return segment, before
