"""Transport, identity, exchange and server channel of a rank that is a participant of the exchange.

Participants are the gateways, each for the clients that it carries, and the first rank of a method's server.
The other ranks of a client have no `Participant`: their gateway passes the results on to them.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from fedspeed.cluster.heartbeat import Heartbeat
from fedspeed.cluster.rendezvous import Store
from fedspeed.config.run import RunConfig
from fedspeed.federation.checks import least_participants, participants_of
from fedspeed.federation.link import ClientLink
from fedspeed.federation.methods.config import secure_sum_of
from fedspeed.federation.shared_channel import SharedChannel
from fedspeed.federation.state_agreement import RunArrays, united_arrays
from fedspeed.routing.arrivals import ArrivalTracker
from fedspeed.routing.channel import Channel
from fedspeed.routing.config import TRANSPORTS
from fedspeed.routing.exchange import Exchange, PlainExchange
from fedspeed.routing.opening import TransportContext
from fedspeed.routing.transport import Transport
from fedspeed.session.coordination import StoreArrivalTracker
from fedspeed.session.deployment import Identity
from fedspeed.session.engine_spec import engine_spec
from fedspeed.session.request import Job

if TYPE_CHECKING:  # they load torch and cryptography, which a supervisor does without
    from fedspeed.engine.client_engine import ClientEngine
    from fedspeed.routing.signed_broadcast import SignedBroadcast
    from fedspeed.session.site_agreement import SiteAgreement


@dataclass(frozen=True, kw_only=True)
class Participant:
    """Hold what a participant has and a client's other ranks have not.

    Attributes:
        transport: connects all participants.
        exchange: sums vectors over all participants.
        identity: the key of this participant, where updates are masked or a server signs its results; None
            elsewhere.
    """

    transport: Transport
    exchange: Exchange
    identity: Identity | None


def open_mpi_transport(job: Job, store: Store) -> Transport | None:
    """Open the transport of a job that communicates by MPI; return None for any other job.

    All ranks open it together, before anything is read. Collective over all ranks.
    """
    return _open(job, store) if TRANSPORTS[job.transport].started_by_mpi else None


def open_transport(job: Job, store: Store, mpi_transport: Transport | None) -> Transport | None:
    """Return the transport of this rank; None on a rank that is no participant and has no MPI transport.

    Collective over the participants. It is opened before the engines, which take unequal times to build.

    Args:
        mpi_transport: from `open_mpi_transport`.

    Raises:
        LostPeerError: the other participants could not be reached.
    """
    if mpi_transport is not None or not job.is_participant:
        return mpi_transport
    return _open(job, store)


def _open(job: Job, store: Store) -> Transport:
    timeout_s = job.config.cluster.start_timeout_s
    deployment = job.deployment
    context = TransportContext(
        asked=job.config.routing.transport,
        me=job.world_rank,
        participants=job.topology.participants,
        world_size=job.launch.world_size,
        timeout_s=timeout_s,
        connect=lambda prefix: store.connect(prefix, timeout_s),
        interfaces=lambda: store.interfaces(job.topology.participants),
        member=deployment.membership,
    )
    return deployment.open_transport(job.transport, context)


def make_participant(
    job: Job, store: Store, transport: Transport | None, heartbeat: Heartbeat
) -> Participant | None:
    """Build the exchange of this rank; return None on a rank that is no participant.

    Collective over the participants.

    Args:
        transport: from `open_transport`.
    """
    if not job.is_participant:
        return None
    assert transport is not None  # every participant opens one
    routing = job.config.routing
    arrivals = None if job.outlives_losses else StoreArrivalTracker(job, store, heartbeat)
    identity = None
    if routing.anonymous or job.topology.server:
        identity = job.deployment.identity(transport, job.request.fingerprint)
    exchange: Exchange
    if routing.anonymous:
        assert identity is not None
        exchange = make_anonymous_exchange(job, transport, identity, arrivals)
    else:
        exchange = make_plain_exchange(job.config, transport, arrivals)
    return Participant(transport=transport, exchange=exchange, identity=identity)


def make_plain_exchange(config: RunConfig, transport: Transport, arrivals: ArrivalTracker | None) -> Exchange:
    """Build the exchange of mode plain: sums in the clear, or the pairwise-masked sum of a method that has
    one (`secure_sum_of`).

    Args:
        arrivals: see `make_anonymous_exchange`.
    """
    deadline_s = config.routing.deadline_s
    encoding = secure_sum_of(config.federation.method)
    if encoding == "none":
        return PlainExchange(transport, deadline_s, arrivals)
    from fedspeed.routing.pairwise.encodings import ENCODINGS
    from fedspeed.routing.pairwise.exchange import PairwiseExchange

    return PairwiseExchange(transport, deadline_s, arrivals, encoding=ENCODINGS[encoding]())


def make_anonymous_exchange(
    job: Job, transport: Transport, identity: Identity, arrivals: ArrivalTracker | None
) -> Exchange:
    """Build the exchange of the masked modes, which refuses a sum of too few participants.

    Args:
        arrivals: tells who has reached an exchange; None where it goes on without lost participants.
    """
    from fedspeed.routing.anonymous.exchange import AnonymousExchange

    servers = int(bool(job.topology.server))  # a server takes part, but adds nothing that hides the others
    adding = participants_of(job.config, job.topology, transport.size - servers)
    spec = engine_spec(job.config, job.request.deepspeed, "client")
    least = least_participants(job.config, adding, spec)
    routing = replace(job.config.routing, min_participants=least + servers)
    return AnonymousExchange(
        transport,
        routing,
        identity.key,
        roster=identity.members,
        settings=identity.settings,
        names=identity.names,
        arrivals=arrivals,
        marks=job.deployment.settled_marks(job.request.folder),
    )


def make_agreement(job: Job, participant: Participant | None) -> "SiteAgreement | None":
    """Build this site's agreements with the others about the state of the run.

    Return None in a job of one operator, and on a rank that is no participant.
    """
    if participant is None:
        return None
    return job.deployment.make_agreement(participant.exchange, is_fresh=job.request.is_first_fresh_start)


def make_link(job: Job, engine: "ClientEngine", participant: Participant | None) -> ClientLink:
    """Build this rank's access to the exchange: its own, or that of its client's gateway."""
    if participant is None:
        return ClientLink(engine, None, job.config.routing.deadline_s)
    return ClientLink(engine, participant.exchange, participant.exchange.max_wait_s)


def count_sites(job: Job, engine: "ClientEngine", participant: Participant | None) -> int:
    """Return how many sites of the roster have clients, on every rank of a client; 0 in a job of one
    operator. A site that is lost later still counts, so that the number is the same on all of them.
    """
    if not job.config.routing.between_organisations:
        return 0
    sites = 0 if participant is None else participant.transport.size - int(bool(job.topology.server))
    return int(engine.share_from_gateway(np.array([float(sites)]))[0])


def first_arrays(job: Job, engine: "ClientEngine", link: ClientLink) -> RunArrays:
    """Return the arrays that the run begins with: those of the engine or, if the method has a server, of the
    engines of all roles. The engine learns which of them others have. Collective over all ranks.

    Raises:
        ConfigError: the arrays of participants contradict each other.
    """
    from fedspeed.federation.rank_components import own_arrays

    topology = job.topology
    own = own_arrays(job.config, engine, is_server=job.is_server)
    if not topology.server:
        return own
    united = united_arrays(
        link,
        own.arrays,
        server=topology.participants.index(topology.server[0]),
        is_server=job.is_server,
        names=[job.describe(rank) for rank in topology.participants],
        method=job.config.federation.method.name,
        max_mib=job.config.routing.message_mib,
    )
    engine.elsewhere = united.clients_only if job.is_server else united.server_only
    return united


def make_channel(job: Job, engine: "ClientEngine", participant: Participant | None) -> SharedChannel | None:
    """Build the channel between the method's server and the clients; return None without a server."""
    topology = job.topology
    if not topology.server:
        return None
    channel = None
    if participant is not None:
        names = [job.describe(rank) for rank in topology.participants]
        routing = job.config.routing
        channel = Channel(
            participant.transport, routing.deadline_s, names=names, max_bytes=routing.message_mib << 20
        )
    return SharedChannel(
        engine,
        channel,
        server=topology.participants.index(topology.server[0]),
        speakers=[topology.participants.index(gateway) for gateway in topology.gateways],
        ranks=[len(client.ranks) for client in topology.clients],
    )


def make_signed_broadcast(job: Job, participant: Participant | None) -> "SignedBroadcast | None":
    """Build the signed broadcast of the server's results.

    Return None where the method has no server, and on a rank that is no participant.
    """
    if not job.topology.server or participant is None:
        return None
    from fedspeed.routing.signed_broadcast import SignedBroadcast

    identity = participant.identity
    assert identity is not None  # every participant of a run with a server has one
    participants = job.topology.participants
    return SignedBroadcast(
        participant.exchange,
        identity.key,
        identity.members,
        identity.settings,
        speaker=participants.index(job.topology.server[0]),
        names=[job.describe(rank) for rank in participants],
    )
