"""Seconds of each method's exchange of a round, from the bytes that the method itself predicts
(`Method.traffic`). Pure. Processor time of masks is left out, which favours `fate_llm`.
"""

from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from benchmarks.compare.simulated.cases import Placement
from fedspeed.federation.methods.base import VALUE_BYTES, Method, make_method
from fedspeed.federation.methods.config import secure_sum_of
from fedspeed.federation.methods.fedbiot.emulator import divide
from fedspeed.models.families.registry import FAMILIES
from fedspeed.planner.many_clients import MESSAGE_S, masked_cost
from fedspeed.planner.plan import Task


def _array_shapes(task: Task, blocks: tuple[int, ...]) -> dict[str, tuple[int, int]]:
    """Return the shapes of LoRA's factors in some blocks, by the names that PEFT gives them."""
    prefix = f"base_model.model.{FAMILIES[task.shape.family].blocks}"
    found = {}
    for block in blocks:
        for linear in task.shape.adapted(task.targets):
            name = f"{prefix}{block}.{linear.path}"
            found[f"{name}.lora_A.weight"] = (task.lora_rank, linear.rows_in)
            found[f"{name}.lora_B.weight"] = (linear.rows_out, task.lora_rank)
    return found


def instance(placement: Placement) -> Method:
    """Return the method as a run would build it, over arrays of the real shapes without values."""
    task = replace(placement.task, tokens=0, rows=0)
    return _instance(placement.config.federation.method, task, len(placement.topology.clients))


@lru_cache(maxsize=64)
def _instance(options: Any, task: Task, clients: int) -> Method:
    layers = tuple(range(task.shape.layers))
    trained = layers
    server_arrays: frozenset[str] = frozenset()
    if options.name == "fedbiot":
        trained = divide(len(layers), adapter_blocks=options.adapter_blocks, dropped=options.dropped).adapter
    if options.name == "m2fedsa":
        middle = layers[options.first : len(layers) - options.last]
        server_arrays = frozenset(_array_shapes(task, middle))
    shapes = _array_shapes(task, trained)
    state = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
    return make_method(options, state, clients=clients, seed=0, server_arrays=server_arrays)


def exchange_s(placement: Placement, local_steps: int) -> float:
    """Return the seconds of a round's exchange in the clear: the larger of what a gateway sends and receives
    over its link, and two messages for every participant.

    FATE's arbiter takes what all others send, one after the other through its link, and sends the sum to each
    of them. A server sends the new state to all. The messages of M2FedSA within its steps are in its steps.
    With an exchange in every step (`spry_iteration`) all of them count.
    """
    method = instance(placement)
    options = placement.config.federation.method
    participants = len(placement.topology.participants)
    if participants == 1:
        return 0.0
    rate = placement.link_rate
    here = max(rank.participants_here for rank in placement.ranks)
    exchanges = local_steps if method.exchange_every == "step" else 1
    messages = exchanges * 2 * participants * MESSAGE_S
    if secure_sum_of(options) != "none":
        sent, received = method.traffic(placement.task, participants)
        return messages + (participants - here) * (sent + received) / rate
    if options.name == "m2fedsa":
        moved = 2 * (participants - 1) / participants * method.values(1) * VALUE_BYTES
    else:
        # The steps of a round are the caller's, who may have other ones than the configuration.
        sent, received = method.traffic(replace(placement.task, local_steps=local_steps), participants)
        moved = max(sent, received)
    return messages + (moved * here + _from_server(placement, method)) / rate


def _from_server(placement: Placement, method: Method) -> float:
    """Return the bytes that a server sends to all participants after its step."""
    options = placement.config.federation.method
    if placement.server is None:
        return 0.0
    others = len(placement.topology.participants) - 1
    if options.name == "m2fedsa":
        return others * VALUE_BYTES * method.layout.size
    task = placement.task
    kept = divide(task.shape.layers, adapter_blocks=options.adapter_blocks, dropped=options.dropped).kept
    return (
        others * VALUE_BYTES * task.shape.lora(task.targets, task.lora_rank) * len(kept) / task.shape.layers
    )


def anonymous_s(placement: Placement) -> float:
    """Return the seconds of FedSpeed's exchange through two relays under masks (`planner.many_clients`)."""
    participants = len(placement.topology.participants)
    if participants == 1:
        return 0.0
    nbytes = VALUE_BYTES * instance(placement).values(1)
    here = max(rank.participants_here for rank in placement.ranks)
    return masked_cost(round(here * nbytes), placement.link_rate, participants).seconds
