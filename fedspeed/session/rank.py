"""The life of one rank, from meeting the other ranks to its ending; all parts are connected here."""

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedspeed import activity
from fedspeed.cluster import rendezvous
from fedspeed.cluster.discover import from_process
from fedspeed.cluster.heartbeat import Heartbeat
from fedspeed.cluster.topology import topology_of, warnings
from fedspeed.cluster.torch_world import torch_world_env
from fedspeed.config.check import notes
from fedspeed.data.clients import encode_client
from fedspeed.data.prompt_format import with_template
from fedspeed.data.rows import Row
from fedspeed.engine.world import join_world, leave_world, quiet
from fedspeed.errors import EXIT_OK, EXIT_RESUMABLE, LostPeerError
from fedspeed.federation.arrays import Arrays
from fedspeed.federation.run_progress import Progress
from fedspeed.log import LOG
from fedspeed.models.checks import weight_notes
from fedspeed.monitor.clock import StageClock
from fedspeed.monitor.comparison import Comparison, ComparisonRow
from fedspeed.monitor.monitor import Monitor, NoMonitor
from fedspeed.routing.checks import routing_notes
from fedspeed.routing.transport import Transport
from fedspeed.session import auto_values, components, exporting, participant, reporting, resume, shared_gpus
from fedspeed.session.coordination import CheckIn, StopFlag, find_lost
from fedspeed.session.ending import Ending, status_of
from fedspeed.session.explain import as_user_error, lost_ranks_error
from fedspeed.session.forecast import forecast
from fedspeed.session.hosts import several_hosts
from fedspeed.session.input_digests import journal_digests
from fedspeed.session.rank_inputs import Inputs, read_inputs
from fedspeed.session.refusal import AbortableTransport, abort, report_refusal
from fedspeed.session.request import Job, RunRequest

if TYPE_CHECKING:  # they load torch
    from fedspeed.engine.client_engine import ClientEngine
    from fedspeed.federation.rank_components import RankComponents

LEAVE_S = 60.0  # for rank 0, which holds the store, to wait for the other ranks at the end
SHORT_LEAVE_S = 10.0  # the same where ranks may be lost and the run goes on
GRACE_S = 30.0  # from a loss until a rank that still waits for the lost one ends itself
REPORT_S = 5.0  # for the reporting rank to write its report before other ranks end, and end it with them
REPORTED = "reported"  # key in the store: the report is written


def run_rank(request: RunRequest) -> Ending:
    """Take part in the run as the rank that the environment variables name; return how it ended.

    Raises:
        FedSpeedError: the run failed for a reason that the user can act on. Other exceptions are unexpected.
    """
    stop = StopFlag()
    launch = from_process(request.hostfile)
    config = request.config
    job = Job(request, launch, topology_of(config, launch.hosts))
    with activity.during("the wait for all ranks"):
        store = rendezvous.meet(launch, config.cluster.start_timeout_s)
    if job.world_rank == 0:
        routing_remarks = routing_notes(config.routing, len(job.topology.contributors))
        _log_all([*warnings(job.topology), *notes(config), *routing_remarks])
    mpi_transport = participant.open_mpi_transport(job, store)
    try:
        with components.show_progress(job):
            if job.is_worker:
                ending = _work(job, store, mpi_transport, stop)
            else:
                ending = _stand_by(job, store, mpi_transport)
    except BaseException as error:
        reported = as_user_error(error, job)
        _end_all_ranks(reported, job, store, mpi_transport)
        if reported is error:
            raise
        raise reported from error
    rendezvous.leave(store, LEAVE_S if job.vital_ranks == job.required_ranks else SHORT_LEAVE_S)
    return ending


def _end_all_ranks(
    error: BaseException, job: Job, store: rendezvous.Store, mpi_transport: Transport | None
) -> None:
    """Report bad input once for all ranks; in an MPI job, end all of them."""
    report_refusal(error, job.request.json_out, store)
    if mpi_transport is None or job.launch.world_size == 1:
        return
    if isinstance(error, LostPeerError) and not job.reporter:
        # The abort ends the reporting rank too, which may still be writing its report.
        store.wait([REPORTED], GRACE_S + REPORT_S)
    assert isinstance(mpi_transport, AbortableTransport)
    abort(error, mpi_transport)


@dataclass(frozen=True)
class _OtherRanks:
    """How a rank observes the others.

    Attributes:
        store: the store that all ranks share.
        heartbeat: tells which ranks are lost.
        exit_when_stuck: ends this rank where it waits for a lost one in a call that cannot be interrupted.
    """

    store: rendezvous.Store
    heartbeat: Heartbeat
    exit_when_stuck: reporting.ExitWhenStuck


