"""What happens to an update before it leaves its client: transforms, applied in the order of
`federation.updates`.

A transform sees the delta that the weighted mean is taken of (already brought to one number of steps where
clients take different numbers), and returns another one. The update is encoded afterwards, so whatever the
method tells beside the delta, such as the sketch of the products, is that of the transformed update.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fedspeed.federation.arrays import Arrays
from fedspeed.federation.methods.base import Turn
from fedspeed.federation.registered import class_in
from fedspeed.federation.updates.config import UPDATES
from fedspeed.monitor.metrics import registry
from fedspeed.monitor.metrics.metric import BESIDE, WEIGHTS

if TYPE_CHECKING:  # torch stays away from whoever only asks what is hidden
    from fedspeed.engine.client_engine import ClientEngine

SEED_BYTES = 32


class Update(ABC):
    """One transform; one instance a run and rank.

    Attributes:
        hides: what else must be hidden for the transform to mean anything, of monitor.metrics.metric.BESIDE:
            what reveals it is then sent and shown by nobody. All of it, unless a transform says that it may
            be told.
    """

    hides: ClassVar[frozenset[str]] = BESIDE

    def __init__(self, config: Any):
        """Prepare the transform: `config` is its variant of the configuration."""
        self.config = config

    @abstractmethod
    def __call__(self, delta: Arrays, weight: float, rng: np.random.Generator) -> tuple[Arrays, float]:
        """Return (delta, weight) of one client in one round as they are to be told.

        Args:
            delta: fp32 arrays of all that the client sends, by name: what trains in the round, less what the
                method keeps on the client (Method.unsent), and what it tells beside (`KIND:NAME`). weight:
                what the client counts.
            rng: of this client alone; nobody else may know what it draws. All ranks of the client draw the
                same.
        """

    def spent(self) -> dict[str, float]:
        """Return what the transform has spent, or done, on this rank so far: amounts that add up, by the slot
        of the ledger (monitor.metrics.updates). All slots are there from the start, with 0; empty if it has
        none.

        What a round has added to them is told in that round, as far as their metrics may be shown.
        """
        return {}


class Updates:
    """All transforms of a run, one after the other.

    Attributes:
        hides: what any of them hides.
    """

    def __init__(self, updates: Sequence[Update], seed: Sequence[int] | None = None):
        """Put transforms behind each other.

        Args:
            seed: of what they draw, for each client something else; see `shared_seed`. None: one that the
                system draws, which no other rank has.
        """
        self._updates = tuple(updates)
        self._seed = tuple(os.urandom(SEED_BYTES) if seed is None else seed)
        self._rngs: dict[int, np.random.Generator] = {}  # by client
        self.hides = frozenset().union(*(update.hides for update in updates))
        assert self.hides <= BESIDE, f"a transform hides {sorted(self.hides - BESIDE)}, which nobody tells"

    def __bool__(self) -> bool:
        """Say whether there is any transform."""
        return bool(self._updates)

    def __call__(self, turn: Turn, delta: Arrays, weight: float) -> tuple[Arrays, float]:
        """Return a client's (delta, weight) as they are to be told.

        Args:
            delta: of what the client sends, by name. What is frozen in the turn is passed on as it is.
        """
        told = {name: array for name, array in delta.items() if name not in turn.frozen}
        if turn.client not in self._rngs:
            self._rngs[turn.client] = np.random.default_rng([*self._seed, turn.client])
        for update in self._updates:
            told, weight = update(told, weight, self._rngs[turn.client])
        return delta | told, 1.0 if WEIGHTS in self.hides else weight

    def spent(self) -> dict[str, float]:
        """Return what all transforms have spent together, by slot."""
        total: dict[str, float] = {}
        for update in self._updates:
            for name, amount in update.spent().items():
                total[name] = total.get(name, 0.0) + amount
        return total


def update_class(name: str) -> type[Update]:
    """Import a transform; its module `update` defines one class of that kind."""
    return class_in(f"{UPDATES[name]}.update", Update)


def hidden_by(configs: Sequence[Any]) -> frozenset[str]:
    """Return what the transforms that a configuration lists hide together, of BESIDE."""
    return frozenset().union(*(update_class(config.name).hides for config in configs))


def shared_seed(engine: "ClientEngine") -> tuple[int, ...]:
    """Return SEED_BYTES random bytes that the gateway's operating system has drawn, known to the ranks of its
    clients and to nobody else, and not to be repeated. Collective over the client.
    """
    drawn = np.frombuffer(os.urandom(SEED_BYTES), dtype=np.uint8).copy()
    return tuple(engine.share_from_gateway(drawn).tolist())


def make_updates(configs: Sequence[Any], seed: Sequence[int] | None = None) -> Updates:
    """Build the transforms that a run's configuration lists (`federation.updates`).

    Args:
        seed: see `Updates`.

    Raises:
        ValueError: one tells amounts that no metric is made of.
    """
    updates = Updates([update_class(config.name)(config) for config in configs], seed)
    if unknown := sorted(updates.spent().keys() - set(registry.slots("rank", sums_only=False))):
        raise ValueError(
            f"federation.updates: {', '.join(unknown)} is spent, but no metric per rank has such a slot; add "
            "one to monitor/metrics/updates.py"
        )
    return updates
