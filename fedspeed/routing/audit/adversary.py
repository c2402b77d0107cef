"""An adversary that has exactly the views of a coalition of members, and measures of what it achieves.

A view is what the members of the coalition know after an attempt that was played as always
(`anonymous.lockstep`): as owners the cores of their chunks, as relays the orders in which they have shuffled,
as clients their own cells and the pairwise masks that they share with others. It adds what every member
learns: the secrets of all self masks.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist

import numpy as np
from scipy.stats import rankdata

from fedspeed.routing.anonymous import cells
from fedspeed.routing.anonymous.lockstep import play
from fedspeed.routing.anonymous.phases import AgreedSum
from fedspeed.routing.anonymous.protocol import Member
from fedspeed.routing.audit.linkers import LINKERS, Linker, match


@dataclass(frozen=True)
class Coalition:
    """The numbers of members that collude, by what they reveal to each other. One may be in all sets."""

    owners: frozenset[int]
    relays: frozenset[int] = frozenset()
    clients: frozenset[int] = frozenset()


@dataclass(frozen=True)
class View:
    """The view of one attempt, by chunk that an owner of the coalition has summed. `honest` cells are those
    of members that are not clients of the coalition.

    Attributes:
        cells: [honest, values] float64, the integers in the honest cells, in the order in which they arrived.
        traced: [honest] the member that each came from if the coalition's relays could follow it, else -1.
        truth: [honest] the member that each came from. Only for scoring.
        places: [honest] when each arrived: first, second, ... of all cells of the chunk.
        named: [honest] the member that each seems to be of once the masks that the coalition knows are taken
            off; empty without masks.
    """

    cells: dict[int, np.ndarray]
    traced: dict[int, np.ndarray]
    truth: dict[int, np.ndarray]
    places: dict[int, np.ndarray]
    named: dict[int, np.ndarray] = field(default_factory=dict)


def observe(members: Sequence[Member], coalition: Coalition) -> View:
    """Play an attempt, and return what the coalition has seen of it."""
    results = play(members).results
    assert all(isinstance(result, AgreedSum) for result in results), results
    plan = members[0].plan
    source_of = {sent.serial: i for i, member in enumerate(members) for sent in member.cells_sent}
    view = View({}, {}, {}, {})
    for owner in coalition.owners:
        for chunk in plan.owned(owner):
            cores = cells.empty_cells(plan, plan.relays + 1, len(members))
            members[owner].open_layers(plan.relays, chunk, cores)
            sources = np.array([source_of[cells.serial_of(core)] for core in cores])
            honest = np.array([i not in coalition.clients for i in sources])
            integers = np.stack([cells.integers_of(core) for core in cores])[honest]
            view.cells[chunk] = _as_signed(integers)
            view.truth[chunk] = sources[honest]
            view.traced[chunk] = _traced(members, coalition, chunk)[honest]
            view.places[chunk] = np.flatnonzero(honest)
            if members[0].parameters.masked:
                view.named[chunk] = _named(members, coalition, chunk, integers)
    return view


def _as_signed(integers: np.ndarray) -> np.ndarray:
    return integers.view(np.int32).astype(np.float64)


def _named(members: Sequence[Member], coalition: Coalition, chunk: int, integers: np.ndarray) -> np.ndarray:
    """Return for each honest cell [cells, values] the member whose known masks, taken off, leave the smallest
    integers: those of an update are small, masked ones are uniform.
    """
    honest = [i for i in range(len(members)) if i not in coalition.clients]
    magnitudes = np.empty((len(integers), len(honest)))
    for column, i in enumerate(honest):
        masks = members[i].masks
        assert masks is not None, "only masked cells are named by masks"
        known = np.zeros(integers.shape[1], np.uint32)
        masks.known_to(coalition.clients).apply(chunk, known)
        magnitudes[:, column] = np.abs(_as_signed(integers - known)).mean(1)
    return np.array(honest)[match(-magnitudes)]


def _traced(members: Sequence[Member], coalition: Coalition, chunk: int) -> np.ndarray:
    """Return the sources of a chunk's cells at its owner; -1 unless every relay of the path colludes."""
    plan = members[0].plan
    sources = np.arange(len(members))
    for hop, relay in enumerate(plan.paths[chunk][:-1]):
        if relay not in coalition.relays:
            return np.full(len(members), -1)
        sources = sources[members[relay].orders[hop, chunk]]
    return sources


