"""One short function for every part of a rank that is built from the configuration."""

import contextlib
import errno
import gc
import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from fedspeed.cluster.layout import seat as seat_of
from fedspeed.cluster.pulse import Pulse
from fedspeed.cluster.rendezvous import Store
from fedspeed.config.show import render
from fedspeed.engine.base.choose import pipeline_tier
from fedspeed.errors import FedSpeedError, LostPeerError, PlanError
from fedspeed.models.planned import planned_shape
from fedspeed.planner.hardware import node_of
from fedspeed.planner.pipeline.division import Traffic, client_traffic, cluster_traffic, divide
from fedspeed.planner.places import place_of
from fedspeed.planner.task import task_of
from fedspeed.session.last_words import ASKED_FILE
from fedspeed.session.measured import read_probe_file
from fedspeed.session.order import Job
from fedspeed.session.remedies import out_of_device_memory
from fedspeed.session.standing import Claim
from fedspeed.session.together import RollCall


def preload() -> None:
    """The imports that all ranks of a machine share; nothing that starts a thread or touches a device.

    Of what they make nearly all stays: looking for garbage among it meanwhile would take a tenth of their time.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        import peft  # noqa: F401
        import transformers.models.auto.modeling_auto  # noqa: F401

        import fedspeed.engine.build
        import fedspeed.federation.rounds
        import fedspeed.routing.exchange  # noqa: F401
        from fedspeed.engine.world import import_deepspeed

        import_deepspeed()
    finally:
        if collecting:
            gc.enable()


def mpi(job: Job):
    """The MPI transport where it is wanted, built by all ranks together; None elsewhere."""
    wanted, participants = job.config.routing.transport, job.topology.participants
    if wanted != "mpi" and not (wanted == "auto" and job.launch.kind == "openmpi" and len(participants) > 1):
        return None
    from fedspeed.routing.transports.mpi import MpiTransport, world_size

    if world_size() != job.launch.world_size:
        raise FedSpeedError(f"routing.transport={wanted}: MPI sees {world_size()} ranks, the launcher started {job.launch.world_size}; start "
                            "with mpirun, or set routing.transport=gloo")
    return MpiTransport(list(participants))


def engine(job: Job, clock, sharers: int):
    """Build this rank's engine; `sharers`: how many ranks compute on its device."""
    import torch

    from fedspeed.engine.build import build_engine

    config, topology = job.config, job.topology
    torch.set_num_threads(config.engine.threads or int(os.environ.get("OMP_NUM_THREADS") or
                                                       max(1, (os.cpu_count() or 1) // int(os.environ["LOCAL_SIZE"]))))
    sets = sorted({tuple(job.world.index(r) for r in client.ranks) for client in topology.clients if client.ranks[0] in job.world})
    options = replace(config.engine, cuts=stage_cuts(job)) if config.engine.pipeline != "none" else config.engine
    try:
        return build_engine(config.model, config.adapter, config.train, options, job.order.deepspeed, sets, clock, swap_folder(job),
                            config.run.seed, len(job.place.clients), sharers)
    except (MemoryError, OSError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise FedSpeedError(f"{job.named(job.me)}: no memory left while the model was loaded ({str(error).splitlines()[0]}); free some, raise the limit "
                            "(ulimit -v, the scheduler's --mem), or choose another engine.tier: `fedspeed plan` says what each needs") from error


def stage_cuts(job: Job) -> str:
    """Where this rank's pipeline is cut, as engine.cuts says it: by the speed and memory of the devices that the hostfile or a probe tells of; evenly where
    they tell of none."""
    config, ds_config = job.config, job.order.deepspeed
    if config.engine.cuts != "auto" or pipeline_tier(config.engine, ds_config, "") != "resident":
        return config.engine.cuts
    probes = [read_probe_file(Path(config.cluster.probe))] if config.cluster.probe else []
    try:
        nodes = {host.name: node_of(host, probes) for host in job.launch.hosts}
    except PlanError:  # neither measured nor a known card
        return "auto"
    task = task_of(config, ds_config, planned_shape(config.model.base), [node.device for node in nodes.values()])
    cuts = divide(task, [place_of(job.topology, nodes, rank) for rank in job.world], _traffic(job))
    if cuts is None:
        raise PlanError(f"engine.pipeline={config.engine.pipeline}: {len(job.world)} ranks do not hold the model's {task.shape.layers} blocks together; take "
                        "more ranks, or engine.tier=ram")
    return ",".join(map(str, cuts[1:-1])) or "auto"


def _traffic(job: Job) -> Traffic:
    """What this rank's pipeline is to carry."""
    config, ranks = job.config, len(job.world)
    gateways = [client.gateway for client in job.topology.clients if client.ranks[0] in job.world]
    owners = [job.world.index(gateway) for i, gateway in enumerate(gateways) if gateways[:i].count(gateway) < (config.engine.seats or len(gateways))]
    rows, micros, recompute = config.train.micro_batch, config.train.accumulation * len(owners), config.engine.activation_checkpointing
    if config.engine.pipeline == "cluster":
        return cluster_traffic(ranks, owners, rows, micros, recompute)
    return client_traffic(ranks, rows, micros, recompute, len(owners))


def out_of_memory(error: Exception) -> bool:
    """Whether there was no RAM to be had: Python, the system and torch's allocator each say so in their own
    way. Of a device that is full `last_words.told` tells."""
    if out_of_device_memory(error):
        return False
    return (isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM
            or isinstance(error, RuntimeError) and any(sign in str(error) for sign in ("can't allocate memory", "can't start new thread", "out of memory")))


def swap_folder(job: Job) -> Path:
    """Where this rank alone keeps what it offloads to NVMe. The name says whose it is: many runs may share the disk."""
    host, _ = seat_of(job.launch.hosts, job.me)
    return (Path(host.nvme) if host.nvme else job.order.folder / "nvme") / f"{job.order.folder.name}-rank-{job.me}"


def transport(job: Job, store: Store, mpi):
    """What the exchange travels by; None on a rank that does not speak. Built by all participants together, before the engines, which take
    unequal times.

    Raises:
        LostPeerError: the others could not be reached.
    """
    from fedspeed.routing.transport import TransportError
    from fedspeed.routing.transports.local import LocalTransport

    participants, timeout_s = job.topology.participants, job.config.cluster.start_timeout_s
    if job.config.routing.transport == "tls":
        from fedspeed.session import site

        return site.transport(job.site) if job.speaks else None
    if mpi is not None or not job.speaks:
        return mpi
    if len(participants) == 1:
        return LocalTransport.set_of(1)[0]
    from fedspeed.routing.transports.gloo import GlooTransport

    try:
        return GlooTransport(store.connect("exchange", timeout_s), participants.index(job.me), len(participants), timeout_s)
    except TransportError as error:
        raise LostPeerError(f"the gateways could not connect with each other: {error}") from error


def link(job: Job, store: Store, transport, engine, pulse: Pulse):
    """(the rank's link to the exchange, what closes it)."""
    from fedspeed.federation.link import ClientLink
    from fedspeed.routing.exchange import PlainExchange

    deadline = job.config.routing.deadline_s
    if not job.speaks:
        return ClientLink(engine, None, deadline), (transport.close if transport else lambda: None)
    roll = None if job.outlives_losses else RollCall(job, store, pulse)
    exchange = PlainExchange(transport, deadline, roll) if job.config.routing.mode == "plain" else _anonymous(job, transport, roll)
    return ClientLink(engine, exchange, exchange.patience_s), exchange.close


def _anonymous(job: Job, transport, roll):
    """The exchange of the masked modes. The participants of one job trust the launcher that started them: there each makes its key anew."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from fedspeed.routing.anonymous.crypto import digest
    from fedspeed.routing.anonymous.exchange import AnonymousExchange, meet

    routing = job.config.routing
    if routing.transport == "tls":
        return AnonymousExchange(transport, routing, job.site.key, job.site.roster.keys, job.site.digest, roll)
    key = Ed25519PrivateKey.generate()
    roster = meet(transport, job.config.cluster.start_timeout_s, key)
    return AnonymousExchange(transport, routing, key, roster, digest(job.order.marks.encode()), roll)


def seat(job: Job, data: dict):
    from fedspeed.federation.rounds import Seat

    return Seat(data, job.workers.index(job.me), len(job.workers), job.speaks, job.reporter, job.place.cluster)


def data_report(job: Job, link, data: dict, everyone: list):
    """What is to be said about the rows (data.row_counts.DataReport). Collective: every rank counts the rows of its own clients only, and
    what all have counted is summed; where clients may learn no more than sums, over all clients.

    Args:
        data, everyone: encoded rows of this rank's clients, rows of all clients of this job.
    """
    from fedspeed.data.clients import row_counts
    from fedspeed.data.findings import findings
    from fedspeed.data.row_counts import DataReport, RowTable, counts_text, words

    config, sums_only = job.config, job.config.routing.sums_only
    own = np.zeros((1 if sums_only else config.data.clients, 3))
    for client, rows in data.items():
        own[0 if sums_only else client] += words(row_counts(rows))
    table = RowTable.from_words(link.sum(own.reshape(-1), 0.0).vector.tolist(), config.data.max_tokens, sums_only)
    found = findings(config.data, everyone)
    mine = RowTable.of([row_counts(rows) for rows in data.values()], config.data.max_tokens).total
    if config.routing.transport == "tls" and mine.harmed:
        found.insert(0, f"of these rows, this site's own are {counts_text(mine)}")
    return DataReport(table, tuple(found))


def trace(job: Job):
    from fedspeed.monitor.trace import NoTrace, Trace

    rounds, late = job.config.monitor.trace_rounds, job.config.federation.staleness  # a round's exchange ends in the next one then
    return Trace(job.order.folder, job.me, rounds + late) if rounds else NoTrace()


def working(job: Job):
    """What shows work that takes long, on the rank that reports."""
    from fedspeed.monitor.working import Working

    return Working() if job.reporter and job.config.monitor.progress else contextlib.nullcontext()


def monitor(job: Job, resume_round: int, claim: Claim, data=None):
    from fedspeed.monitor.monitor import Monitor, NoMonitor

    if not job.reporter:
        return NoMonitor()
    order, config, folder = job.order, job.config, job.order.folder
    folder.mkdir(parents=True, exist_ok=True)
    claim.take(folder)
    if config.routing.transport == "tls":
        job.site.keep_epoch(folder)
    (folder / ASKED_FILE).unlink(missing_ok=True)
    for name in ("report.md", "summary.json"):  # they speak of how an earlier start ended, and this one may end without a word
        (folder / name).unlink(missing_ok=True)
    return Monitor(folder, config.monitor, config.routing.mode, config.federation.rounds, json_out=order.json_out,
                   resume_round=resume_round, data=data, config_text=render(order.loaded, order.deepspeed))
