"""One short function for every part of a rank that is built from the configuration."""

import os
from pathlib import Path

from fedspeed.cluster.layout import seat as seat_of
from fedspeed.cluster.pulse import Pulse
from fedspeed.cluster.rendezvous import Store
from fedspeed.config.show import render
from fedspeed.errors import FedSpeedError
from fedspeed.session.order import Job
from fedspeed.session.standing import Claim
from fedspeed.session.together import RollCall


def preload() -> None:
    """The imports that all ranks of a machine share; nothing that starts a thread or touches a device."""
    import peft  # noqa: F401
    import transformers.models.auto.modeling_auto  # noqa: F401

    import fedspeed.engine.build
    import fedspeed.federation.rounds
    import fedspeed.routing.exchange  # noqa: F401


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


def engine(job: Job, clock):
    import torch

    from fedspeed.engine.build import build_engine

    config, topology = job.config, job.topology
    torch.set_num_threads(config.engine.threads or int(os.environ.get("OMP_NUM_THREADS") or
                                                       max(1, (os.cpu_count() or 1) // int(os.environ["LOCAL_SIZE"]))))
    cluster = topology.cluster_of(job.place.cluster)
    sets = sorted({tuple(cluster.ranks.index(r) for r in topology.clients[c].ranks) for c in cluster.clients})
    host, _ = seat_of(job.launch.hosts, job.me)
    nvme = Path(host.nvme) / job.order.folder.name if host.nvme else job.order.folder / "nvme"
    return build_engine(config.model, config.adapter, config.train, config.engine, job.order.deepspeed, sets, clock,
                        nvme / f"rank-{job.me}", config.run.seed)


def link(job: Job, store: Store, transport, engine, pulse: Pulse):
    """(the rank's link to the exchange, what closes it)."""
    from fedspeed.federation.link import ClientLink
    from fedspeed.routing.exchange import PlainExchange
    from fedspeed.routing.transports.local import LocalTransport

    config, participants = job.config, job.topology.participants
    deadline = config.routing.deadline_s
    if not job.speaks:
        return ClientLink(engine, None, deadline), (transport.close if transport else lambda: None)
    if transport is None:
        if len(participants) == 1:
            transport = LocalTransport.set_of(1)[0]
        else:
            from fedspeed.routing.transports.gloo import GlooTransport

            transport = GlooTransport(store.connect("exchange", config.cluster.start_timeout_s), participants.index(job.me),
                                      len(participants), config.cluster.start_timeout_s)
    exchange = PlainExchange(transport, deadline, RollCall(job, store, pulse))
    return ClientLink(engine, exchange, deadline), exchange.close


def seat(job: Job, data: dict):
    from fedspeed.federation.rounds import Seat

    return Seat(data, job.workers.index(job.me), len(job.workers), job.speaks, job.reporter, job.place.cluster)


def monitor(job: Job, resume_round: int, claim: Claim):
    from fedspeed.monitor.monitor import Monitor, NoMonitor

    if not job.reporter:
        return NoMonitor()
    order, config, folder = job.order, job.config, job.order.folder
    folder.mkdir(parents=True, exist_ok=True)
    claim.take(folder)
    (folder / "report.md").unlink(missing_ok=True)  # it speaks of how an earlier start ended, and this one may end without a word
    return Monitor(folder, config.monitor, config.routing.mode, config.federation.rounds, json_out=order.json_out,
                   resume_round=resume_round, config_text=render(order.loaded, order.deepspeed))
