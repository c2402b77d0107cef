"""What the turns of one rank's clients bring to one exchange."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from fedspeed.federation.arrays import Arrays, are_finite, square_norm
from fedspeed.federation.methods.base import Method, Trained, Turn
from fedspeed.federation.overlap import deltas_from

MAX_SQUARE = 1e12  # that a client's delta counts for: sums of the masked modes have a range
Transform = Callable[[Turn, Arrays, float], tuple[Arrays, float]]  # of a turn's delta and its weight


@dataclass
class Contribution:
    """The summed vector of a rank's clients, and what goes with it.

    Attributes:
        vector: [values] float32. weight: of the clients in it, together.
        weighted_steps: their weights times the steps that they took.
        deltas: by client, what each has changed; only where it differs from what was trained, or is needed
            again (under staleness).
        squares: of what each sends of these, times the client's weight.
    """

    vector: np.ndarray
    weight: float = 0.0
    weighted_steps: float = 0.0
    deltas: dict[int, Arrays] = field(default_factory=dict)
    squares: dict[int, float] = field(default_factory=dict)

    @classmethod
    def empty(cls, values: int) -> "Contribution":
        """Return what a rank without clients brings."""
        return cls(np.zeros(values, dtype=np.float32))

    def add(
        self,
        method: Method,
        turn: Turn,
        trained: Trained,
        *,
        start: Arrays,
        weight: float,
        factor: float | None = None,
        transform: Transform | None = None,
    ) -> None:
        """Add what a client sends for a turn.

        Args:
            start: the common state that the update counts from; the turn may have begun elsewhere.
            weight: of the client.
            factor: what its delta is multiplied by, and then kept; None: it is sent as it is.
            transform: what is done to its delta before it leaves: to what of it leaves (Method.unsent).
        """
        end = trained.end
        steps = trained.sums.steps
        if factor is not None or transform is not None:
            delta = deltas_from(turn.start, end, 1.0 if factor is None else factor)
            unsent = method.unsent(turn.round)
            sent = {name: change for name, change in delta.items() if name not in unsent}
            if transform is not None:
                sent, weight = transform(turn, sent, weight)
            end = end | shifted(start, sent)
            self.deltas[turn.client] = delta | sent
            self.squares[turn.client] = weight * min(square_norm(sent), MAX_SQUARE)
        told = method.encode(turn.starting_at(start), end, weight)
        if told.shape != self.vector.shape:
            raise ValueError(
                f"{type(method).__name__}.encode gives {told.shape} values for client {turn.client} in round "
                f"{turn.round}, but its `values` says {self.vector.shape}"
            )
        self.vector += told
        self.weight += weight
        self.weighted_steps += weight * steps


def shifted(start: Arrays, delta: Arrays) -> Arrays:
    """Return `start + delta` by name of `delta`, in float32."""
    return {name: (start[name] + change).astype(np.float32) for name, change in delta.items()}


def counts(trained: Trained) -> bool:
    """Say whether a turn's update counts: it moved the weights, and they are numbers.

    A step without a finite gradient is not taken (fp16, ZeRO-1 to 3) or spoils the weights (ZeRO-0 in fp32).
    """
    return trained.sums.steps > 0 and are_finite(trained.end)
