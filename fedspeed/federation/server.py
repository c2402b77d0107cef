"""Server optimizers: the mean update as a pseudo-gradient. Every participant holds the same state and
computes the same step.

`momentum` is FedAvgM (Hsu et al., 2019); `adam` and `yogi` are FedAdam and FedYogi (Reddi et al., ICLR 2021,
algorithm 2, without bias correction, v starting at tau squared). What nobody trains (models.folded.trainable)
takes no steps: it is what the aggregate says.
"""

from collections.abc import Mapping

import numpy as np

from fedspeed.federation.arrays import Arrays
from fedspeed.federation.config import FederationConfig
from fedspeed.models.folded import trainable

State = dict[str, Arrays]  # moment -> name -> array


def init(config: FederationConfig, tensors: Mapping[str, np.ndarray]) -> State:
    """Return the moments before the first step."""
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
    """Take one step from the `old` global tensors towards the clients' `aggregate`.

    Args:
        state: moments of the last step.
        frozen: names that nobody trained in this round; neither they nor their moments move.

    Returns:
        The new moments and the new global tensors.
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
        own = {moment: arrays[name] for moment, arrays in state.items()}
        step, own = _step(config, own, delta)
        for moment, array in own.items():
            moments[moment][name] = array.astype(np.float32)
        new[name] = (x + config.server_step * step).astype(np.float32)
    return moments, new


def _step(config: FederationConfig, own: Arrays, delta: np.ndarray) -> tuple[np.ndarray, Arrays]:
    """Return the step of one tensor and its new moments, all float64.

    Args:
        own: its moments. delta: the pseudo-gradient.
    """
    if config.server_optimizer == "none":
        return delta, {}
    if config.server_optimizer == "momentum":
        step = config.server_momentum * own["m"].astype(np.float64) + delta
        return step, {"m": step}
    beta1 = config.server_momentum
    beta2 = config.server_beta2
    square = delta**2
    m = beta1 * own["m"].astype(np.float64) + (1 - beta1) * delta
    v = own["v"].astype(np.float64)
    if config.server_optimizer == "adam":
        v = beta2 * v + (1 - beta2) * square
    else:
        v = v - (1 - beta2) * square * np.sign(v - square)
    return m / (np.sqrt(v) + config.server_tau), {"m": m, "v": v}