@dataclass
class Linkage:
    """The results of a linker in games, each on one chunk of two neighbouring rounds.

    Attributes:
        right: how many cells were paired with the same member's. pairs: of how many.
        candidates: cells of each game.
    """

    right: int = 0
    pairs: int = 0
    candidates: list[int] = field(default_factory=list)

    def add(self, right: int, candidates: int) -> None:
        """Count a game."""
        self.right += right
        self.pairs += candidates
        self.candidates.append(candidates)

    @property
    def accuracy(self) -> float:
        """The share of cells that were paired rightly."""
        return self.right / self.pairs

    @property
    def advantage(self) -> float:
        """(accuracy - chance) / (1 - chance); a random bijection has one fixed point on average."""
        chance = len(self.candidates) / self.pairs
        return (self.accuracy - chance) / (1 - chance)

    def upper(self, tried: int, confidence: float = 0.95) -> float:
        """Return the upper bound of the advantage, corrected for how many linkers were tried (Bonferroni).

        The number of fixed points of a random bijection has variance 1.
        """
        chance = len(self.candidates) / self.pairs
        games = len(self.candidates)
        error = math.sqrt(games) / self.pairs / (1 - chance)
        return min(1.0, self.advantage + NormalDist().inv_cdf(1 - (1 - confidence) / tried) * error)


def link(views: Sequence[View], seed: int = 0, linkers: Mapping[str, Linker] = LINKERS) -> dict[str, Linkage]:
    """Return the results of all linkers: a game on each two neighbouring rounds, on one chunk that the
    coalition has seen in both.
    """
    random = np.random.default_rng(seed)
    linkages = {name: Linkage() for name in linkers}
    for before, after in zip(views, views[1:]):
        shared = sorted(before.cells.keys() & after.cells.keys())
        if not shared:
            continue
        chunk = shared[random.integers(len(shared))]
        order = random.permutation(len(after.truth[chunk]))
        a = before.cells[chunk]
        b = after.cells[chunk][order]
        truth = after.truth[chunk][order]
        for name, linker in linkers.items():
            paired = linker(a, b, random)
            linkages[name].add(int((truth[paired] == before.truth[chunk]).sum()), len(a))
    return linkages


def traced_share(views: Sequence[View]) -> float:
    """Return the share of cells that the coalition's relays could follow all the way from their source."""
    traced = [view.traced[chunk] >= 0 for view in views for chunk in view.traced]
    return float(np.concatenate(traced).mean()) if traced else 0.0


def named_share(views: Sequence[View]) -> tuple[float, float]:
    """Return (share of cells that the coalition's masks attribute rightly, share by chance); zeros without
    masks.
    """
    right = [view.named[chunk] == view.truth[chunk] for view in views for chunk in view.named]
    if not right:
        return 0.0, 0.0
    return float(np.concatenate(right).mean()), len(right) / sum(map(len, right))


def timing_auc(views: Sequence[View]) -> float:
    """Return how well the order in which cells arrive predicts the order in which they were sent: the area
    under the ROC curve, 0.5 being chance.

    It is the probability that a cell's place is nearer to its own source's place in the sending order than to
    another source's. Members send in the order of their numbers here. Since a relay waits for all cells of a
    chunk, the order is all that timing can pass on.
    """
    own = []
    others = []
    for view in views:
        for chunk, places in view.places.items():
            distance = np.abs(places[:, None] - view.truth[chunk][None])
            is_own = np.eye(len(places), dtype=bool)
            own.append(distance[is_own])
            others.append(distance[~is_own])
    near = np.concatenate(own)
    far = np.concatenate(others)
    ranks = rankdata(np.concatenate([near, far]))
    below = ranks[: len(near)].sum() - len(near) * (len(near) + 1) / 2
    return float(1 - below / (len(near) * len(far)))


def compromised(members: int, corrupt: int, relays: int) -> float:
    """Return the probability that all relays of a path are corrupt: C(f, L) / C(n, L)."""
    return math.comb(corrupt, relays) / math.comb(members, relays) if relays else 1.0
