"""Generate answers, and score given ones, as a series of pieces: whoever drives it computes them, under
whatever engine.

Both are generators: they yield the pieces that can be computed now, in any order, get the values of each
    back, and end with
their result. So they know no engine, no ranks and no weights.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np

from fedspeed.engine.generation.batches import Context, Room, common_prefix, cut, parts_of_rows
from fedspeed.engine.generation.cache import Segment
from fedspeed.engine.generation.pieces import Choose, Group, LogProbability, Piece, prefix_piece
from fedspeed.engine.generation.sampling import Draw, Sampling

Work = Generator[list[Piece], list[np.ndarray], list]


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is asked of each prompt.

    Attributes:
        max_new: tokens at most. samples: answers a prompt. stop: tokens that end an answer and are not part
            of it.
        sampling: how tokens are chosen.
    """

    max_new: int
    samples: int
    stop: frozenset[int]
    sampling: Sampling


class Answers:
    """The rows of one group while their answers grow.

    Args:
        rows: of each context of the group, who follows it: (prompt, sample), in the whole call.
    """

    def __init__(self, rows: Sequence[Sequence[tuple[int, int]]], group: Group, wanted: Wanted):
        self._group = group
        self._wanted = wanted
        self._behind = np.repeat(np.arange(len(rows)), [len(some) for some in rows])
        self._who = [who for some in rows for who in some]
        self._last = np.zeros(0, dtype=np.int64)
        self.tokens: dict[tuple[int, int], list[int]] = {who: [] for who in self._who}
        self._position = 0

    @property
    def open(self) -> bool:
        """Whether any row may get another token."""
        return bool(self._who) and self._position < self._wanted.max_new

    def piece(self) -> Piece:
        """Make the piece whose values are each open row's next token."""
        draws = [Draw(*who, self._position) for who in self._who]
        read = Choose(self._wanted.sampling, draws)
        if self._position == 0:
            return self._group.begin(self._behind, read, whole=True)
        return self._group.follow(self._behind, [token[None] for token in self._last], read, whole=True)

    def take(self, chosen: np.ndarray) -> None:
        """Add each open row's next token; rows that have stopped are let go."""
        going = np.array([token not in self._wanted.stop for token in chosen.tolist()])
        for who, token, goes in zip(self._who, chosen.tolist(), going):
            if goes:
                self.tokens[who].append(token)
        self._last = chosen
        self._position = self._position + 1
        if going.all():
            return
        rows = np.nonzero(going)[0]
        self._group.keep(rows)
        self._behind = self._behind[rows]
        self._last = self._last[rows]
        self._who = [self._who[row] for row in rows]


def generated(prompts: Sequence[tuple[int, np.ndarray]], wanted: Wanted, room: Room) -> Work:
    """Generate answers; ends with [(prompt, sample, tokens [t] int64)].

    Args:
        prompts: (number in the whole call, tokens [t] int64) of those that are computed here.
    """
    if not prompts or not wanted.max_new:
        return [
            (number, sample, np.zeros(0, dtype=np.int64))
            for number, _ in prompts
            for sample in range(wanted.samples)
        ]
    prefix, before = yield from _prefix([tokens for _, tokens in prompts])
    jobs = []  # (tokens beyond the prefix, the samples that follow them)
    for number, tokens in prompts:
        one = Context(len(tokens) - before, wanted.samples, wanted.max_new, 1)
        for part in parts_of_rows(one, room, before):
            jobs.append((tokens[before:], [(number, sample) for sample in part]))
    sizes = [Context(len(tokens), len(who), wanted.max_new, 1) for tokens, who in jobs]
    found = []
    for batch in cut(sizes, room, before):
        answers = []
        for group in batch:
            contexts = Group([jobs[i][0] for i in group], prefix)
            answers.append(Answers([jobs[i][1] for i in group], contexts, wanted))
        while going := [one for one in answers if one.open]:
            values = yield [one.piece() for one in going]
            for one, chosen in zip(going, values):
                one.take(chosen)
        for one in answers:
            found += [(*who, np.array(tokens, dtype=np.int64)) for who, tokens in one.tokens.items()]
    return found


