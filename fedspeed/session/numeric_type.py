"""What model.dtype=auto comes to: decided once for all ranks of a job, by their devices, and kept for the
whole life of a run.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from fedspeed.cluster.devices import choose_accelerator
from fedspeed.cluster.discover import from_process
from fedspeed.cluster.local_ranks import local_hosts
from fedspeed.cluster.rendezvous import Store
from fedspeed.cluster.topology import topology_of
from fedspeed.config.load import Loaded
from fedspeed.engine import device_types
from fedspeed.errors import JournalError, PlanError
from fedspeed.models.numeric_types import NAMES, DeviceTypes, lowest_common, told
from fedspeed.planner.hardware import Device, common_type, node_of
from fedspeed.session.coordination import CheckIn
from fedspeed.session.measured import read_probe_file
from fedspeed.session.request import Job, RunRequest
from fedspeed.session.resume import journal_of


def original_dtype(request: RunRequest) -> str:
    """The type that the run in the folder began with; empty for a new one. A journal that cannot be read is
    refused elsewhere.
    """
    if request.fresh:
        return ""
    try:
        entry = journal_of(request).latest()
    except JournalError:
        return ""
    dtype = entry.config.get("model", {}).get("dtype") if entry else None
    return dtype if dtype in NAMES else ""


def with_original_dtype(request: RunRequest) -> RunRequest:
    """The request in the type that its run began with, if there is one and the configuration names no
    other.
    """
    begun = original_dtype(request) if request.config.model.dtype == "auto" else ""
    return request.settled(begun) if begun else request


@dataclass(frozen=True)
class Decided:
    """A job whose type is decided. `text` tells how, empty where the configuration names one; `begun`: by an
    earlier start of the same run.
    """

    job: Job
    text: str = ""
    begun: bool = False


def agree(job: Job, store: Store) -> Decided:
    """Decide the type of a job. Collective over the ranks that carry clients; rank 0 passes the check-in in
    any case.
    """
    if job.config.model.dtype != "auto":
        return Decided(job)
    with CheckIn(job, store, "devices"):
        [mine] = device_types.device_types(job.launch.local_rank)
        store.put(_types_key(job.world_rank), json.dumps([mine.name, mine.kind, sorted(mine.types)]))
        if job.reporter:
            store.put("types/begun", original_dtype(job.request))
    begun, *words = store.get("types/begun", *map(_types_key, job.workers))
    devices = [DeviceTypes(name, kind, frozenset(types)) for name, kind, types in map(json.loads, words)]
    dtype = begun or lowest_common(devices)
    return Decided(
        Job(job.request.settled(dtype), job.launch, job.topology),
        _why(dtype, begun, devices, job.request),
        bool(begun),
    )


def alone(loaded: Loaded) -> Loaded:
    """A configuration in the type that the devices of this process decide, for what runs in one process."""
    if loaded.config.model.dtype != "auto":
        return loaded
    choose_accelerator(os.environ)
    return RunRequest(loaded).settled(lowest_common(device_types.device_types())).loaded


def _types_key(rank: int) -> str:
    return f"types/{rank}"


def _why(dtype: str, begun: str, devices: list[DeviceTypes], request: RunRequest) -> str:
    return (
        f"model.dtype={dtype} (auto: the run in {request.folder} began in it)"
        if begun
        else told(dtype, devices)
    )


def expect(request: RunRequest) -> tuple[RunRequest, str]:
    """What `agree` will come to, as far as it can be known before the ranks meet: from the hostfile's cards
    and probes, and from this machine's own devices for hosts of which nothing is stated. The text is empty
    where the configuration names a type.

    Raises:
        ModelError: this machine cannot compute in the type. ConfigError: nor as engine.matmul and
            engine.deterministic say. PlanError: a stated card cannot compute in the type.
    """
    asked = request.config.model.dtype
    begun = original_dtype(request)
    stated, unstated, unknown = _stated_devices(request)
    if asked != "auto":
        dtype = asked
        text = ""
    elif unknown and not begun:
        return request, f"model.dtype=auto: decided when the ranks meet ({unknown})"
    else:
        found = [
            DeviceTypes(f"the {device.name} of {host}", device.kind, frozenset(device.flops))
            for host, device in stated
        ]
        if unstated and not begun:
            choose_accelerator(os.environ)
            found += device_types.device_types()
        dtype = begun or lowest_common(found)
        text = _why(dtype, begun, found, request)
    common_type([device for _, device in stated], dtype)
    if unstated:
        from fedspeed.engine.arithmetic import check_arithmetic

        choose_accelerator(os.environ)
        device_types.check_dtype(dtype, str(request.folder) if text and begun else "")
        check_arithmetic(request.config.engine.matmul, request.config.engine.deterministic)
    return (request.settled(dtype) if text else request), text


def _stated_devices(request: RunRequest) -> tuple[list[tuple[str, Device]], bool, str]:
    """(host and device of the hosts that work, by the hostfile and probes; whether there are hosts without a
    word; why a stated card is unknown).
    """
    config = request.config
    launch = from_process(request.hostfile)
    hosts = (
        local_hosts(launch, config.cluster.local_ranks, config.data.clients)
        if launch.kind == "none"
        else launch.hosts
    )
    topology = topology_of(config, hosts)
    working = {topology.placement(rank).host for rank in topology.workers}
    probes = [read_probe_file(Path(config.cluster.probe))] if config.cluster.probe else []
    stated = []
    unstated = False
    unknown = ""
    for host in hosts:
        if host.name not in working:
            continue
        if not host.gpu and not any(probe["host"] == host.name for probe in probes):
            unstated = True
            continue
        try:
            stated.append((host.name, node_of(host, probes).device))
        except PlanError as error:
            unknown = str(error)
    return stated, unstated, unknown
