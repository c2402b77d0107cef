"""What a run will need, for `--dry-run`: memory of a client's device by cause, and what a round sends."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fedspeed.cluster.hostfile import Host
from fedspeed.cluster.topology import Topology
from fedspeed.config.deepspeed_rules import at
from fedspeed.config.run import RunConfig
from fedspeed.data.batches import epoch_steps
from fedspeed.data.clients import ClientData
from fedspeed.errors import FedSpeedError
from fedspeed.federation.methods.base import VALUE_BYTES, make_method, method_class
from fedspeed.models.folded import trainable
from fedspeed.models.lora_ranks import unequal_ranks
from fedspeed.planner.memory import base_bytes, trainable_bytes
from fedspeed.planner.plan import RankProfile, Task
from fedspeed.session.forecast import Execution, Rows, execution_of, nodes_of, task_for
from fedspeed.units import bytes_text, count_text

if TYPE_CHECKING:  # loads torch
    from transformers import PreTrainedModel

SMALL = 0.005  # of a rank's memory: causes below this share are not named


def step_lines(config: RunConfig, topology: Topology, clients: Sequence[ClientData]) -> list[str]:
    """Return lines about the local steps of a round that is an epoch; none where rounds are of given lengths.

    Args:
        clients: of the run, with their encoded rows.
    """
    if config.federation.round_budget != "epoch":
        return []
    train = config.train
    steps = []
    for data, place in zip(clients, topology.clients):
        ranks = len(place.ranks) if config.engine.pipeline == "none" else 1
        steps.append(epoch_steps(len(data.sequences), train.micro_batch * train.accumulation * ranks))
    fewest = min(steps)
    span = str(fewest) if fewest == max(steps) else f"{fewest} to {max(steps)}"
    return [f"steps    an epoch takes a client {span} local steps"]


def memory_lines(
    config: RunConfig, ds_config: dict[str, Any], topology: Topology, hosts: Sequence[Host], *, rows: Rows
) -> list[str]:
    """Return lines about the device memory of a client's rank in a local step, and of the method's server.

    Args:
        ds_config: the merged DeepSpeed section.
    """
    try:
        execution = execution_of(config, ds_config, topology, hosts, rows=rows)
        nodes, _ = nodes_of(config, hosts)
        task = task_for(config, ds_config, list(nodes.values()), rows)
    except FedSpeedError as error:
        return [f"memory   not predicted: {error}"]
    method = config.federation.method
    planned = method_class(method.name).planned
    client = planned(method, task, role="client")
    if execution is not None:
        place = max(execution.places, key=lambda place: sum(execution.device_bytes(place).values()))
        lines = [f"memory   {_memory_text(execution, place)}"]
    else:
        lines = [f"memory   {_least_text(client or task, ds_config)} on a client's device"]
    server = planned(method, task, role="server")
    return [*lines, *([f"         {_least_text(server, ds_config)} on the server's"] if server else [])]


def _least_text(task: Task, ds_config: dict[str, Any]) -> str:
    """Return what a step needs at least where the planner has no model of how it is computed: the base and
    what trains, without activations.
    """
    offloaded = {
        cause
        for cause, key in (("base", "offload_param"), ("masters and optimizer", "offload_optimizer"))
        if at(ds_config, f"zero_optimization.{key}.device") in ("cpu", "nvme")
    }
    causes = {"base": base_bytes(task)} | trainable_bytes(replace(task, stage=0), 1, client_ranks=1)
    here = sum(count for cause, count in causes.items() if cause not in offloaded)
    named = [
        f"{cause} {bytes_text(count)}{' off the device' if cause in offloaded else ''}"
        for cause, count in causes.items()
    ]
    return f"at least {bytes_text(here)} and activations, which are not predicted ({', '.join(named)}),"


def _memory_text(execution: Execution, place: RankProfile) -> str:
    """Return the bytes of a local step on a rank's device, in total and by cause."""
    causes = execution.device_bytes(place)
    total = sum(causes.values())
    named = [
        f"{cause} {bytes_text(count)}"
        for cause, count in sorted(causes.items(), key=lambda item: -item[1])
        if count >= SMALL * total
    ]
    text = f"about {bytes_text(total)} on a client's device: {', '.join(named)}"
    return f"{text}; host memory for the rest of the base" if "slots" in causes else text


def state_shapes(
    config: RunConfig, model: "PreTrainedModel", role: Literal["client", "server"]
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a role's trained arrays, by their names in the state.

    Args:
        model: of the role, on the meta device.
    """
    arrays = {
        name: np.broadcast_to(np.float32(0), tuple(parameter.shape))
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    method = config.federation.method
    state = method_class(method.name).arrays_of(method, arrays, role=role)
    return {name: array.shape for name, array in trainable(state).items()}


def traffic_lines(
    config: RunConfig,
    ds_config: dict[str, Any],
    topology: Topology,
    hosts: Sequence[Host],
    *,
    rows: Rows,
    shapes: Mapping[str, Sequence[int]],
    server_only: frozenset[str] = frozenset(),
) -> list[str]:
    """Return lines about what a round sums, and what clients send and receive in it.

    Args:
        config: whose routing mode is no longer `auto`. shapes: of the trained arrays of the state, by name.
        server_only: names of those that only the server has.
    """
    state = {name: np.broadcast_to(np.float32(0), tuple(shape)) for name, shape in shapes.items()}
    method = make_method(
        config.federation.method,
        state,
        clients=config.data.clients,
        seed=config.run.seed,
        server_arrays=server_only,
        clients_per_round=config.federation.clients_per_round,
        lora_ranks=unequal_ranks(config.adapter, config.data.clients),
    )
    values = method.values(1)
    text = f"traffic  a round sums {count_text(values)} values, {bytes_text(values * VALUE_BYTES)}"
    if original := method.original_size():
        text += f" (an update of the original takes {original})"
    participants = len(topology.participants)
    if participants == 1:
        return [f"{text}; one participant carries all clients, so that no update is sent"]
    if config.routing.anonymous:
        return [text]
    try:
        nodes, _ = nodes_of(config, hosts)
        task = task_for(config, ds_config, list(nodes.values()), rows)
    except FedSpeedError:  # `memory_lines` says why
        return [text]
    sent, received = method.traffic(task, participants)
    moved = f"sends {bytes_text(sent)} and receives {bytes_text(received)}"
    return [f"{text}; a participant with one client {moved}"]
