"""The one place where parts are connected: the life of one rank, from meeting the others to its ending."""

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from fedspeed import activity
from fedspeed.cluster import rendezvous
from fedspeed.cluster.discover import from_process
from fedspeed.cluster.heartbeat import Heartbeat
from fedspeed.cluster.topology import topology_of, warnings
from fedspeed.config.check import notes
from fedspeed.data.clients import encode_client
from fedspeed.engine.world import join_world, leave_world, quiet
from fedspeed.errors import EXIT_OK, EXIT_RESUMABLE, LostPeerError
from fedspeed.federation.agreeing import check_arrays
from fedspeed.federation.arrays import Arrays
from fedspeed.federation.link import ClientLink
from fedspeed.log import LOG
from fedspeed.models.checks import weight_notes
from fedspeed.monitor.clock import StageClock
from fedspeed.monitor.comparison import Comparison, ComparisonRow
from fedspeed.routing.checks import routing_notes
from fedspeed.routing.transport import Transport
from fedspeed.session import components, exporting, numeric_type, reporting, resume, sharing
from fedspeed.session.coordination import CheckIn, StopFlag, find_lost
from fedspeed.session.ending import Ending
from fedspeed.session.explain import as_user_error, lost_ranks_error
from fedspeed.session.forecast import forecast
from fedspeed.session.hosts import several_hosts
from fedspeed.session.inputs import journal_digests
from fedspeed.session.reading import Inputs, read_inputs
from fedspeed.session.refusal import abort, report_refusal
from fedspeed.session.request import Job, RunRequest

GOODBYE_S = 60.0
BRIEF_GOODBYE_S = 10.0  # where ranks may be gone for good
GRACE_S = 30.0  # from a loss until a rank that is still waiting for the lost ends itself
REPORT_S = 5.0  # for the reporting rank, before those end that take it along
REPORTED = "reported"  # the key that says so


def run_rank(request: RunRequest) -> Ending:
    """Take part in the run as the rank that the environment says; return how it ended for this rank.

    Raises:
        FedSpeedError: what ended it, as a user can mend it. Any other exception is unexpected.
    """
    stop = StopFlag()
    launch = from_process(request.hostfile)
    config = request.config
    job = Job(request, launch, topology_of(config, launch.hosts))
    with activity.during("the wait for all ranks"):
        store = rendezvous.meet(launch, config.cluster.start_timeout_s)
    if job.world_rank == 0:
        asked_of = routing_notes(config.routing, len(job.topology.contributors))
        _say([*warnings(job.topology), *notes(config), *asked_of])
    early = components.mpi_transport(job, store)
    try:
        with components.working(job):
            ending = _work(job, store, early, stop) if job.is_worker else _stand_by(job, store, early)
    except BaseException as error:
        meant = as_user_error(error, job)
        _end_for_all(meant, job, store, early)
        if meant is error:
            raise
        raise meant from error
    rendezvous.leave(store, GOODBYE_S if job.vital_ranks == job.required_ranks else BRIEF_GOODBYE_S)
    return ending


def _end_for_all(error: BaseException, job: Job, store: rendezvous.Store, early: Transport | None) -> None:
    """Tell a failure of this rank as far as it is for all of them; under MPI, end them."""
    report_refusal(error, job.request.json_out, store)
    if early is None or job.launch.world_size == 1:
        return
    if isinstance(error, LostPeerError) and not job.reporter:
        # The reporter may be stuck still, and our end is the end of all ranks.
        store.wait([REPORTED], GRACE_S + REPORT_S)
    abort(error, early)


@dataclass(frozen=True)
class _Meeting:
    """How a rank knows of the others: their store, their heartbeat, and what ends it where neither helps."""

    store: rendezvous.Store
    heartbeat: Heartbeat
    last_resort: reporting.ExitWhenStuck


