"""Resolution of model.dtype=auto: once for all ranks of a job, by their devices, and kept for the whole
run.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from fedspeed.cluster.devices import choose_accelerator
from fedspeed.cluster.discover import from_process
from fedspeed.cluster.local_ranks import local_hosts
from fedspeed.cluster.rendezvous import Store
from fedspeed.cluster.store_values import read_values
from fedspeed.cluster.topology import topology_of
from fedspeed.config.load import Loaded
from fedspeed.engine import device_types
from fedspeed.errors import JournalError, PlanError
from fedspeed.models.numeric_types import NAMES, DeviceTypes, NumericType, explanation, lowest_common
from fedspeed.planner.hardware import Device, common_type, node_of
from fedspeed.session.coordination import CheckIn
from fedspeed.session.planner_inputs import read_probe_file
from fedspeed.session.request import Job, RunRequest
from fedspeed.session.resume import journal_of


def original_dtype(request: RunRequest) -> NumericType | None:
    """Return the type that the run in the folder was started with; None for a new run.

    A journal that cannot be read is reported by `journal_entry`.
    """
    if request.fresh:
        return None
    try:
        entry = journal_of(request).latest()
    except JournalError:
        return None
    dtype = entry.config.get("model", {}).get("dtype") if entry else None
    return next((name for name in NAMES if name == dtype), None)


def with_original_dtype(request: RunRequest) -> RunRequest:
    """Resolve model.dtype=auto to the type that the run was started with, if there is such a run."""
    original = original_dtype(request) if request.config.model.dtype == "auto" else None
    return request.with_dtype(original) if original else request


@dataclass(frozen=True)
class Resolved:
    """A job whose numeric type is resolved.

    Attributes:
        job: with the type in its configuration.
        text: how it was resolved; empty where the configuration names the type.
        resumed: whether it is that of an earlier start of the same run.
    """

    job: Job
    text: str = ""
    resumed: bool = False


def agree(job: Job, store: Store) -> Resolved:
    """Resolve the numeric type of a job. Collective over the required ranks."""
    if job.config.model.dtype != "auto":
        return Resolved(job)
    with CheckIn(job, store, "devices"):
        [own] = device_types.device_types(job.launch.local_rank)
        store.put(_types_key(job.world_rank), json.dumps([own.name, own.kind, sorted(own.types)]))
        if job.reporter:
            store.put("types/begun", original_dtype(job.request) or "")
    [original_text] = store.get("types/begun")
    original = next((name for name in NAMES if name == original_text), None)
    devices = read_values(store, map(_types_key, job.workers), _device_types)
    dtype = original or lowest_common(devices)
    return Resolved(
        Job(job.request.with_dtype(dtype), job.launch, job.topology),
        _reason(dtype, original, devices, job.request),
        bool(original),
    )


def with_local_dtype(loaded: Loaded) -> Loaded:
    """Resolve model.dtype=auto by the devices of this process, for commands that run in one process."""
    if loaded.config.model.dtype != "auto":
        return loaded
    choose_accelerator(os.environ)
    return RunRequest(loaded).with_dtype(lowest_common(device_types.device_types())).loaded


def _device_types(text: str) -> DeviceTypes:
    name, kind, types = json.loads(text)
    if kind not in ("cpu", "gpu"):
        raise ValueError(kind)
    return DeviceTypes(str(name), kind, frozenset(types))


def _types_key(rank: int) -> str:
    return f"types/{rank}"


def _reason(dtype: str, original: str | None, devices: list[DeviceTypes], request: RunRequest) -> str:
    return (
        f"model.dtype={dtype} (auto: the run in {request.folder} began in it)"
        if original
        else explanation(dtype, devices)
    )


def predict(request: RunRequest) -> tuple[RunRequest, str]:
    """Predict what `agree` will resolve, before the ranks meet.

    The devices are those of the hostfile and of probes, and for hosts without such facts those of this
    machine.

    Returns:
        the request with the type, and how it was resolved: empty where the configuration names the type.

    Raises:
        ModelError: this machine cannot compute in the type. ConfigError: it does not support engine.matmul or
            engine.deterministic. PlanError: a card of the hostfile cannot compute in the type.
    """
    configured = request.config.model.dtype
    original = original_dtype(request)
    stated, unstated, unknown = _stated_devices(request)
    if configured != "auto":
        dtype = configured
        text = ""
    elif unknown and not original:
        return request, f"model.dtype=auto: decided when the ranks meet ({unknown})"
    else:
        found = [
            DeviceTypes(f"the {device.name} of {host}", device.kind, frozenset(device.flops))
            for host, device in stated
        ]
        if unstated and not original:
            choose_accelerator(os.environ)
            found += device_types.device_types()
        dtype = original or lowest_common(found)
        text = _reason(dtype, original, found, request)
    common_type([device for _, device in stated], dtype)
    if unstated:
        from fedspeed.engine.arithmetic import check_arithmetic

        choose_accelerator(os.environ)
        device_types.check_dtype(dtype, str(request.folder) if text and original else "")
        check_arithmetic(request.config.engine.matmul, request.config.engine.deterministic)
    return (request.with_dtype(dtype) if text else request), text


def _stated_devices(request: RunRequest) -> tuple[list[tuple[str, Device]], bool, str]:
    """Return what the hostfile and probes state about the devices of the hosts that work.

    Returns:
        (host, device) of the hosts with facts; whether there are hosts without; why a card is unknown.
    """
    config = request.config
    launch = from_process(request.hostfile)
    hosts = (
        local_hosts(launch, config.cluster.local_ranks, config.data.clients, server=config.has_server)
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