def _work(job: Job, store: rendezvous.Store, mpi_transport: Transport | None, stop: StopFlag) -> Ending:
    """Read and check the inputs, connect to the other ranks, and take part in the rounds."""
    lock = resume.RunLock()
    shared_gpus.publish_gpu(job, store)
    decided = auto_values.resolve(job, store)
    job = decided.job
    if job.reporter:
        _log_all(decided.texts)
    inputs = read_inputs(job, store, lock, decided.is_original_dtype)
    if job.reporter:
        _log_all(weight_notes(job.config))
    exit_when_stuck = reporting.ExitWhenStuck(job)
    others = _OtherRanks(store, _heartbeat(job, store, exit_when_stuck), exit_when_stuck)
    join_cluster(job, store)
    transport = participant.open_transport(job, store, mpi_transport)
    try:
        return _federate(job, others, transport, inputs=inputs, lock=lock, stop=stop)
    except BaseException:
        job.deployment.give_up(transport)
        raise


@contextmanager
def _closed_in_order() -> Iterator[ExitStack]:
    """Yield a stack that is unwound only if nothing was raised.

    Closing a part waits for other ranks, which may be lost after a failure.
    """
    stack = ExitStack()
    yield stack
    stack.close()


def _federate(
    job: Job,
    others: _OtherRanks,
    transport: Transport | None,
    *,
    inputs: Inputs,
    lock: resume.RunLock,
    stop: StopFlag,
) -> Ending:
    """Build the parts of this rank, resume from the journal, and run the remaining rounds."""
    from fedspeed.federation.rank_components import run_method, start

    with ExitStack() as always, _closed_in_order() as closing:
        # Swap files are as large as the model, and a later start cannot use them.
        closing.callback(shutil.rmtree, components.swap_folder(job), ignore_errors=True)
        closing.callback(leave_world)
        clock = StageClock(trace=components.make_trace(job))
        engine = _build_engine(job, clock, inputs, closing)
        own = participant.make_participant(job, others.store, transport, others.heartbeat)
        _close_later(closing, own, transport)
        closing.callback(others.heartbeat.close)
        link = participant.make_link(job, engine, own)
        role = components.make_role(job, inputs.data, inputs.public)
        journal = resume.journal_of(job.request)
        arrays = participant.first_arrays(job, engine, link)
        method = run_method(job.config, arrays, sites=participant.count_sites(job, engine, own))
        fresh = start(job.config, arrays, method)
        first = fresh.state  # training a client alone starts from it too
        agreement = participant.make_agreement(job, own)
        progress = resume.resume(
            job.config, link, journal=journal, entry=inputs.entry, role=role, fresh=fresh, agreement=agreement
        )
        data = components.make_data_report(job, link, inputs.data, inputs.all_clients)
        monitor = components.make_monitor(job, progress.round if inputs.entry else 0, lock, data)
        always.callback(monitor.close)
        always.callback(clock.trace.close)
        others.exit_when_stuck.monitor = monitor
        services = components.make_services(
            job,
            journal=journal,
            record=_record(job, inputs),
            monitor=monitor,
            clock=clock,
            stop=stop,
            channel=participant.make_channel(job, engine, own),
            witness=participant.make_signed_broadcast(job, own),
            certifier=agreement,
        )
        tasks = components.make_round_tasks(job, inputs.eval_tasks, inputs.tokenizer)
        rank_components = components.assemble_rank(
            job, role, engine, link, method=method, services=services, task_evaluator=tasks
        )
        try:
            progress = _run_rounds(job, rank_components, progress, stop)
            clock.trace.close()
            return _finish(job, rank_components, progress, inputs, start=first, monitor=monitor)
        except Exception as error:
            error.add_note(f"round {progress.round} was the last finished round")
            reported = _report_failure(job, others, monitor, error)
            raise reported from (None if reported is error else error)


def _build_engine(job: Job, clock: StageClock, inputs: Inputs, closing: ExitStack) -> "ClientEngine":
    """Build this rank's engine, and register its closing."""
    with activity.during("the building of the engine"):
        engine = components.make_engine(job, clock, inputs.sharers)
    closing.callback(engine.close)
    return engine


def _close_later(
    closing: ExitStack, own: participant.Participant | None, transport: Transport | None
) -> None:
    """Register the closing of the exchange, or of a transport without one: all ranks open and close MPI's."""
    if own is not None:
        closing.callback(own.exchange.close)
    elif transport is not None:
        closing.callback(transport.close)


def _record(job: Job, inputs: Inputs) -> dict:
    """Return the journal's record of the configuration, with digests of the inputs on the reporting rank."""
    return job.request.record | (
        {"inputs": journal_digests(job.config, inputs.all_clients)} if job.reporter else {}
    )


def _run_rounds(job: Job, rank_components: "RankComponents", progress: Progress, stop: StopFlag) -> Progress:
    """Evaluate the start of a new run, and run all remaining rounds."""
    from fedspeed.federation import rounds

    if job.reporter:
        if progress.is_resumed:
            LOG.info(f"going on after round {progress.round} of {job.config.federation.rounds}")
        stop.on_request = lambda where: reporting.note_stop_request(job.request.folder, where)
    rounds.baseline(rank_components, progress)
    stop.in_rounds = True
    return rounds.run(rank_components, progress)


