"""An adversary with exactly the views of a coalition, and how well it links members across rounds, measured.

A view is what members of the coalition hold after an exchange that was played as always
(`anonymous.lockstep`): as owners the contents of their chunks' cells, as relays their permutations, as
clients their own cells and the masks they share with others; and what everybody is told: the secrets of own
masks. It knows nothing else.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist

import numpy as np
from scipy.stats import rankdata

from fedspeed.routing.anonymous import cells
from fedspeed.routing.anonymous.lockstep import play
from fedspeed.routing.anonymous.parameters import Agreed
from fedspeed.routing.anonymous.protocol import Member
from fedspeed.routing.audit.linkers import LINKERS, Linker, match


@dataclass(frozen=True)
class Coalition:
    """Members by number, by what they give away; one may be in all three."""

    owners: frozenset[int]
    relays: frozenset[int] = frozenset()
    clients: frozenset[int] = frozenset()


@dataclass(frozen=True)
class View:
    """Of one exchange.

    Attributes:
        cells: by chunk, [honest cells, words] as they lie at their owner.
        traced: by chunk, the member each of them came from where the coalition could follow it, else -1.
        truth: by chunk, the member each of them came from. Only the referee looks at it.
        places: by chunk, when each of them came: first, second, ... of all that the owner got of this chunk.
        named: by chunk, the member each of them seems to be of once the masks that the coalition knows are
            taken off it; empty without masks.
    """

    cells: dict[int, np.ndarray]
    traced: dict[int, np.ndarray]
    truth: dict[int, np.ndarray]
    places: dict[int, np.ndarray]
    named: dict[int, np.ndarray] = field(default_factory=dict)


def observe(members: Sequence[Member], coalition: Coalition) -> View:
    """Play an exchange and give what the coalition has seen of it."""
    ends = play(members).ends
    assert all(isinstance(end, Agreed) for end in ends), ends
    plan = members[0].plan
    serials = {}
    for i, member in enumerate(members):
        serials.update({sent.serial: i for sent in member._sent})
    contents = {}
    traced = {}
    truth = {}
    places = {}
    named = {}
    for owner in coalition.owners:
        for chunk in plan.owned(owner):
            cores = cells.room(plan, plan.hops + 1, len(members))
            members[owner]._open(plan.hops, chunk, cores)
            whose = np.array([serials[core[: cells.SERIAL].tobytes()] for core in cores])
            known = _followed(members, coalition, chunk)
            honest = np.array([i not in coalition.clients for i in whose])
            words = np.stack([cells.words_of(core) for core in cores])[honest]
            contents[chunk], truth[chunk], traced[chunk], places[chunk] = (
                _signed(words),
                whose[honest],
                known[honest],
                np.flatnonzero(honest),
            )
            if members[0].terms.masked:
                named[chunk] = _named(members, coalition, chunk, words)
    return View(contents, traced, truth, places, named)


def _signed(words: np.ndarray) -> np.ndarray:
    return words.view(np.int32).astype(np.float64)


def _named(members: Sequence[Member], coalition: Coalition, chunk: int, words: np.ndarray) -> np.ndarray:
    """For each of the honest members' cells [cells, words] the member whose known masks, taken off, leave the
    least: an update's words are small, masked ones are anything.
    """
    honest = [i for i in range(len(members)) if i not in coalition.clients]
    left = np.empty((len(words), len(honest)))
    for at, i in enumerate(honest):
        known = members[i]._masks.only_with(coalition.clients)
        mask = np.zeros(words.shape[1], np.uint32)
        known.apply(chunk, mask)
        left[:, at] = np.abs(_signed(words - mask)).mean(1)
    return np.array(honest)[match(-left)]


def _followed(members: Sequence[Member], coalition: Coalition, chunk: int) -> np.ndarray:
    """Sources of a chunk's cells at its owner: known if every relay tells its order, else -1."""
    plan = members[0].plan
    sources = np.arange(len(members))
    for level, relay in enumerate(plan.stations[chunk][:-1]):
        if relay not in coalition.relays:
            return np.full(len(members), -1)
        sources = sources[members[relay]._orders[level, chunk]]
    return sources


