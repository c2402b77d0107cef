"""Building of a rank's parts from the configuration, one function each.

`participant` builds those that only participants of the exchange have.
"""

import contextlib
import gc
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fedspeed.checkpoint.journal import Journal
from fedspeed.cluster.launch_context import host_of_rank
from fedspeed.config.show import render
from fedspeed.data.clients import ClientData, ClientRows
from fedspeed.data.encode import Tokenizer
from fedspeed.data.eval_task import EvalTask
from fedspeed.data.prompt_template import template_for
from fedspeed.data.row_counts import COUNTS, DataReport, RowTable, count_values
from fedspeed.data.row_remarks import row_remarks
from fedspeed.engine.base.placement import pipeline_tier
from fedspeed.engine.lean_imports import import_models
from fedspeed.engine.world import import_deepspeed
from fedspeed.errors import FedSpeedError, PlanError
from fedspeed.federation.link import ClientLink
from fedspeed.federation.methods.base import Method, method_class
from fedspeed.federation.role import RankRole
from fedspeed.federation.shared_channel import SharedChannel
from fedspeed.federation.updates.base import hidden_by
from fedspeed.federation.witness import StateCertifier
from fedspeed.models.lora_ranks import of_rank
from fedspeed.models.planned_shape import planned_shape
from fedspeed.monitor import summary_file
from fedspeed.monitor.activity_line import ActivityLine
from fedspeed.monitor.clock import StageClock, peak_bytes
from fedspeed.monitor.metrics.metric import WEIGHTS
from fedspeed.monitor.monitor import Monitor, NoMonitor
from fedspeed.monitor.trace import NoTrace, Trace
from fedspeed.planner.hardware import node_of
from fedspeed.planner.pipeline.division import Traffic, client_traffic, cluster_traffic, divide
from fedspeed.planner.profiles import profile_of
from fedspeed.planner.task import task_of
from fedspeed.session.client_ranks import engine_rank
from fedspeed.session.engine_spec import engine_spec
from fedspeed.session.explain import out_of_memory
from fedspeed.session.planner_inputs import read_probe_file
from fedspeed.session.reporting import STOP_REQUEST_FILE
from fedspeed.session.request import Job
from fedspeed.session.resume import RunLock

if TYPE_CHECKING:  # they load torch and cryptography, which a supervisor does without
    from fedspeed.engine.client_engine import ClientEngine
    from fedspeed.federation.evaluators import TaskEvaluator
    from fedspeed.federation.rank_components import RankComponents, RunServices
    from fedspeed.routing.signed_broadcast import SignedBroadcast


def preload() -> None:
    """Import the libraries that all ranks of a machine share, before they are forked.

    None of them starts a thread or touches a device. Garbage collection is off meanwhile: nearly all objects
    stay, and looking through them would take a tenth of the time.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        import_models()

        import fedspeed.federation.rounds  # noqa: F401

        import_deepspeed()
    finally:
        if collecting:
            gc.enable()


def make_engine(job: Job, clock: StageClock, sharers: int) -> "ClientEngine":
    """Build this rank's engine. Collective over its torch world.

    Args:
        clock: measures the stages of a round. sharers: how many ranks compute on this rank's device.

    Raises:
        FedSpeedError: the model does not fit, or there is no memory left.
    """
    import torch

    from fedspeed.engine.build import EngineContext, build_engine

    config = job.config
    topology = job.topology
    torch.set_num_threads(config.engine.threads or _thread_count(os.environ))
    sets = sorted({
        tuple(job.world.index(r) for r in client.ranks)
        for client in topology.clients
        if client.ranks[0] in job.world
    })
    role: Literal["client", "server"] = "server" if job.is_server else "client"
    if config.engine.pipeline != "none":
        config = replace(config, engine=replace(config.engine, cuts=stage_cuts(job)))
    try:
        spec = engine_spec(config, job.request.deepspeed, role)
        if config.adapter.rank_by_client:
            spec = replace(spec, adapter=of_rank(spec.adapter, engine_rank(job, spec.kind)))
        context = EngineContext(
            client_sets=[tuple(range(len(job.world)))] if job.is_server else sets,
            clock=clock,
            nvme=swap_folder(job),
            seed=config.run.seed,
            clients=_server_slots(job) if job.is_server else len(job.place.clients),
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


def _server_slots(job: Job) -> int:
    """Return the number of client slots of the engine of the method's server."""
    chosen = job.config.federation.method
    return method_class(chosen.name).server_slots(chosen, len(job.topology.contributors))