def _finish(
    job: Job,
    rank_components: "RankComponents",
    progress: Progress,
    inputs: Inputs,
    *,
    start: Arrays,
    monitor: Monitor | NoMonitor,
) -> Ending:
    """Compare, export and report the result of the rounds.

    The reporting rank does so for all; a client's own model is exported by the rank that carries the client.

    Args:
        start: the state before the first round.
    """
    comparison = _compare(job, rank_components, progress, inputs, start=start)
    exported = None
    if progress.done:
        exported = exporting.export_models(
            job,
            rank_components,
            progress,
            inputs.tokenizer,
            monitor.row_table,
            data=with_template(job.config.data, _all_rows(inputs)),
        )
    if not isinstance(monitor, Monitor):  # another rank reports
        if progress.done:
            return Ending(status=status_of(progress.done), exit_code=EXIT_OK)
        return Ending(status="preempted", exit_code=EXIT_RESUMABLE)
    if not progress.done:
        return reporting.stop_early(job, progress.round, monitor, progress.renewed)
    assert exported is not None  # the reporting rank exports the common model
    return reporting.finish(
        job, progress, monitor, exported=exported, comparison=comparison, predicted=forecast(job, inputs.data)
    )


def _all_rows(inputs: Inputs) -> Iterator[Row]:
    return (row for client in inputs.all_clients for row in (*client.train, *client.val))


def _compare(
    job: Job, rank_components: "RankComponents", progress: Progress, inputs: Inputs, *, start: Arrays
) -> Comparison | None:
    """Train each client alone and compare with the federated model, where the configuration asks for it."""
    if not (progress.done and job.config.federation.compare_alone):
        return None
    from fedspeed.evaluation.compare import compare

    client_data = [encode_client(rows, inputs.tokenizer, job.config.data) for rows in inputs.all_clients]
    scores = compare(rank_components, progress, start=start, client_data=client_data)
    return Comparison(tuple(ComparisonRow(s.name, s.held_out_loss, s.accuracy) for s in scores))


def _report_failure(
    job: Job, others: _OtherRanks, monitor: Monitor | NoMonitor, error: Exception
) -> BaseException:
    """Note a failure in the store; the reporting rank finds the lost ranks and writes the report.

    Return the error as users see it.
    """
    reported = as_user_error(error, job)
    rendezvous.publish(others.store, f"failed/{job.world_rank}", str(reported))
    lost = []
    if job.reporter and isinstance(reported, LostPeerError):
        lost = find_lost(job, others.store, others.heartbeat)
    others.heartbeat.close(goodbye=False)
    if isinstance(monitor, Monitor):
        try:
            reporting.report_failure(job, monitor, reported, lost)
        except OSError as second:  # the cause of the failure, such as a full disk, may prevent the report too
            LOG.info(f"the report could not be written: {second}")
        rendezvous.publish(others.store, REPORTED, "")
    return reported


def _stand_by(job: Job, store: rendezvous.Store, mpi_transport: Transport | None) -> Ending:
    """Be a rank without work: leave at once, except rank 0, which holds the store until all workers left."""
    if job.world_rank == 0:
        points = {
            "gpus": shared_gpus.may_share_gpus(job),
            "devices": job.config.model.dtype == "auto",
            "ready": True,
            "inputs": several_hosts(job),
            "fresh": job.request.fresh,
        }
        for point in (point for point, passed in points.items() if passed):
            with CheckIn(job, store, point):
                pass
        heartbeat = _heartbeat(job, store, reporting.ExitWhenStuck(job))
        while rendezvous.ranks_not_left(store, job.workers, 1.0):
            if lost := heartbeat.lost():
                store.wait([REPORTED], GRACE_S)
                raise lost_ranks_error(job, lost)
        heartbeat.close()
    if mpi_transport is not None:
        mpi_transport.close()
    return Ending(status="finished", exit_code=EXIT_OK)


def _heartbeat(job: Job, store: rendezvous.Store, exit_when_stuck: reporting.ExitWhenStuck) -> Heartbeat:
    heartbeat_timeout_s = job.config.cluster.heartbeat_timeout_s
    grace_s = GRACE_S if job.reporter else GRACE_S + REPORT_S
    return Heartbeat(
        store,
        job.vital_ranks,
        job.world_rank,
        interval_s=heartbeat_timeout_s / 12,
        heartbeat_timeout_s=heartbeat_timeout_s,
        on_stuck=exit_when_stuck,
        grace_s=grace_s,
    )


def join_cluster(job: Job, store: rendezvous.Store) -> None:
    """Join the torch world of this rank's cluster, or of its client where the client is a pipeline."""
    from fedspeed.engine.arithmetic import set_arithmetic

    timeout_s = job.config.cluster.start_timeout_s
    os.environ.update(torch_world_env(store, job.world, job.launch, timeout_s))
    # torchrun's agent has a store for the world that it started, which is not this cluster's world.
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    quiet()
    set_arithmetic(job.config.engine.matmul, job.config.engine.deterministic)
    components.preload()  # a forked rank has imported them already
    join_world(job.config.routing.deadline_s)


def _log_all(texts: list[str]) -> None:
    for text in texts:
        LOG.info(text)
