"""Server optimizers: the mean update as a pseudo-gradient. Every participant holds the same state and computes the same step.

`momentum` is FedAvgM (Hsu et al., 2019); `adam` and `yogi` are FedAdam and FedYogi (Reddi et al., ICLR 2021, algorithm 2, without bias
correction, v starting at tau squared).
"""

from collections.abc import Mapping

import numpy as np

from fedspeed.federation.config import FederationConfig

State = dict[str, dict[str, np.ndarray]]  # moment -> name -> array


def init(config: FederationConfig, tensors: Mapping[str, np.ndarray]) -> State:
    moments = {"none": (), "momentum": ("m",), "adam": ("m", "v"), "yogi": ("m", "v")}[config.server_optimizer]
    start = {"m": 0.0, "v": config.server_tau**2}
    return {k: {n: np.full(t.shape, start[k], dtype=np.float32) for n, t in tensors.items()} for k in moments}


def update(config: FederationConfig, state: State, old: Mapping[str, np.ndarray], aggregate: Mapping[str, np.ndarray],
           still: frozenset[str] = frozenset()) -> tuple[State, dict[str, np.ndarray]]:
    """One step from the `old` global tensors towards the clients' `aggregate`.

    Args:
        still: names that nobody trained in this round; neither they nor their moments move.

    Returns:
        The new optimizer state and the new global tensors.
    """
    if config.server_optimizer == "none" and config.server_step == 1.0:
        return state, dict(aggregate)  # exactly the aggregate: old + (aggregate - old) would round
    new_state, new = {k: dict(v) for k, v in state.items()}, dict(old)
    for name, x in old.items():
        if name in still:
            continue
        delta = aggregate[name].astype(np.float64) - x
        if config.server_optimizer == "none":
            step = delta
        elif config.server_optimizer == "momentum":
            step = config.server_momentum * state["m"][name].astype(np.float64) + delta
            new_state["m"][name] = step.astype(np.float32)
        else:
            beta1, beta2, square = config.server_momentum, config.server_beta2, delta**2
            m = beta1 * state["m"][name].astype(np.float64) + (1 - beta1) * delta
            v = state["v"][name].astype(np.float64)
            v = beta2 * v + (1 - beta2) * square if config.server_optimizer == "adam" else v - (1 - beta2) * square * np.sign(v - square)
            step = m / (np.sqrt(v) + config.server_tau)
            new_state["m"][name], new_state["v"][name] = m.astype(np.float32), v.astype(np.float32)
        new[name] = (x + config.server_step * step).astype(np.float32)
    return new_state, new