def _thread_count(env: Mapping[str, str]) -> int:
    """Return the number of CPU threads of a rank: the launcher's, else its share of the host's cores."""
    return int(env.get("OMP_NUM_THREADS") or max(1, (os.cpu_count() or 1) // int(env["LOCAL_SIZE"])))


def stage_cuts(job: Job) -> tuple[int, ...] | Literal["auto"]:
    """Return the first block of each stage but the first of this rank's pipeline, as in engine.cuts.

    Stages are balanced by the speed and memory of the devices, as the hostfile or a probe gives them; `auto`
    (even stages) where neither does.

    Raises:
        PlanError: the ranks together do not have the memory.
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
    """Return the micro-batches that this rank's pipeline carries in a step."""
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
    """Return the folder for this rank's offloaded states on NVMe.

    Its name holds the run and the rank, because several runs may share the drive.
    """
    host, _ = host_of_rank(job.launch.hosts, job.world_rank)
    folder = job.request.folder
    return (Path(host.nvme) if host.nvme else folder / "nvme") / f"{folder.name}-rank-{job.world_rank}"


def make_role(job: Job, data: Mapping[int, ClientData], public: ClientData | None) -> RankRole:
    """Return this rank's role in the rounds.

    Args:
        data: encoded rows of its clients, by client.
        public: encoded rows that the server trains on, on the server's ranks; None elsewhere.
    """
    cluster = job.place.cluster
    assert cluster is not None  # a rank that works is in a cluster
    return RankRole(
        clients=data,
        worker_index=job.workers.index(job.world_rank),
        ranks=len(job.workers),
        gateway=job.is_participant,
        reporter=job.reporter,
        cluster=cluster,
        server=job.is_server,
        public_rows=public,
    )


def make_services(
    job: Job,
    *,
    journal: Journal,
    record: dict,
    monitor: Monitor | NoMonitor,
    clock: StageClock,
    stop: Callable[[], bool],
    channel: SharedChannel | None,
    witness: "SignedBroadcast | None",
    certifier: StateCertifier | None = None,
) -> "RunServices":
    """Collect the services of the session that the rounds use.

    Args:
        record: of the configuration, for the journal. stop: returns whether this process was asked to end.
        channel, witness: see `participant.make_channel` and `participant.make_signed_broadcast`.
        certifier: see `participant.make_agreement`.
    """
    from fedspeed.federation.rank_components import RunServices, StopSignals

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
        certifier=certifier,
    )


def assemble_rank(
    job: Job,
    role: RankRole,
    engine: "ClientEngine",
    link: ClientLink,
    *,
    method: Method,
    services: "RunServices",
    task_evaluator: "TaskEvaluator | None" = None,
) -> "RankComponents":
    """Build this rank's parts of the rounds.

    Args:
        method: of the run (federation.rank_components.run_method).
        task_evaluator: from `make_round_tasks`.
    """
    from fedspeed.evaluation.held_out import HeldOut
    from fedspeed.federation.rank_components import assemble

    evaluators = [HeldOut(job.config.train, role)]
    return assemble(
        job.config,
        role,
        engine,
        link,
        method=method,
        services=services,
        evaluators=evaluators,
        task_evaluator=task_evaluator,
    )


def make_round_tasks(
    job: Job, tasks: Sequence[tuple[EvalTask, Sequence[Any]]], tokenizer: Tokenizer
) -> "TaskEvaluator | None":
    """Return the evaluator of the run's evaluation tasks; None where there are none, and on the server.

    Args:
        tasks: with all items of each, the same on all ranks. The clients that ranks carry divide them.
    """
    if not tasks or job.is_server:
        return None
    from fedspeed.evaluation.round_tasks import RoundTasks

    groups = job.topology.contributors
    own = groups.index(job.topology.clients[job.place.clients[0]].gateway)
    return RoundTasks(
        config=job.config.evaluation,
        tasks=[(task, items[own :: len(groups)]) for task, items in tasks],
        tokenizer=tokenizer,
        template=template_for(job.config.data, tokenizer),
        rounds=job.config.federation.rounds,
    )


def make_data_report(
    job: Job, link: ClientLink, data: Mapping[int, ClientData], all_clients: Sequence[ClientRows]
) -> DataReport:
    """Count the rows of all clients for the report. Collective over all ranks that carry clients.

    Each rank counts the rows of its own clients, and the counts are exchanged: per client, or summed over all
    clients where clients may learn sums only, or a transform of updates hides each client's weight.

    Args:
        data: encoded rows of this rank's clients, by client.
        all_clients: rows of all clients of this job.
    """
    config = job.config
    sums_only = config.routing.sums_only or WEIGHTS in hidden_by(config.federation.updates)
    own = np.zeros((1 if sums_only else config.data.clients, COUNTS))
    for client, rows in data.items():
        own[0 if sums_only else client] += count_values(rows.counts)
    counted = link.sum(own.reshape(-1), 0.0).vector.tolist()
    table = RowTable.from_values(counted, config.data.max_tokens, sums_only)
    mine = RowTable.of([rows.counts for rows in data.values()], config.data.max_tokens).total
    return DataReport(table, (*job.deployment.own_rows_notes(mine), *row_remarks(config.data, all_clients)))


def make_trace(job: Job) -> NoTrace:
    """Return the trace of this rank's first rounds; one that records nothing where none is asked for."""
    rounds = job.config.monitor.trace_rounds
    late = job.config.federation.staleness  # with staleness 1, a round ends during the next one
    return Trace(job.request.folder, job.world_rank, rounds + late) if rounds else NoTrace()


def show_progress(job: Job) -> contextlib.AbstractContextManager:
    """Return a context that shows what the reporting rank is doing; one that does nothing on other ranks."""
    return ActivityLine() if job.reporter and job.config.monitor.progress else contextlib.nullcontext()


def make_monitor(
    job: Job, resume_round: int, lock: RunLock, data: DataReport | None = None
) -> Monitor | NoMonitor:
    """Build the monitor of the reporting rank and lock the run's folder; other ranks get a NoMonitor.

    Args:
        resume_round: the last finished round; 0 for a new run.
    """
    if not job.reporter:
        return NoMonitor()
    request = job.request
    config = job.config
    folder = job.request.folder
    folder.mkdir(parents=True, exist_ok=True)
    lock.take(folder)
    job.deployment.keep_epoch(folder)
    # These files describe the end of an earlier start; this one may end without writing them.
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
