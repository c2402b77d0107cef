"""One short function for every part of a rank that is built from the configuration."""

import contextlib
import gc
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from fedspeed.checkpoint.journal import Journal
from fedspeed.cluster.heartbeat import Heartbeat
from fedspeed.cluster.launch_context import host_of_rank
from fedspeed.cluster.rendezvous import Store
from fedspeed.config.show import render
from fedspeed.data.clients import ClientData, row_counts
from fedspeed.data.findings import findings
from fedspeed.data.row_counts import DataReport, RowTable, count_values
from fedspeed.engine.base.choose import pipeline_tier
from fedspeed.engine.world import import_deepspeed
from fedspeed.errors import FedSpeedError, PlanError
from fedspeed.federation.checks import least_participants, participants_of
from fedspeed.federation.link import ClientLink
from fedspeed.federation.role import RankRole
from fedspeed.federation.shared_channel import SharedChannel
from fedspeed.federation.updates.base import hidden_by
from fedspeed.models.planned import planned_shape
from fedspeed.monitor import summary_file
from fedspeed.monitor.clock import peak_bytes
from fedspeed.monitor.metrics.metric import WEIGHTS
from fedspeed.monitor.monitor import Monitor, NoMonitor
from fedspeed.monitor.trace import NoTrace, Trace
from fedspeed.monitor.working import Working
from fedspeed.planner.hardware import node_of
from fedspeed.planner.pipeline.division import Traffic, client_traffic, cluster_traffic, divide
from fedspeed.planner.profiles import profile_of
from fedspeed.planner.task import task_of
from fedspeed.routing.channel import Channel
from fedspeed.routing.config import TRANSPORTS
from fedspeed.routing.exchange import Exchange, PlainExchange
from fedspeed.routing.opening import TransportContext
from fedspeed.routing.transport import Transport
from fedspeed.session.coordination import RollCall
from fedspeed.session.deployment import Identity
from fedspeed.session.engine_spec import engine_spec
from fedspeed.session.explain import out_of_memory
from fedspeed.session.measured import read_probe_file
from fedspeed.session.reporting import STOP_REQUEST_FILE
from fedspeed.session.request import Job
from fedspeed.session.resume import RunLock


