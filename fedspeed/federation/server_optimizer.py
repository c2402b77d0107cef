"""Server optimizers, which take the mean update as a pseudo-gradient. All participants have the same state
and compute the same step; there need not be a server.

`momentum` is FedAvgM (Hsu et al., 2019); `adam` and `yogi` are FedAdam and FedYogi (Reddi et al., ICLR 2021,
algorithm 2, without bias correction, v starting at tau squared). Arrays that no client trains
(models.folded.trainable) take no step: their new value is the aggregate's.
"""

from collections.abc import Mapping

import numpy as np

from fedspeed.federation.arrays import Arrays
from fedspeed.federation.config import FederationConfig
from fedspeed.models.folded import trainable

State = dict[str, Arrays]  # moment -> name -> array


def init(config: FederationConfig, tensors: Mapping[str, np.ndarray]) -> State:
    """Return the moments before the first step, float32, for every trained array."""
    moments = {"none": (), "momentum": ("m",), "adam": ("m", "v"), "yogi": ("m", "v")}
    start = {"m": 0.0, "v": config.server_tau**2}
    trained = trainable(tensors)
    return {
        moment: {
            name: np.full(array.shape, start[moment], dtype=np.float32) for name, array in trained.items()
        }
        for moment in moments[config.server_optimizer]
    }


def update(
    config: FederationConfig,
    state: State,
    old: Mapping[str, np.ndarray],
    aggregate: Mapping[str, np.ndarray],
    frozen: frozenset[str] = frozenset(),
) -> tuple[State, Arrays]:
    """Take one step of the server optimizer from the global arrays `old` towards the clients' `aggregate`.

    Args:
        state: moments after the step before.
        frozen: names that no client trained in this round; these arrays and their moments stay unchanged.

    Returns:
        The new moments and the new global arrays.
    """
    if config.server_optimizer == "none" and config.server_step == 1.0:
        return state, dict(aggregate)  # exactly the aggregate: old + (aggregate - old) would round
    moments = {moment: dict(arrays) for moment, arrays in state.items()}
    untrained = aggregate.keys() - trainable(aggregate).keys()
    new = dict(old) | {name: aggregate[name] for name in untrained}
    for name, x in trainable(old).items():
        if name in frozen:
            continue
        delta = aggregate[name].astype(np.float64) - x
        step, new_moments = _step(config, {moment: arrays[name] for moment, arrays in state.items()}, delta)
        for moment, array in new_moments.items():
            moments[moment][name] = array.astype(np.float32)
        new[name] = (x + config.server_step * step).astype(np.float32)
    return moments, new


def _step(config: FederationConfig, moments: Arrays, delta: np.ndarray) -> tuple[np.ndarray, Arrays]:
    """Return the step of one array, before the step size, and its new moments; all float64.

    Args:
        moments: of this array. delta: the pseudo-gradient.
    """
    if config.server_optimizer == "none":
        return delta, {}
    if config.server_optimizer == "momentum":
        step = config.server_momentum * moments["m"].astype(np.float64) + delta
        return step, {"m": step}
    beta1 = config.server_momentum
    beta2 = config.server_beta2
    square = delta**2
    m = beta1 * moments["m"].astype(np.float64) + (1 - beta1) * delta
    v = moments["v"].astype(np.float64)
    if config.server_optimizer == "adam":
        v = beta2 * v + (1 - beta2) * square
    else:
        v = v - (1 - beta2) * square * np.sign(v - square)
    return m / (np.sqrt(v) + config.server_tau), {"m": m, "v": v}
