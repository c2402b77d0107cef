"""Staleness: the exchange of a round overlaps with the local steps of the next round. Pure functions.

A round is then trained from the state of one round earlier, and its update is added to what the state has
become in the meantime. A client that simply continued from the common state would ignore the steps it has
just taken; such a delay halves the step size at which training becomes unstable. A client therefore predicts
the coming state from its own update that is being exchanged.

It predicts that the mean delta will be a fraction of its own delta: all of it where clients' data are alike
(which removes the delay, as in DaSGD, Zhou et al., 2020, and Overlap Local-SGD, Wang et al., 2020), and its
own share of the mean where the clients' deltas are unrelated (where a larger fraction would let clients drift
apart). The fraction is the least-squares estimate from the round before, |mean delta|^2 / mean |delta|^2,
which all participants can compute from sums: the alignment of the updates. When the aggregate arrives it
replaces the prediction, because only deltas are summed.
"""

from collections.abc import Mapping

import numpy as np

from fedspeed.federation import server_optimizer
from fedspeed.federation.arrays import Arrays, square_distance
from fedspeed.federation.config import FederationConfig
from fedspeed.federation.methods.factors import add_scaled
from fedspeed.models.folded import trainable


def expected_fraction(update_alignment: float | None, clients: int) -> float:
    """Return the fraction of its own delta that a client expects the mean delta to be.

    Args:
        update_alignment: of the round before, None before there is one.
        clients: number of clients in the round that is being exchanged.
    """
    return 1.0 / clients if update_alignment is None else update_alignment


def predicted_start(
    config: FederationConfig,
    state: Arrays,
    moments: server_optimizer.State,
    delta: Arrays,
    *,
    fraction: float,
    frozen: frozenset[str],
) -> Arrays:
    """Return the state that a client continues from during the exchange: its prediction of the next global
    state, after the server optimizer.

    Args:
        state, moments: the current global state and moments of the server optimizer.
        delta: what the client has changed in the round that is being exchanged.
        fraction: see `expected_fraction`.
        frozen: names that no client trained in that round.
    """
    return server_optimizer.update(config, moments, state, add_scaled(state, delta, fraction), frozen)[1]


def update_alignment(end: Arrays, start: Arrays, *, scale: float, mean_square: float) -> float:
    """Return |mean delta|^2 / mean |delta|^2, at most 1: it is 1 where all clients' deltas are equal.

    Args:
        end: the round's aggregate. start: the state that the round was trained from.
        scale: what the mean delta was multiplied by in `end` (see `pacing.fednova_scale`).
        mean_square: weighted mean of the clients' |delta|^2.
    """
    if mean_square <= 0:
        return 1.0
    return min(1.0, square_distance(start, end, end) / (scale * mean_square))


def carried_over(now: Arrays, start: Arrays, target: Arrays) -> Arrays:
    """Return `now + (target - start)` in float32: a round's change from `start` to `target`, applied to the
    current state.
    """
    return {
        name: (now[name] + (target[name].astype(np.float64) - start[name])).astype(np.float32) for name in now
    }


def deltas_from(start: Mapping[str, np.ndarray], end: Mapping[str, np.ndarray], factor: float) -> Arrays:
    """Return `factor * (end - start)` for the names of `end`. Arrays that are not trained (`KIND:NAME`) do
    not grow with the number of steps and are not multiplied by `factor`.
    """
    trained = trainable(end).keys()
    return {name: (factor if name in trained else 1.0) * (array - start[name]) for name, array in end.items()}