def _work(job: Job, store: rendezvous.Store, early: Transport | None, stop: StopFlag) -> Ending:
    """Agree with the others on what is to be done, read it, connect, and take part in the rounds."""
    claim = resume.RunLock()
    sharing.publish_card(job, store)
    decided = numeric_type.agree(job, store)
    job = decided.job
    if decided.text and job.reporter:
        _say([decided.text])
    inputs = read_inputs(job, store, claim, decided.begun)
    if job.reporter:
        _say(weight_notes(job.config))
    last_resort = reporting.ExitWhenStuck(job)
    meeting = _Meeting(store, _heartbeat(job, store, last_resort), last_resort)
    _join_cluster(job, store)
    transport = components.transport(job, store, early)
    try:
        return _federate(job, meeting, transport, inputs=inputs, claim=claim, stop=stop)
    except BaseException:
        job.deployment.give_up(transport)
        raise


@contextmanager
def _closed_in_order() -> Iterator[ExitStack]:
    """Give a stack that is unwound where nothing was raised: closing a part waits for other ranks, who may be
    lost.
    """
    stack = ExitStack()
    yield stack
    stack.close()


def _federate(
    job: Job,
    meeting: _Meeting,
    transport: Transport | None,
    *,
    inputs: Inputs,
    claim: resume.RunLock,
    stop: StopFlag,
) -> Ending:
    """Build the parts of this rank, go on from what the journal holds, and run the rounds that are left."""
    from fedspeed.federation.parts import run_method, start

    with ExitStack() as always, _closed_in_order() as closing:
        # As large as the model, and of no use to a later start.
        closing.callback(shutil.rmtree, components.swap_folder(job), ignore_errors=True)
        closing.callback(leave_world)
        clock = StageClock(trace=components.trace(job))
        with activity.during("the building of the engine"):
            engine = components.engine(job, clock, inputs.sharers)
        closing.callback(engine.close)
        own = components.identity(job, transport)
        exchange = components.exchange(job, meeting.store, transport, meeting.heartbeat, own)
        if open_part := exchange or transport:  # MPI's transport is closed by ranks too that have no exchange
            closing.callback(open_part.close)
        closing.callback(meeting.heartbeat.close)
        link = components.link(job, engine, exchange)
        role = components.role(job, inputs.data, inputs.public)
        journal = resume.journal_of(job.request)
        method = run_method(job.config, engine)
        fresh = start(job.config, engine, method)
        first = fresh.state  # what a client alone would start from too
        _agree(job, link, first)
        progress = resume.resume(
            job.config, job.deployment, link, journal=journal, entry=inputs.entry, role=role, fresh=fresh
        )
        data = components.data_report(job, link, inputs.data, inputs.everyone)
        monitor = components.monitor(job, progress.round if inputs.entry else 0, claim, data)
        always.callback(monitor.close)
        always.callback(clock.trace.close)
        meeting.last_resort.monitor = monitor
        services = components.services(
            job,
            journal=journal,
            record=_record(job, inputs),
            monitor=monitor,
            clock=clock,
            stop=stop,
            channel=components.channel(job, engine, transport),
            witness=components.witness(job, exchange, own),
        )
        federated = components.federated(job, role, engine, link, method=method, services=services)
        try:
            progress = _run_rounds(job, federated, progress, stop)
            clock.trace.close()
            return _end(job, federated, progress, inputs, start=first, monitor=monitor)
        except Exception as error:
            error.add_note(f"round {progress.round} was the last to be finished")
            meant = _tell_all(job, meeting, monitor, error)
            raise meant from (None if meant is error else error)


def _agree(job: Job, link: ClientLink, state: Arrays) -> None:
    """Hold the first state of this rank against everybody's, where a server may have built another engine
    than clients. Collective over all ranks.

    Raises:
        ConfigError: its arrays are not those that others have.
    """
    if job.topology.server:
        names = [job.describe(rank) for rank in job.topology.participants]
        check_arrays(link, state, method=job.config.federation.method.name, names=names)


def _record(job: Job, inputs: Inputs) -> dict:
    """Return what the journal is to keep of the configuration, and of what was read."""
    return job.request.record | (
        {"inputs": journal_digests(job.config, inputs.everyone)} if job.reporter else {}
    )


def _run_rounds(job: Job, federated, progress, stop: StopFlag):
    """Run all rounds that are left. Asked to end before the first one, a run ends at once: there is nothing
    to lose.
    """
    from fedspeed.federation import rounds

    if job.reporter:
        stop.on_asked = lambda where: reporting.note_stop_request(job.request.folder, where)
    rounds.baseline(federated, progress)
    stop.in_rounds = True
    return rounds.run(federated, progress)


