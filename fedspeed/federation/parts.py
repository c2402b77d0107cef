"""What one rank brings to the rounds: each part has one responsibility, and is put together here."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fedspeed.checkpoint.journal import Journal
from fedspeed.config.run import RunConfig
from fedspeed.engine.capabilities import check_capabilities
from fedspeed.engine.client_engine import ClientEngine
from fedspeed.errors import FedSpeedError
from fedspeed.federation import server
from fedspeed.federation.contributing import Transform
from fedspeed.federation.evaluators import Evaluator
from fedspeed.federation.keeping import Keeper, Progress
from fedspeed.federation.link import ClientLink
from fedspeed.federation.methods.base import Method, make_method
from fedspeed.federation.pacing import Pace
from fedspeed.federation.recording import Recorder, Signals
from fedspeed.federation.role import RankRole
from fedspeed.federation.shared_channel import SharedChannel
from fedspeed.federation.tensors import as_arrays
from fedspeed.federation.trainer import Trainer
from fedspeed.federation.updates.base import hidden_by, make_updates, shared_seed


@dataclass(frozen=True, kw_only=True)
class RankParts:
    """One rank's parts of a federated run. Every rank of every client runs the same rounds; see `RankRole`
    for what differs.

    Attributes:
        weights: what each of the rank's clients counts, by client: the answer tokens of its training rows.
        transform: what is done to updates before they leave; None: nothing.
        witness: of what the method's server says (routing.signed_broadcast.SignedBroadcast), on the ranks that speak to
            others; None elsewhere, and where there is no server.
    """

    config: RunConfig
    role: RankRole
    engine: ClientEngine
    link: ClientLink
    method: Method
    trainer: Trainer
    pace: Pace
    keeper: Keeper
    recorder: Recorder
    evaluators: Sequence[Evaluator]
    weights: dict[int, float]
    transform: Transform | None = None
    witness: Any = None


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What a run writes to and is told from.

    Attributes:
        fingerprint, record: of its configuration, for the journal (checkpoint.journal.Entry).
        channel: to the method's server and from it, None where there is none. witness: of what it says.
        monitor: takes steps and records. clock: of this rank's stages. peak_bytes: the most memory it has
            held.
    """

    journal: Journal
    fingerprint: str
    record: dict
    monitor: Any
    clock: Any
    peak_bytes: Callable[[], int]
    signals: Signals
    channel: SharedChannel | None = None
    witness: Any = None


def run_method(config: RunConfig, engine: ClientEngine) -> Method:
    """Build the run's method for the weights that the engine trains: one for all that this rank does."""
    return make_method(
        config.federation.method,
        as_arrays(engine.state()),
        clients=config.data.clients,
        seed=config.run.seed,
        hides=hidden_by(config.federation.updates),
    )


def start(config: RunConfig, engine: ClientEngine, method: Method) -> Progress:
    """Return the state before round 1: what the engine was built with, the same on every rank.

    Raises:
        FedSpeedError: the method cannot start from it.
    """
    state = as_arrays(engine.state())
    chosen = config.federation.method
    if problem := method.start_problem(chosen, state):
        raise FedSpeedError(problem)
    state = method.first_state(state)
    return Progress(0, state, server.init(config.federation, state))


def weights_of(role: RankRole) -> dict[int, float]:
    """Return what each of a rank's clients counts: the answer tokens of its training rows."""
    return {
        client: float(sum(row.answer_tokens for row in data.train)) for client, data in role.clients.items()
    }


def assemble(
    config: RunConfig,
    role: RankRole,
    engine: ClientEngine,
    link: ClientLink,
    *,
    method: Method,
    surroundings: Surroundings,
    evaluators: Sequence[Evaluator],
) -> RankParts:
    """Put a rank's parts together. Collective over the client where the run has transforms of updates.

    Args:
        method: that the run was started with, see `run_method`.

    Raises:
        ConfigError: the engine is not capable of what the method needs.
    """
    around = surroundings
    chosen = config.federation.method
    listed = config.federation.updates
    updates = make_updates(listed, shared_seed(engine) if listed else None)
    needs = method.server_needs if role.server else method.needs
    check_capabilities(needs, engine.kind, f"federation.method={chosen.name}")
    return RankParts(
        config=config,
        role=role,
        engine=engine,
        link=link,
        method=method,
        trainer=Trainer(config, role, engine, method, monitor=around.monitor, channel=around.channel),
        pace=Pace(config, role.cluster, engine),
        keeper=Keeper(
            config, role, around.journal, method=method, fingerprint=around.fingerprint, record=around.record
        ),
        recorder=Recorder(
            config,
            role,
            engine,
            link,
            monitor=around.monitor,
            clock=around.clock,
            peak_bytes=around.peak_bytes,
            signals=around.signals,
            hides=updates.hides,
            spent=updates.spent,
        ),
        evaluators=tuple(evaluators),
        weights=weights_of(role),
        transform=updates or None,
        witness=around.witness,
    )
