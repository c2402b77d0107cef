"""Transforms of an update, applied on the client before the update is sent, in the order of
`federation.updates`.

A transform receives the delta that the weighted mean is taken of (already scaled to one number of steps where
clients take different numbers), and returns another delta. The method encodes the result, so anything that it
sends in addition, such as the sketch of the products, is computed from the transformed update.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fedspeed.federation.arrays import Arrays
from fedspeed.federation.methods.turns import Turn
from fedspeed.federation.registry_import import class_in
from fedspeed.federation.updates.config import UPDATES
from fedspeed.monitor.metrics import registry
from fedspeed.monitor.metrics.metric import REVEALABLE, WEIGHTS

if TYPE_CHECKING:  # torch is not imported by modules that only ask what is hidden
    from fedspeed.engine.client_engine import ClientEngine

SEED_BYTES = 32


class UpdateTransform(ABC):
    """One transform of updates; every rank has one instance in a run.

    Attributes:
        hides: what else must be hidden for the transform to be effective, of
            monitor.metrics.metric.REVEALABLE: what would reveal it is neither sent nor shown. By default all
            of it.
    """

    hides: ClassVar[frozenset[str]] = REVEALABLE

    def __init__(self, config: Any):
        """Prepare the transform.

        Args:
            config: its options.
        """
        self.config = config

    @abstractmethod
    def __call__(self, delta: Arrays, weight: float, rng: np.random.Generator) -> tuple[Arrays, float]:
        """Return the (delta, weight) to send for one client in one round.

        Args:
            delta: fp32 arrays of everything that the client sends, by name: those it trains in the round,
                except what the method keeps on the client (Method.unsent), and additional arrays
                (`KIND:NAME`).
            weight: of the client.
            rng: of this client; no other participant may know its draws. All ranks of the client draw the
                same.
        """

    def spent(self) -> dict[str, float]:
        """Return amounts that the transform has accumulated on this rank, by slot of the ledger
        (monitor.metrics.updates); empty if it has none. All slots are there from the start, with 0.

        The increase in a round is reported with that round, as far as the metrics may be shown.
        """
        return {}


class TransformChain:
    """All transforms of a run, applied one after the other.

    Attributes:
        hides: what any of them hides.
    """

    def __init__(self, transforms: Sequence[UpdateTransform], seed: Sequence[int] | None = None):
        """Chain transforms.

        Args:
            seed: of their random draws, see `shared_seed`; each client has a stream of its own. None: a seed
                from the operating system, which no other rank has.
        """
        self._transforms = tuple(transforms)
        self._seed = tuple(os.urandom(SEED_BYTES) if seed is None else seed)
        self._rngs: dict[int, np.random.Generator] = {}  # by client
        self.hides: frozenset[str] = frozenset().union(*(transform.hides for transform in transforms))
        unknown = sorted(self.hides - REVEALABLE)
        assert not unknown, f"a transform hides {unknown}, which is not in monitor.metrics.metric.REVEALABLE"

    def __bool__(self) -> bool:
        """Return whether there is any transform."""
        return bool(self._transforms)

    def __call__(self, turn: Turn, delta: Arrays, weight: float) -> tuple[Arrays, float]:
        """Return the (delta, weight) that a client sends.

        Args:
            delta: what the client would send without transforms, by name. Arrays that are frozen in the turn
                pass unchanged.
        """
        transformed = {name: array for name, array in delta.items() if name not in turn.frozen}
        if turn.client not in self._rngs:
            self._rngs[turn.client] = np.random.default_rng([*self._seed, turn.client])
        for transform in self._transforms:
            transformed, weight = transform(transformed, weight, self._rngs[turn.client])
        return delta | transformed, 1.0 if WEIGHTS in self.hides else weight

    def spent(self) -> dict[str, float]:
        """Return the sums of all transforms' `spent`, by slot."""
        total: dict[str, float] = {}
        for transform in self._transforms:
            for name, amount in transform.spent().items():
                total[name] = total.get(name, 0.0) + amount
        return total


def transform_class(name: str) -> type[UpdateTransform]:
    """Import a transform's module `update`, and return the one transform that it defines."""
    transform = class_in(f"{UPDATES[name]}.update", UpdateTransform)
    assert issubclass(transform, UpdateTransform), "class_in returns a subclass"
    return transform


def hidden_by(configs: Sequence[Any]) -> frozenset[str]:
    """Return what the transforms that a configuration lists hide together, of REVEALABLE."""
    return frozenset().union(*(transform_class(config.name).hides for config in configs))


def shared_seed(engine: "ClientEngine") -> tuple[int, ...]:
    """Return SEED_BYTES random bytes from the gateway's operating system, known only to the ranks of its
    clients. They differ in every call. Collective over the client.
    """
    drawn = np.frombuffer(os.urandom(SEED_BYTES), dtype=np.uint8).copy()
    return tuple(engine.share_from_gateway(drawn).tolist())


def make_transforms(configs: Sequence[Any], seed: Sequence[int] | None = None) -> TransformChain:
    """Build the transforms that a run's configuration lists (`federation.updates`).

    Args:
        seed: see `TransformChain`.

    Raises:
        ValueError: a transform reports amounts that no metric has a slot for.
    """
    transforms = TransformChain([transform_class(config.name)(config) for config in configs], seed)
    unknown = sorted(transforms.spent().keys() - set(registry.slots("rank", sums_only=False)))
    if unknown:
        raise ValueError(
            f"federation.updates: {', '.join(unknown)} is spent, but no metric per rank has such a slot; add "
            "one to monitor/metrics/updates.py"
        )
    return transforms