def _end(job: Job, federated, progress, inputs: Inputs, *, start, monitor) -> Ending:
    """Compare, export and report what the rounds have come to; the reporting rank does so for all, but each
    client's own model is its own rank's to export.

    Args:
        start: the state before the first round.
    """
    comparison = _compare(job, federated, progress, inputs, start=start)
    exported = exporting.export_models(job, federated, progress, inputs.tokenizer) if progress.done else None
    if not job.reporter:
        status, code = (progress.done, EXIT_OK) if progress.done else ("preempted", EXIT_RESUMABLE)
        return Ending(status=status, exit_code=code)
    if not progress.done:
        return reporting.stop_early(job, progress.round, monitor, progress.renewed)
    return reporting.finish(
        job, progress, monitor, exported=exported, comparison=comparison, predicted=forecast(job, inputs.data)
    )


def _compare(job: Job, federated, progress, inputs: Inputs, *, start) -> Comparison | None:
    """Return the table of each client alone beside the federated model, where it is asked for."""
    if not (progress.done and job.config.federation.compare_alone):
        return None
    from fedspeed.evaluation.compare import compare

    everyone = [encode_client(rows, inputs.tokenizer, job.config.data) for rows in inputs.everyone]
    scores = compare(federated, progress, start=start, everyone=everyone)
    return Comparison(tuple(ComparisonRow(s.name, s.held_out_loss, s.accuracy) for s in scores))


def _tell_all(job: Job, meeting: _Meeting, monitor, error: Exception) -> BaseException:
    """Leave word of a failure in the rounds; the reporter finds out who was lost, and reports. Return the
    error in a user's words.
    """
    meant = as_user_error(error, job)
    rendezvous.publish(meeting.store, f"failed/{job.world_rank}", str(meant))
    lost = (
        find_lost(job, meeting.store, meeting.heartbeat)
        if job.reporter and isinstance(meant, LostPeerError)
        else []
    )
    meeting.heartbeat.close(goodbye=False)
    if job.reporter:
        try:
            reporting.report_failure(job, monitor, meant, lost)
        except OSError as second:  # what stopped the run may stop its report too; its own error tells more
            LOG.info(f"the report could not be written: {second}")
        rendezvous.publish(meeting.store, REPORTED, "")
    return meant


def _stand_by(job: Job, store: rendezvous.Store, early: Transport | None) -> Ending:
    """Leave at once, as a rank without work does; but rank 0 holds the store, and stays until all that
    work have left.
    """
    if job.world_rank == 0:
        several = sharing.may_share_cards(job)
        undecided = job.config.model.dtype == "auto"
        points = {
            "cards": several,
            "devices": undecided,
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
    if early is not None:
        early.close()
    return Ending(status="finished", exit_code=EXIT_OK)


def _heartbeat(job: Job, store: rendezvous.Store, last_resort: reporting.ExitWhenStuck) -> Heartbeat:
    heartbeat_timeout_s = job.config.cluster.heartbeat_timeout_s
    grace_s = GRACE_S if job.reporter else GRACE_S + REPORT_S
    return Heartbeat(
        store,
        job.vital_ranks,
        job.world_rank,
        interval_s=heartbeat_timeout_s / 12,
        heartbeat_timeout_s=heartbeat_timeout_s,
        on_stuck=last_resort,
        grace_s=grace_s,
    )


def _join_cluster(job: Job, store: rendezvous.Store) -> None:
    """Join the torch world of this rank's cluster, or of its client where that is a pipeline."""
    from fedspeed.engine.arithmetic import set_arithmetic

    timeout_s = job.config.cluster.start_timeout_s
    os.environ.update(rendezvous.torch_world_env(store, job.world, job.launch, timeout_s))
    # torchrun's agent holds a store for its own world, which is not this cluster's.
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    quiet()
    set_arithmetic(job.config.engine.matmul, job.config.engine.deterministic)
    components.preload()  # a forked rank has it all
    join_world(job.config.routing.deadline_s)


def _say(texts: list[str]) -> None:
    for text in texts:
        LOG.info(text)
