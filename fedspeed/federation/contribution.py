"""What one rank's clients add to the sum of an exchange."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from fedspeed.federation.arrays import Arrays, are_finite, square_norm
from fedspeed.federation.methods.base import Method
from fedspeed.federation.methods.turns import Trained, Turn
from fedspeed.federation.overlap import deltas_from

MAX_SQUARE = 1e12  # bound of a delta's squared norm in the ledger, since masked sums have a limited range
Transform = Callable[[Turn, Arrays, float], tuple[Arrays, float]]  # (turn, delta, weight) -> (delta, weight)


@dataclass
class Contribution:
    """The vector that a rank adds to the sum for all its clients, with their weight.

    Attributes:
        vector: [values] float32, already multiplied by the clients' weights.
        weight: sum of the weights of the clients in it.
        weighted_steps: sum of weight times local steps taken.
        deltas: by client, the delta that the update stands for. Filled only where it differs from the plain
            trained delta, or is needed again under staleness.
        squares: by client, the squared norm of the part of the delta that is sent, times the client's weight.
            Filled together with `deltas`.
    """

    vector: np.ndarray
    weight: float = 0.0
    weighted_steps: float = 0.0
    deltas: dict[int, Arrays] = field(default_factory=dict)
    squares: dict[int, float] = field(default_factory=dict)

    @classmethod
    def empty(cls, values: int) -> "Contribution":
        """Return the contribution of a rank without clients: a vector of `values` zeros."""
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
            start: the common state that the update is counted from; under staleness the turn may have started
                from another one.
            weight: of the client.
            factor: what the client's delta is multiplied by; the delta is then stored in `deltas`. None: the
                delta is sent as it is.
            transform: applied to the arrays of the delta that are sent (all but `Method.unsent`).

        Raises:
            ValueError: the method encodes a vector of another length than its `values` says.
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
        encoded = method.encode(turn.starting_at(start), end, weight)
        if encoded.shape != self.vector.shape:
            raise ValueError(
                f"{type(method).__name__}.encode gives {encoded.shape} values for client {turn.client} in "
                f"round {turn.round}, but its `values` says {self.vector.shape}"
            )
        self.vector += encoded
        self.weight += weight
        self.weighted_steps += weight * steps


def shifted(start: Arrays, delta: Arrays) -> Arrays:
    """Return `start + delta` in float32, for the names of `delta` only."""
    return {name: (start[name] + change).astype(np.float32) for name, change in delta.items()}


def is_usable(trained: Trained) -> bool:
    """Return whether a turn's update may be added to the sum: it took a step, and its weights are finite.

    Without a finite gradient, fp16 and ZeRO-1 to 3 skip the step; ZeRO-0 in fp32 makes the weights NaN.
    """
    return trained.sums.steps > 0 and are_finite(trained.end)