def preload() -> None:
    """Import what all ranks of a machine share; nothing that starts a thread or touches a device.

    Of what the imports make nearly all stays: looking for garbage among it meanwhile would take a tenth of
    their time.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        import peft  # noqa: F401
        import transformers.models.auto.modeling_auto  # noqa: F401

        import fedspeed.federation.rounds  # noqa: F401

        import_deepspeed()
    finally:
        if collecting:
            gc.enable()


def mpi_transport(job: Job, store: Store) -> Transport | None:
    """Build the transport that all ranks of a job build together, before anything is read, as MPI's is; None
    where the job takes another one. Collective over all ranks.
    """
    return _opened(job, store) if TRANSPORTS[job.transport].started_by_mpi else None


def transport(job: Job, store: Store, early: Transport | None) -> Transport | None:
    """Return what the exchange travels by; None on a rank that does not speak for clients. Built by all
    participants together, before the engines, which take unequal times.

    Args:
        early: what `mpi_transport` has built.

    Raises:
        LostPeerError: the others could not be reached.
    """
    return early if early is not None or not job.is_participant else _opened(job, store)


def _opened(job: Job, store: Store) -> Transport:
    timeout_s = job.config.cluster.start_timeout_s
    deployment = job.deployment
    meeting = TransportContext(
        asked=job.config.routing.transport,
        me=job.world_rank,
        participants=job.topology.participants,
        world_size=job.launch.world_size,
        timeout_s=timeout_s,
        connect=lambda prefix: store.connect(prefix, timeout_s),
        member=deployment.membership,
    )
    return deployment.open_transport(job.transport, meeting)


def engine(job: Job, clock, sharers: int):
    """Build this rank's engine; `sharers`: how many ranks compute on its device."""
    import torch

    from fedspeed.engine.build import EngineContext, build_engine

    config = job.config
    topology = job.topology
    torch.set_num_threads(config.engine.threads or _own_threads(os.environ))
    sets = sorted({
        tuple(job.world.index(r) for r in client.ranks)
        for client in topology.clients
        if client.ranks[0] in job.world
    })
    role = "server" if job.is_server else "client"
    if config.engine.pipeline != "none":
        config = replace(config, engine=replace(config.engine, cuts=stage_cuts(job)))
    try:
        spec = engine_spec(config, job.request.deepspeed, role)
        context = EngineContext(
            client_sets=[tuple(range(len(job.world)))] if job.is_server else sets,
            clock=clock,
            nvme=swap_folder(job),
            seed=config.run.seed,
            clients=1 if job.is_server else len(job.place.clients),
            sharers=sharers,
        )
        return build_engine(spec, context)
    except (MemoryError, OSError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise FedSpeedError(
            f"{job.describe(job.world_rank)}: no memory left while the model was loaded "
            f"({str(error).splitlines()[0]}); free some, raise the limit (ulimit -v, the scheduler's "
            "--mem), or choose another engine.tier: `fedspeed plan` says what each needs"
        ) from error


def _own_threads(env: Mapping[str, str]) -> int:
    """Return how many threads a rank computes with: what the launcher says, else its part of the host's
    cores.
    """
    return int(env.get("OMP_NUM_THREADS") or max(1, (os.cpu_count() or 1) // int(env["LOCAL_SIZE"])))


def stage_cuts(job: Job) -> tuple[int, ...] | str:
    """Where this rank's pipeline is cut, as engine.cuts says it: by the speed and memory of the devices that
    the hostfile or a probe tells of; evenly where they tell of none.
    """
    config = job.config
    ds_config = job.request.deepspeed
    if config.engine.cuts != "auto" or pipeline_tier(config.engine, ds_config, "") != "resident":
        return config.engine.cuts
    probes = [read_probe_file(Path(config.cluster.probe))] if config.cluster.probe else []
    try:
        nodes = {host.name: node_of(host, probes) for host in job.launch.hosts}
    except PlanError:  # neither measured nor a known card
        return "auto"
    task = task_of(
        config, ds_config, planned_shape(config.model.base), [node.device for node in nodes.values()]
    )
    cuts = divide(task, [profile_of(job.topology, nodes, rank) for rank in job.world], _traffic(job))
    if cuts is None:
        raise PlanError(
            f"engine.pipeline={config.engine.pipeline}: {len(job.world)} ranks do not hold the model's "
            f"{task.shape.layers} blocks together; take more ranks, or engine.tier=ram"
        )
    return tuple(cuts[1:-1]) or "auto"


def _traffic(job: Job) -> Traffic:
    """What this rank's pipeline is to carry."""
    config = job.config
    ranks = len(job.world)
    gateways = [client.gateway for client in job.topology.clients if client.ranks[0] in job.world]
    owners = [
        job.world.index(gateway)
        for i, gateway in enumerate(gateways)
        if gateways[:i].count(gateway) < (config.engine.client_slots or len(gateways))
    ]
    rows = config.train.micro_batch
    micros = config.train.accumulation * len(owners)
    recompute = config.engine.activation_checkpointing
    if config.engine.pipeline == "cluster":
        return cluster_traffic(ranks, owners, rows, micros, recompute)
    return client_traffic(ranks, rows, micros, recompute, len(owners))


def swap_folder(job: Job) -> Path:
    """Return where this rank alone keeps what it offloads to NVMe. The name says whose it is: many runs may
    share the disk.
    """
    host, _ = host_of_rank(job.launch.hosts, job.world_rank)
    folder = job.request.folder
    return (Path(host.nvme) if host.nvme else folder / "nvme") / f"{folder.name}-rank-{job.world_rank}"


def identity(job: Job, transport: Transport | None) -> Identity | None:
    """Return who this rank is among the participants, where anything is masked or signed; None elsewhere, and
    on a rank that does not speak to them. Collective over the participants.
    """
    if not (job.is_participant and (job.config.routing.anonymous or job.topology.server)):
        return None
    return job.deployment.identity(transport, job.request.fingerprint)


def exchange(
    job: Job, store: Store, transport: Transport | None, heartbeat: Heartbeat, own: Identity | None
) -> Exchange | None:
    """Return the exchange of this rank; None on one that does not speak to other participants.

    Args:
        own: see `identity`.
    """
    if not job.is_participant:
        return None
    routing = job.config.routing
    roll = None if job.outlives_losses else RollCall(job, store, heartbeat)
    if not routing.anonymous:
        return PlainExchange(transport, routing.deadline_s, roll)
    from fedspeed.routing.anonymous.exchange import AnonymousExchange

    servers = int(bool(job.topology.server))  # it is one of the participants, and hides nobody
    spoken = participants_of(job.config, job.topology, transport.size - servers)
    client = engine_spec(job.config, job.request.deepspeed, "client")
    least = least_participants(job.config, spoken, client)
    routing = replace(routing, min_participants=least + servers)
    return AnonymousExchange(
        transport, routing, own.key, roster=own.members, settings=own.settings, roll=roll
    )


def channel(job: Job, engine, transport: Transport | None) -> SharedChannel | None:
    """Return the way between the method's server and the clients; None where there is no server.

    Args:
        transport: that the gateway speaks over; any on a rank that does not speak to others.
    """
    if not job.topology.server:
        return None
    number = job.topology.participants.index
    names = [job.describe(rank) for rank in job.topology.participants]
    own = Channel(transport, job.config.routing.deadline_s, names=names) if job.is_participant else None
    return SharedChannel(
        engine,
        own,
        server=number(job.topology.server[0]),
        speakers=[number(gateway) for gateway in job.topology.gateways],
    )


def witness(job: Job, exchange: Exchange | None, own: Identity | None):
    """Return the signed broadcast of the method's server (routing.signed_broadcast.SignedBroadcast); None on
    a rank that does not speak to others, and where there is no server.
    """
    if not (job.topology.server and job.is_participant):
        return None
    from fedspeed.routing.signed_broadcast import SignedBroadcast

    participants = job.topology.participants
    return SignedBroadcast(
        exchange,
        own.key,
        own.members,
        own.settings,
        speaker=participants.index(job.topology.server[0]),
        names=[job.describe(rank) for rank in participants],
    )


def link(job: Job, engine, exchange: Exchange | None) -> ClientLink:
    """Return the way of this rank into the exchange."""
    max_wait_s = job.config.routing.deadline_s if exchange is None else exchange.max_wait_s
    return ClientLink(engine, exchange, max_wait_s)


def role(job: Job, data: dict, public: ClientData | None) -> RankRole:
    """Return what this rank is in the rounds.

    Args:
        data: encoded rows of its clients, by client. public: what the server trains on, on its ranks.
    """
    return RankRole(
        clients=data,
        worker_index=job.workers.index(job.world_rank),
        ranks=len(job.workers),
        gateway=job.is_participant,
        reporter=job.reporter,
        cluster=job.place.cluster,
        server=job.is_server,
        public_rows=public,
    )


def services(
    job: Job, *, journal: Journal, record: dict, monitor, clock, stop: Callable[[], bool], channel, witness
):
    """Return the services of the session that the rounds use (federation.parts.RunServices).

    Args:
        record: of the configuration, for the journal. stop: whether this process is to end.
        channel, witness: see the functions of these names.
    """
    from fedspeed.federation.parts import RunServices, StopSignals

    return RunServices(
        journal=journal,
        fingerprint=job.request.fingerprint,
        record=record,
        monitor=monitor,
        clock=clock,
        peak_bytes=peak_bytes,
        signals=StopSignals(stop, job.deployment.renewal(job.is_participant)),
        channel=channel,
        witness=witness,
    )


def federated(job: Job, role: RankRole, engine, link: ClientLink, *, method, services):
    """Return this rank's parts of the rounds (federation.parts.RankParts).

    Args:
        method: of the run (federation.parts.run_method).
    """
    from fedspeed.evaluation.held_out import HeldOut
    from fedspeed.federation.parts import assemble

    evaluators = [HeldOut(job.config.train, role)]
    return assemble(job.config, role, engine, link, method=method, services=services, evaluators=evaluators)


def data_report(job: Job, link: ClientLink, data: dict, everyone: list) -> DataReport:
    """Return what is to be said about the rows. Collective: every rank counts the rows of its own clients
    only, and what all have counted is summed; where clients may learn no more than sums, or a transform of
    updates hides what each counts, over all clients.

    Args:
        data: encoded rows of this rank's clients, by client. everyone: rows of all clients of this job.
    """
    config = job.config
    sums_only = config.routing.sums_only or WEIGHTS in hidden_by(config.federation.updates)
    own = np.zeros((1 if sums_only else config.data.clients, 3))
    for client, rows in data.items():
        own[0 if sums_only else client] += count_values(row_counts(rows))
    counted = link.sum(own.reshape(-1), 0.0).vector.tolist()
    table = RowTable.from_values(counted, config.data.max_tokens, sums_only)
    mine = RowTable.of([row_counts(rows) for rows in data.values()], config.data.max_tokens).total
    return DataReport(table, (*job.deployment.own_rows_notes(mine), *findings(config.data, everyone)))


def trace(job: Job):
    """Return what keeps what this rank does in the first rounds, as far as it is to be kept."""
    rounds = job.config.monitor.trace_rounds
    late = job.config.federation.staleness  # a round ends in the next one then
    return Trace(job.request.folder, job.world_rank, rounds + late) if rounds else NoTrace()


def working(job: Job):
    """Return what shows work that takes long, on the rank that reports."""
    return Working() if job.reporter and job.config.monitor.progress else contextlib.nullcontext()


def monitor(job: Job, resume_round: int, claim: RunLock, data: DataReport | None = None):
    """Return what shows and keeps what the run does, on the rank that reports; takes its folder.

    Args:
        resume_round: the last round that is finished and stays.
    """
    if not job.reporter:
        return NoMonitor()
    request = job.request
    config = job.config
    folder = job.request.folder
    folder.mkdir(parents=True, exist_ok=True)
    claim.take(folder)
    job.deployment.keep_epoch(folder)
    # These speak of how an earlier start ended, and this one may end without a word.
    for name in (STOP_REQUEST_FILE, "report.md", summary_file.NAME):
        (folder / name).unlink(missing_ok=True)
    return Monitor(
        folder,
        config.monitor,
        config.routing.mode,
        config.federation.rounds,
        json_out=request.json_out,
        resume_round=resume_round,
        data=data,
        config_text=render(request.loaded, request.deepspeed),
        hides=hidden_by(config.federation.updates),
    )
