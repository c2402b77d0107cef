"""What a run will need, for `--dry-run`: memory of a client's device by cause, and what a round sends."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedspeed.cluster.hostfile import Host
from fedspeed.cluster.topology import Topology
from fedspeed.config.run import RunConfig
from fedspeed.errors import FedSpeedError
from fedspeed.federation.methods.base import make_method
from fedspeed.planner.plan import RankProfile
from fedspeed.session.forecast import Execution, Rows, execution_of
from fedspeed.units import bytes_text, count_text

VALUE_BYTES = 4  # of a summed value, float32
SMALL = 0.005  # of a rank's memory: causes below this share are not named


def memory_lines(
    config: RunConfig, ds_config: dict[str, Any], topology: Topology, hosts: Sequence[Host], *, rows: Rows
) -> list[str]:
    """Return lines about the device memory of a client's rank in a local step.

    Args:
        ds_config: the merged DeepSpeed section.
    """
    try:
        execution = execution_of(config, ds_config, topology, hosts, rows=rows)
    except FedSpeedError as error:
        return [f"memory   not predicted: {error}"]
    if execution is None:
        return ["memory   not predicted: the planner has no model of this execution"]
    place = max(execution.places, key=lambda place: sum(execution.device_bytes(place).values()))
    return [f"memory   {_memory_text(execution, place)}"]


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


def traffic_lines(
    config: RunConfig, shapes: Mapping[str, Sequence[int]], *, clients: int, participants: int
) -> list[str]:
    """Return lines about what participants send in a round.

    Args:
        shapes: of the arrays that clients train, by name. clients: of the run.
        participants: of a sum.
    """
    state = {name: np.broadcast_to(np.float32(0), tuple(shape)) for name, shape in shapes.items()}
    method = make_method(config.federation.method, state, clients=clients, seed=config.run.seed)
    values = method.values(1)
    text = f"a round sums {count_text(values)} values, {bytes_text(values * VALUE_BYTES)}"
    if participants > 1 and not config.routing.anonymous:
        sent = 2 * (participants - 1) / participants * values * VALUE_BYTES
        text += f"; each participant sends {bytes_text(sent)} and receives as much"
    return [f"traffic  {text}"]
