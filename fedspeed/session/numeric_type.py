"""What model.dtype=auto comes to: decided once for all ranks of a job, by their devices, and kept for the
whole life of a run."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from fedspeed.cluster.devices import choose_accelerator
from fedspeed.cluster.discover import from_process
from fedspeed.cluster.local import local_hosts
from fedspeed.cluster.rendezvous import Store
from fedspeed.cluster.topology import plan
from fedspeed.config.load import Loaded
from fedspeed.errors import JournalError, PlanError
from fedspeed.models.numeric_types import NAMES, DeviceTypes, lowest_common, told
from fedspeed.planner.hardware import Device, common_type, node_of
from fedspeed.session.measured import read_probe_file
from fedspeed.session.order import Job, Order
from fedspeed.session.standing import journal_of
from fedspeed.session.together import CheckIn


def begun_type(order: Order) -> str:
    """The type that the run in the folder began with; empty for a new one. A journal that cannot be read is
    refused elsewhere."""
    if order.fresh:
        return ""
    try:
        entry = journal_of(order).latest()
    except JournalError:
        return ""
    dtype = entry.config.get("model", {}).get("dtype") if entry else None
    return dtype if dtype in NAMES else ""


def as_begun(order: Order) -> Order:
    """The order in the type that its run began with, if there is one and the configuration names no other."""
    begun = begun_type(order) if order.config.model.dtype == "auto" else ""
    return order.settled(begun) if begun else order


@dataclass(frozen=True)
class Decided:
    """A job whose type is decided. `text` tells how, empty where the configuration names one; `begun`: by an
    earlier start of the same run."""

    job: Job
    text: str = ""
    begun: bool = False


def agree(job: Job, store: Store) -> Decided:
    """Decide the type of a job. Collective over the ranks that carry clients; rank 0 passes the check-in in
    any case."""
    if job.config.model.dtype != "auto":
        return Decided(job)
    with CheckIn(job, store, "devices"):
        from fedspeed.engine.device_types import device_types

        [mine] = device_types(job.launch.local_rank)
        store.put(_types_key(job.me), json.dumps([mine.name, mine.kind, sorted(mine.types)]))
        if job.reporter:
            store.put("types/begun", begun_type(job.order))
    begun, *words = store.get("types/begun", *map(_types_key, job.workers))
    devices = [DeviceTypes(name, kind, frozenset(types)) for name, kind, types in map(json.loads, words)]
    dtype = begun or lowest_common(devices)
    return Decided(
        Job(job.order.settled(dtype), job.launch, job.topology),
        _why(dtype, begun, devices, job.order),
        bool(begun),
    )


def alone(loaded: Loaded) -> Loaded:
    """A configuration in the type that the devices of this process decide, for what runs in one process."""
    if loaded.config.model.dtype != "auto":
        return loaded
    from fedspeed.engine.device_types import device_types

    choose_accelerator(os.environ)
    return Order(loaded).settled(lowest_common(device_types())).loaded


def _types_key(rank: int) -> str:
    return f"types/{rank}"


def _why(dtype: str, begun: str, devices: list[DeviceTypes], order: Order) -> str:
    return (
        f"model.dtype={dtype} (auto: the run in {order.folder} began in it)"
        if begun
        else told(dtype, devices)
    )


def expect(order: Order) -> tuple[Order, str]:
    """What `agree` will come to, as far as it can be known before the ranks meet: from the hostfile's cards
    and probes, and from this machine's own devices for hosts of which nothing is stated. The text is empty
    where the configuration names a type.

    Raises:
        ModelError: this machine cannot compute in the type. ConfigError: nor as engine.matmul and
            engine.deterministic say. PlanError: a stated card cannot compute in the type.
    """
    asked, begun = order.config.model.dtype, begun_type(order)
    stated, unstated, unknown = _stated_devices(order)
    if asked != "auto":
        dtype, text = asked, ""
    elif unknown and not begun:
        return order, f"model.dtype=auto: decided when the ranks meet ({unknown})"
    else:
        found = [
            DeviceTypes(f"the {device.name} of {host}", device.kind, frozenset(device.flops))
            for host, device in stated
        ]
        if unstated and not begun:
            from fedspeed.engine.device_types import device_types

            choose_accelerator(os.environ)
            found += device_types()
        dtype = begun or lowest_common(found)
        text = _why(dtype, begun, found, order)
    common_type([device for _, device in stated], dtype)
    if unstated:
        from fedspeed.engine.arithmetic import check_arithmetic
        from fedspeed.engine.device_types import check_dtype

        choose_accelerator(os.environ)
        check_dtype(dtype, str(order.folder) if text and begun else "")
        check_arithmetic(order.config.engine.matmul, order.config.engine.deterministic)
    return (order.settled(dtype) if text else order), text


def _stated_devices(order: Order) -> tuple[list[tuple[str, Device]], bool, str]:
    """(host and device of the hosts that work, by the hostfile and probes; whether there are hosts without a
    word; why a stated card is unknown)."""
    config, launch = order.config, from_process(order.hostfile)
    hosts = (
        local_hosts(launch, config.cluster.local_ranks, config.data.clients)
        if launch.kind == "none"
        else launch.hosts
    )
    working = {
        place.host
        for place in plan(hosts, config.data.clients, config.cluster.ranks_per_client).ranks
        if place.clients
    }
    probes = [read_probe_file(Path(config.cluster.probe))] if config.cluster.probe else []
    stated, unstated, unknown = [], False, ""
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
