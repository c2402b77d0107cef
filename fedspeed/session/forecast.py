"""The planner's prediction for the current run, for its report."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from fedspeed.cluster.hostfile import Host
from fedspeed.cluster.topology import Topology
from fedspeed.config.deepspeed import zero_stage
from fedspeed.config.run import RunConfig
from fedspeed.data.clients import ClientData
from fedspeed.engine.base.placement import BaseSizes, choose_tier, resident_count, slots_of
from fedspeed.engine.config import EngineConfig
from fedspeed.errors import FedSpeedError
from fedspeed.federation.methods.base import method_class
from fedspeed.models.planned_shape import planned_shape
from fedspeed.monitor.report import Predicted
from fedspeed.planner.fitting import with_activations
from fedspeed.planner.hardware import Device, Node, node_of
from fedspeed.planner.memory import device_memory
from fedspeed.planner.plan import SLOTTED, TIERS, RankProfile, Setting, Task
from fedspeed.planner.profiles import profiles_of
from fedspeed.planner.task import task_of
from fedspeed.planner.timing import seconds_of
from fedspeed.session.planner_inputs import base_sizes, read_probe_file
from fedspeed.session.request import Job

UNKNOWN = Device(
    "unknown",
    "cpu",
    0,
    flops=dict.fromkeys(("fp32", "bf16", "fp16"), 1.0),
    memory_rate=1.0,
    host_rate=1.0,
    source="assumed",
)


def forecast(job: Job, data: Mapping[int, ClientData]) -> Predicted | None:
    """Predict memory and time of a step; return None where the planner does not model the execution.

    Errors of the planner are ignored: the run has been trained already, and must be exported.

    Args:
        data: encoded rows of this rank's clients; the longest row decides.
    """
    try:
        return _forecast(job, data)
    except FedSpeedError:
        return None


def _forecast(job: Job, data: Mapping[int, ClientData]) -> Predicted | None:
    rows = rows_of(data.values())
    execution = execution_of(job.config, job.request.deepspeed, job.topology, job.launch.hosts, rows=rows)
    if execution is None:
        return None
    return Predicted(
        max(sum(execution.device_bytes(place).values()) for place in execution.places),
        max(execution.seconds(place) for place in execution.places) if execution.is_timed else None,
    )


class Rows(NamedTuple):
    """What a prediction needs to know of the rows.

    Attributes:
        longest: tokens of the longest row. answer_share: answer tokens as a share of all tokens.
    """

    longest: int
    answer_share: float


def rows_of(data: Iterable[ClientData]) -> Rows:
    """Return what predictions need to know of clients' training rows."""
    clients = list(data)
    examples = [example for client in clients for example in client.train]
    answers = sum(example.answer_tokens for example in examples)
    return Rows(max(client.longest for client in clients), answers / sum(len(e.input_ids) for e in examples))


@dataclass(frozen=True)
class Execution:
    """How a run's ranks compute, as the planner models it.

    Attributes:
        places: the distinct profiles of the ranks that train. is_timed: whether their speed is known.
    """

    task: Task
    setting: Setting
    places: Sequence[RankProfile]
    is_timed: bool

    def device_bytes(self, place: RankProfile) -> dict[str, int]:
        """Return the bytes of a training step on a rank's device, by cause."""
        persistent, transient = device_memory(self.task, self.setting, place, evaluation=False)
        return persistent | transient

    def seconds(self, place: RankProfile) -> float:
        """Return the seconds of a local step of a rank's clients."""
        return seconds_of(self.task, self.setting, place).total


def task_for(config: RunConfig, ds_config: dict[str, Any], nodes: Sequence[Node], rows: Rows) -> Task:
    """Return the task that a client's local step is by default, whatever the method.

    Raises:
        FedSpeedError: the planner does not know the model, or a device does not fit the configuration.
    """
    devices = [node.device for node in nodes]
    task = task_of(config, ds_config, planned_shape(config.model.base), devices)
    return replace(task, tokens=-(-rows.longest // 8) * 8, answer_share=rows.answer_share)


def execution_of(
    config: RunConfig, ds_config: dict[str, Any], topology: Topology, hosts: Sequence[Host], *, rows: Rows
) -> Execution | None:
    """Return how the clients' ranks compute; None if the planner has no model of it.

    Args:
        ds_config: the merged DeepSpeed section.

    Raises:
        FedSpeedError: the planner does not know the model, or a device does not fit the configuration.
    """
    tier = predictable_tier(config, ds_config)
    if tier is None:
        return None
    nodes, timed = nodes_of(config, hosts)
    task = task_for(config, ds_config, list(nodes.values()), rows)
    method = config.federation.method
    planned = method_class(method.name).planned(method, task, role="client")
    if planned is None:
        return None
    timed = timed and planned == task
    task = planned
    places = [place for group in profiles_of(topology, nodes).values() for place in group]
    setting = with_activations(
        task,
        configured_setting(config, task, tier, places[0]),
        places,
        block_inputs=config.engine.block_inputs,
        activation_gib=config.engine.activation_gib,
    )
    return Execution(task, setting, places, timed)


def predictable_tier(config: RunConfig, ds_config: dict[str, Any]) -> str | None:
    """Return the tier of the run's base; None if the planner has no model of how the run computes."""
    if config.engine.pipeline != "none" or config.adapter.method == "blocks":
        return None
    tier = choose_tier(config.engine, ds_config, frozen=config.adapter.method != "full")
    if tier == "stock" and zero_stage(ds_config) == 3:
        return None
    return tier if tier in TIERS else None


def configured_setting(config: RunConfig, task: Task, tier: str, place: RankProfile) -> Setting:
    """Return the setting that a run's configuration describes, without kept activations.

    Args:
        tier: from `predictable_tier`. place: of any rank of a cluster.
    """
    resident = 0
    slots = 0
    if tier in SLOTTED:
        group = {"client": place.client_ranks, "cluster": place.cluster_ranks}.get(tier, 0)
        sizes = base_sizes(task.shape, task.type_bytes, 0 if task.offload else group)
        resident, slots = _block_counts(config.engine, sizes)
    return Setting(
        tier,
        config.train.micro_batch,
        config.train.accumulation,
        resident_blocks=resident,
        block_slots=slots,
        client_slots=config.engine.client_slots or task.clients,
        block_inputs="device" if config.engine.block_inputs == "auto" else config.engine.block_inputs,
        checkpointing=config.engine.activation_checkpointing,
    )


def nodes_of(config: RunConfig, hosts: Sequence[Host]) -> tuple[dict[str, Node], bool]:
    """Return the hardware of each host by its name, and whether the speed of all of it is known.

    Of a host that is neither measured nor has a known card, memory is predicted and time is not.
    """
    path = config.cluster.probe
    probes = [read_probe_file(Path(path))] if path else []
    nodes = {}
    timed = True
    for host in hosts:
        try:
            nodes[host.name] = node_of(host, probes)
        except FedSpeedError:
            timed = False
            nodes[host.name] = Node(
                host.name, UNKNOWN, 0, ram_rate=1.0, nvme=0, disk_rate=1.0, link_rate=1.0, local_rate=1.0
            )
    return nodes, timed


def _block_counts(engine: EngineConfig, sizes: BaseSizes) -> tuple[int, int]:
    """Return (resident blocks, block slots) that the engine chooses for a base of these sizes."""
    return resident_count(engine, sizes), slots_of(engine, sizes)