@dataclass
class Linkage:
    """Outcomes of the linkage game: of each pair of rounds, how many of how many cells were paired
    rightly.
    """

    right: int = 0
    pairs: int = 0
    candidates: list[int] = field(default_factory=list)

    def add(self, right: int, candidates: int) -> None:
        self.right += right
        self.pairs += candidates
        self.candidates.append(candidates)

    @property
    def accuracy(self) -> float:
        return self.right / self.pairs

    @property
    def advantage(self) -> float:
        """(accuracy - chance) / (1 - chance); a random bijection has one fixed point on average."""
        chance = len(self.candidates) / self.pairs
        return (self.accuracy - chance) / (1 - chance)

    def upper(self, tried: int, confidence: float = 0.95) -> float:
        """Upper bound of the advantage, corrected for the number of attackers tried (Bonferroni). The fixed
        points of random bijections have variance one each game.
        """
        chance = len(self.candidates) / self.pairs
        games = len(self.candidates)
        error = math.sqrt(games) / self.pairs / (1 - chance)
        return min(1.0, self.advantage + NormalDist().inv_cdf(1 - (1 - confidence) / tried) * error)


def link(views: Sequence[View], seed: int = 0, linkers: Mapping[str, Linker] = LINKERS) -> dict[str, Linkage]:
    """All attackers on all neighbouring rounds, on one chunk of each pair that the coalition has seen in
    both.
    """
    random = np.random.default_rng(seed)
    found = {name: Linkage() for name in linkers}
    for before, after in zip(views, views[1:]):
        shared = sorted(before.cells.keys() & after.cells.keys())
        if not shared:
            continue
        chunk = shared[random.integers(len(shared))]
        order = random.permutation(len(after.truth[chunk]))
        a = before.cells[chunk]
        b = after.cells[chunk][order]
        whose_a = before.truth[chunk]
        whose_b = after.truth[chunk][order]
        for name, linker in linkers.items():
            paired = linker(a, b, random)
            found[name].add(int((whose_b[paired] == whose_a).sum()), len(a))
    return found


def traced_share(views: Sequence[View]) -> float:
    """Part of the cells that the coalition could follow all the way from their source."""
    traced = [view.traced[chunk] >= 0 for view in views for chunk in view.traced]
    return float(np.concatenate(traced).mean()) if traced else 0.0


def named_share(views: Sequence[View]) -> tuple[float, float]:
    """(part of the cells whose member is told by the masks that the coalition knows, what chance would give);
    zeros without masks.
    """
    right = [view.named[chunk] == view.truth[chunk] for view in views for chunk in view.named]
    if not right:
        return 0.0, 0.0
    return float(np.concatenate(right).mean()), len(right) / sum(map(len, right))


def timing_auc(views: Sequence[View]) -> float:
    """How well the order in which cells come out tells the order in which they went in: the chance that a
    cell's own source has begun to send at a place nearer to the cell's than another source has (area under
    the ROC curve; 0.5 is chance). Here members begin in the order of their numbers. Since a station waits for
    all cells of a chunk, an order is all that its clock can pass on.
    """
    own = []
    others = []
    for view in views:
        for chunk, places in view.places.items():
            apart = np.abs(places[:, None] - view.truth[chunk][None])
            mine = np.eye(len(places), dtype=bool)
            own.append(apart[mine])
            others.append(apart[~mine])
    near = np.concatenate(own)
    far = np.concatenate(others)
    ranks = rankdata(np.concatenate([near, far]))
    below = ranks[: len(near)].sum() - len(near) * (len(near) + 1) / 2
    return float(1 - below / (len(near) * len(far)))


def compromised(members: int, corrupt: int, hops: int) -> float:
    """Probability that all relays of a path are among the corrupt: C(f, L) / C(n, L)."""
    return math.comb(corrupt, hops) / math.comb(members, hops) if hops else 1.0
