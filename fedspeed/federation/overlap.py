"""Staleness: rounds whose exchange runs beside the local steps of the next round. Pure functions.

A round is then trained from the state of one round before, and its update is added to what the state has
become since. A client knows its own update that is under way, and predicts from it what the state will be: a
client that went on from the common state would take its next steps as if it had not taken the last ones, and
such a delay makes a step size unstable at half of what it bears in time.

So it expects the mean delta to be a part of its own: all of it where data are alike (which undoes the delay,
as in DaSGD, Zhou et al., 2020, and Overlap Local-SGD, Wang et al., 2020), its own share where all go
different ways (where more would let clients drift apart). The part is that of least squares in the last
round, |mean delta|^2 / mean |delta|^2, which everybody knows from sums: the alignment of the updates. When
the aggregate comes it takes the place of the prediction: only deltas are summed.
"""

from collections.abc import Mapping

import numpy as np

from fedspeed.federation import server
from fedspeed.federation.arrays import Arrays, square_distance
from fedspeed.federation.config import FederationConfig
from fedspeed.federation.methods.factors import moved
from fedspeed.models.folded import trainable


def expected_part(update_alignment: float | None, asked: int) -> float:
    """Return which part of its own delta a client expects the mean delta to be.

    Args:
        update_alignment: of the last round, None before there was one. asked: clients of the round under way.
    """
    return 1.0 / asked if update_alignment is None else update_alignment


def predicted_start(
    config: FederationConfig,
    state: Arrays,
    moments: server.State,
    delta: Arrays,
    *,
    part: float,
    frozen: frozenset[str],
) -> Arrays:
    """Return what a client goes on from while its update is under way: the state as it will be, as far as the
    client can tell, after the server optimizer too.

    Args:
        state, moments: the global state and the server optimizer's moments now.
        delta: what the client has changed. part: see `expected_part`.
        frozen: names that nobody trained in the round under way.
    """
    return server.update(config, moments, state, moved(state, delta, part), frozen)[1]


def update_alignment(end: Arrays, start: Arrays, *, scale: float, mean_square: float) -> float:
    """Return |mean delta|^2 / mean |delta|^2: 1 where all clients made the same change.

    Args:
        start, end: the state that a round was trained from, and its aggregate.
        scale: what the deltas were multiplied by (see `pacing.fednova_scale`), and is not part of them.
        mean_square: mean of the clients' |delta|^2 by their weights.
    """
    if mean_square <= 0:
        return 1.0
    return min(1.0, square_distance(start, end, end) / (scale * mean_square))


def carried_over(now: Arrays, start: Arrays, target: Arrays) -> Arrays:
    """Return the state `now` with what has become of `start` in a round added: `now + (target - start)`."""
    return {
        name: (now[name] + (target[name].astype(np.float64) - start[name])).astype(np.float32) for name in now
    }


def deltas_from(start: Mapping[str, np.ndarray], end: Mapping[str, np.ndarray], factor: float) -> Arrays:
    """Return `factor * (end - start)` by name of `end`, in float32; of what nobody trains (`KIND:NAME`),
    which grows with no step, `end - start`.
    """
    trained = trainable(end).keys()
    return {name: (factor if name in trained else 1.0) * (array - start[name]) for name, array in end.items()}