def scored(sequences: Sequence[tuple[int, np.ndarray, tuple[int, int]]], room: Room) -> Work:
    """Find the log-probabilities of spans, given all that is before each token; ends with [(sequence, [b - a]
    fp32)].

    What several spans follow is computed once, as is what all sequences begin with.

    Args:
        sequences: (number in the whole call, tokens [t] int64, span (a, b) with 1 <= a < b <= t).
    """
    if not sequences:
        return []
    behind: dict[bytes, list[tuple[int, np.ndarray]]] = {}  # context -> (sequence, tokens of its span)
    for number, tokens, (a, b) in sequences:
        behind.setdefault(tokens[:a].astype(np.int64).tobytes(), []).append((
            number,
            tokens[a:b].astype(np.int64),
        ))
    whole = [np.frombuffer(context, dtype=np.int64) for context in behind]
    prefix, before = yield from _prefix(whole)
    jobs = []  # (tokens beyond the prefix, the spans that follow them)
    for context, spans in zip(whole, behind.values()):
        for part in parts_of_rows(_size(context[before:], spans), room, before):
            jobs.append((context[before:], [spans[i] for i in part]))
    found = []
    for batch in cut([_size(*job) for job in jobs], room, before):
        groups = [Group([jobs[i][0] for i in group], prefix) for group in batch]
        rows = [[(place, *one) for place, i in enumerate(group) for one in jobs[i][1]] for group in batch]
        first = yield [_first(group, own) for group, own in zip(groups, rows)]
        longer = [(group, [row for row in own if len(row[2]) > 1]) for group, own in zip(groups, rows)]
        longer = [(group, own) for group, own in longer if own]
        values = (yield [_rest(group, own) for group, own in longer]) if longer else []
        rest = {}
        for (_, own), given in zip(longer, values):
            ends = np.cumsum([len(span) - 1 for _, _, span in own])[:-1]
            rest |= {number: part for (_, number, _), part in zip(own, np.split(given, ends))}
        for own, given in zip(rows, first):
            for (_, number, _), value in zip(own, given):
                found.append((
                    number,
                    np.concatenate([value[None], rest.get(number, np.zeros(0, dtype=np.float32))]),
                ))
    return found


def _size(context: np.ndarray, spans: Sequence[tuple[int, np.ndarray]]) -> Context:
    """What a context and the spans that follow it take; the last token of a span is not computed."""
    more = max(len(span) - 1 for _, span in spans)
    return Context(len(context), len(spans), more, max(1, more))


def _first(group: Group, rows: list[tuple[int, int, np.ndarray]]) -> Piece:
    """The piece of a group's contexts, which tells the first token of each span."""
    behind = np.array([place for place, _, _ in rows])
    return group.begin(behind, LogProbability(np.array([span[0] for _, _, span in rows])), whole=False)


def _rest(group: Group, rows: list[tuple[int, int, np.ndarray]]) -> Piece:
    """The piece of the spans but for their last tokens, which tells all tokens but their first."""
    targets = np.concatenate([span[1:] for _, _, span in rows])
    behind = np.array([place for place, _, _ in rows])
    return group.follow(behind, [span[:-1] for _, _, span in rows], LogProbability(targets), whole=False)


def _prefix(
    contexts: Sequence[np.ndarray],
) -> Generator[list[Piece], list[np.ndarray], tuple[Segment | None, int]]:
    """Compute what all contexts begin with: (its keys and values, its tokens)."""
    before = common_prefix(contexts)
    if not before or len(contexts) == 1:
        return None, 0
    segment, piece = prefix_piece(contexts[0][:before])
    yield [piece]
    return segment, before
