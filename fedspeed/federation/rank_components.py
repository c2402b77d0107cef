"""The components of one rank in the rounds, and the function that assembles them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from fedspeed.checkpoint.journal import Journal
from fedspeed.config.run import RunConfig
from fedspeed.engine.capabilities import check_capabilities
from fedspeed.engine.client_engine import ClientEngine
from fedspeed.errors import FedSpeedError
from fedspeed.federation import server_optimizer
from fedspeed.federation.arrays import Arrays
from fedspeed.federation.contribution import Transform
from fedspeed.federation.evaluators import Evaluator, TaskEvaluator
from fedspeed.federation.link import ClientLink
from fedspeed.federation.methods.base import Method, make_method, method_class
from fedspeed.federation.pacing import Pace
from fedspeed.federation.recorder import Recorder, StopSignals
from fedspeed.federation.role import RankRole
from fedspeed.federation.round_monitor import RoundMonitor
from fedspeed.federation.run_progress import Progress, ProgressWriter
from fedspeed.federation.shared_channel import SharedChannel
from fedspeed.federation.state_agreement import RunArrays
from fedspeed.federation.tensors import as_arrays
from fedspeed.federation.trainer import Trainer
from fedspeed.federation.updates.base import hidden_by, make_transforms, shared_seed
from fedspeed.federation.witness import ServerWitness, StateCertifier
from fedspeed.models.adapters import initial_adapter
from fedspeed.models.lora_ranks import shape_of_rank, unequal_ranks
from fedspeed.monitor.clock import StageClock


@dataclass(frozen=True, kw_only=True)
class RankComponents:
    """The components that one rank runs its rounds with. Every rank of every client runs the same rounds;
    `RankRole` says what differs.

    Attributes:
        weights: by client of the rank, its weight: the answer tokens of its training rows.
        transform: applied to updates before they are sent; None: they are sent as they are.
        witness: signs or verifies the results of the method's server
            (routing.signed_broadcast.SignedBroadcast), on gateways; None on other ranks, and where there is
            no server.
        task_evaluator: scores the common model on evaluation tasks; None where there are none, and on the
            server.
    """

    config: RunConfig
    role: RankRole
    engine: ClientEngine
    link: ClientLink
    method: Method
    trainer: Trainer
    pace: Pace
    progress_writer: ProgressWriter
    recorder: Recorder
    evaluators: Sequence[Evaluator]
    weights: dict[int, float]
    transform: Transform | None = None
    witness: ServerWitness | None = None
    task_evaluator: TaskEvaluator | None = None


@dataclass(frozen=True, kw_only=True)
class RunServices:
    """The services of the session that the rounds use: what they write to and are stopped by.

    Attributes:
        fingerprint, record: of the run's configuration, for the journal (checkpoint.journal.Entry).
        monitor: receives local steps and records of rounds. clock: of this rank's stages.
        peak_bytes: returns the peak memory of this rank.
        channel: between the method's server and the clients; None where there is no server.
        witness: see `RankComponents`.
        certifier: collects the signatures of all sites for a state, on the gateway of a site; None elsewhere.
    """

    journal: Journal
    fingerprint: str
    record: dict[str, Any]
    monitor: RoundMonitor
    clock: StageClock
    peak_bytes: Callable[[], int]
    signals: StopSignals
    channel: SharedChannel | None = None
    witness: ServerWitness | None = None
    certifier: StateCertifier | None = None


def own_arrays(config: RunConfig, engine: ClientEngine, *, is_server: bool = False) -> RunArrays:
    """Return the arrays that this rank's engine was built with, by their names in the state; where the method
    has a server, `state_agreement.united_arrays` unites them with those of the other role.
    """
    chosen = config.federation.method
    role: Literal["client", "server"] = "server" if is_server else "client"
    return RunArrays(method_class(chosen.name).arrays_of(chosen, _built_state(config, engine), role=role))


def _built_state(config: RunConfig, engine: ClientEngine) -> Arrays:
    """Return the weights that the engine was built with. With adapter.rank_by_client they have
    adapter.lora_rank on all ranks, whatever the engine's own; the first values of all engines are drawn alike
    from run.seed.
    """
    state = as_arrays(engine.state())
    if not config.adapter.rank_by_client:
        return state
    lora_rank = config.adapter.lora_rank
    return as_arrays({
        name: initial_adapter(name, torch.Size(shape_of_rank(name, array.shape, lora_rank)), config.run.seed)
        for name, array in state.items()
    })


def run_method(config: RunConfig, first: RunArrays, *, sites: int = 0) -> Method:
    """Build this rank's instance of the run's method, for the arrays that a run begins with.

    Args:
        sites: see `Method`.
    """
    return make_method(
        config.federation.method,
        first.arrays,
        clients=config.data.clients,
        seed=config.run.seed,
        hides=hidden_by(config.federation.updates),
        server_arrays=first.server_only,
        clients_per_round=config.federation.clients_per_round,
        sites=sites,
        lora_ranks=unequal_ranks(config.adapter, config.data.clients),
    )


def start(config: RunConfig, first: RunArrays, method: Method) -> Progress:
    """Return the progress before round 1, alike on all ranks.

    Args:
        first: the arrays that the run begins with.

    Raises:
        FedSpeedError: the method cannot start from them.
    """
    problem = method.start_problem(config.federation.method, first.arrays)
    if problem:
        raise FedSpeedError(problem)
    state = method.first_state(first.arrays)
    return Progress(0, state, server_optimizer.init(config.federation, state))


def weights_of(role: RankRole) -> dict[int, float]:
    """Return the weight of each of a rank's clients."""
    return {client: data.weight for client, data in role.clients.items()}


def assemble(
    config: RunConfig,
    role: RankRole,
    engine: ClientEngine,
    link: ClientLink,
    *,
    method: Method,
    services: RunServices,
    evaluators: Sequence[Evaluator],
    task_evaluator: TaskEvaluator | None = None,
) -> RankComponents:
    """Assemble the components of a rank. Collective over the client where the run has transforms of updates.

    Args:
        method: from `run_method`.

    Raises:
        ConfigError: the engine lacks a capability that the method needs.
    """
    listed = config.federation.updates
    transforms = make_transforms(listed, shared_seed(engine) if listed else None)
    needs = method.server_needs if role.server else method.needs
    asker = f"federation.method={config.federation.method.name}"
    check_capabilities(needs, engine.kind, asker, zero_stage=engine.zero_stage)
    return RankComponents(
        config=config,
        role=role,
        engine=engine,
        link=link,
        method=method,
        trainer=Trainer(config, role, engine, method, monitor=services.monitor, channel=services.channel),
        pace=Pace(config, role.cluster, engine),
        progress_writer=ProgressWriter(
            config,
            role,
            services.journal,
            method=method,
            fingerprint=services.fingerprint,
            record=services.record,
            certifier=services.certifier,
        ),
        recorder=Recorder(
            config,
            role,
            engine,
            link,
            monitor=services.monitor,
            clock=services.clock,
            peak_bytes=services.peak_bytes,
            signals=services.signals,
            hides=transforms.hides,
            spent=transforms.spent,
            told=(lambda: link.bytes_shared + (services.channel.bytes_sent if services.channel else 0)),
        ),
        evaluators=tuple(evaluators),
        task_evaluator=task_evaluator,
        weights=weights_of(role),
        transform=transforms or None,
        witness=services.witness,
    )
