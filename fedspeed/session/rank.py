"""The one place where parts are connected: the life of one rank, from meeting the others to the export."""

import os
import shutil
import sys
from dataclasses import dataclass

from fedspeed import activity
from fedspeed.checkpoint.journal import Entry
from fedspeed.cluster import rendezvous
from fedspeed.cluster.checks import check_clusters
from fedspeed.cluster.discover import from_process
from fedspeed.cluster.pulse import Pulse
from fedspeed.cluster.topology import plan, warnings
from fedspeed.config.check import notes
from fedspeed.engine.checks import check_pipeline
from fedspeed.errors import EXIT_OK, EXIT_RESUMABLE, LostPeerError
from fedspeed.models.checks import weight_notes
from fedspeed.routing.checks import check_routing, routing_notes
from fedspeed.session import last_words, numeric_type, parts, preflight, sharing, standing
from fedspeed.session.forecast import forecast
from fedspeed.session.hosts import check_hosts, leave_for_hosts, several_hosts
from fedspeed.session.inputs import check_inputs, to_keep
from fedspeed.session.order import Job, Order
from fedspeed.session.together import CheckIn, StopFlag, find_lost

GOODBYE_S = 60.0
BRIEF_GOODBYE_S = 10.0  # where ranks may be gone for good
GRACE_S = 30.0  # from a loss until a rank that is still waiting for the lost ends itself
REPORT_S = 5.0  # for the reporting rank, before those end that take it along
REPORTED = "reported"  # the key that says so


def run_rank(order: Order) -> int:
    """Take part in the run as the rank that the environment says; returns the exit code."""
    stop = StopFlag()
    launch = from_process(order.hostfile)
    job = Job(order, launch, plan(launch.hosts, order.config.data.clients, order.config.cluster.ranks_per_client))
    with activity.during("the wait for all ranks"):
        store = rendezvous.meet(launch, order.config.cluster.start_timeout_s)
    if job.me == 0:
        for text in [*warnings(job.topology), *notes(order.config), *routing_notes(order.config.routing, len(job.topology.participants))]:
            print(f"fedspeed: {text}", file=sys.stderr)
    mpi = parts.mpi(job)
    try:
        with parts.working(job):
            code = _work(job, store, mpi, stop) if job.place.clients else _stand_by(job, store, mpi)
    except BaseException as error:
        told = last_words.told(error, job)
        last_words.tell_refusal(told, order.json_out, store)
        if mpi is not None and launch.world_size > 1:
            if isinstance(told, LostPeerError) and not job.reporter:
                store.wait([REPORTED], GRACE_S + REPORT_S)  # the reporter may still be stuck; our end is the end of all ranks
            last_words.abort_mpi(told)
        if told is error:
            raise
        raise told from error
    rendezvous.leave(store, GOODBYE_S if job.vital == job.crew else BRIEF_GOODBYE_S)
    return code


@dataclass(frozen=True)
class _Inputs:
    """What a rank has read before anything starts: `everyone` is the rows of all clients, `data` the encoded ones of its own;
    `sharers` is how many ranks compute on its device."""

    tokenizer: object
    everyone: list
    data: dict
    entry: Entry | None
    sharers: int


def _work(job: Job, store: rendezvous.Store, mpi, stop: StopFlag) -> int:
    claim = standing.Claim()
    sharing.tell_card(job, store)
    decided = numeric_type.agree(job, store)
    job, config = decided.job, decided.job.config
    if decided.text and job.reporter:
        print(f"fedspeed: {decided.text}", file=sys.stderr)
    inputs = _read_inputs(job, store, claim, decided.begun)
    if job.reporter:
        for text in weight_notes(config):
            print(f"fedspeed: {text}", file=sys.stderr)
    stuck = last_words.Stuck(job)
    pulse = _pulse(job, store, stuck)
    _join_cluster(job, store)
    transport = parts.transport(job, store, mpi)
    try:
        return _federate(job, store, transport, inputs, claim, pulse, stuck, stop)
    except BaseException:
        if transport is not None and config.routing.transport == "tls":
            transport.close()  # sending is a thread's there: what this site had to say goes out first, so that the others end for the same reason
        raise


def _federate(job: Job, store: rendezvous.Store, transport, inputs: _Inputs, claim: standing.Claim, pulse: Pulse, stuck, stop: StopFlag) -> int:
    from fedspeed.federation import rounds
    from fedspeed.monitor.clock import StageClock, peak_bytes

    config = job.config
    clock, journal = StageClock(trace=parts.trace(job)), standing.journal_of(job.order)
    with activity.during("the building of the engine"):
        engine = parts.engine(job, clock, inputs.sharers)
    link, close = parts.link(job, store, transport, engine, pulse)
    seat = parts.seat(job, inputs.data)
    fresh = rounds.start(config, engine)
    first = fresh.tensors  # what a client alone would start from too
    progress = standing.resume(config, engine, link, journal, inputs.entry, seat, fresh)
    data = parts.data_report(job, link, inputs.data, inputs.everyone)
    monitor = stuck.monitor = parts.monitor(job, progress.round if inputs.entry else 0, claim, data)
    if job.reporter:
        stop.tell = lambda where: last_words.tell_where(job.order.folder, where)
    record = job.order.record | ({"inputs": to_keep(config, inputs.everyone)} if job.reporter else {})
    federation = rounds.Federation(config, job.order.marks, record, seat, engine, link, journal, monitor, clock, peak_bytes, stop,
                                   _renewal(job))
    try:
        try:
            federation.baseline(progress)  # asked to end meanwhile, a run ends at once: there is nothing to lose
            stop.in_rounds = True
            progress = federation.run(progress)
            clock.trace.close()
            comparison = _compare(job, federation, first, progress, inputs, link)
            if job.reporter:
                code = last_words.finish(job, progress, monitor, engine, inputs.tokenizer, comparison, forecast(job, inputs.data),
                                         federation.renewed)
            else:
                code = EXIT_OK if progress.done else EXIT_RESUMABLE
        except Exception as error:
            error.add_note(f"round {progress.round} was the last to be finished")
            told = _told_to_all(job, store, pulse, monitor, error)
            raise told from (None if told is error else error)
        pulse.close()
        close()
        engine.close()
        _leave_cluster()
        shutil.rmtree(parts.swap_folder(job), ignore_errors=True)  # as large as the model, and of no use to a later start
        return code
    finally:
        clock.trace.close()
        monitor.close()


def _stand_by(job: Job, store: rendezvous.Store, mpi) -> int:
    """A rank without clients leaves at once; but rank 0 holds the store, and stays until all that work have left."""
    if job.me == 0:
        several, undecided = sharing.are_several(job), job.config.model.dtype == "auto"
        points = {"cards": several, "devices": undecided, "ready": True, "inputs": several_hosts(job),
                  "fresh": job.order.fresh}
        for point in (point for point, passed in points.items() if passed):
            with CheckIn(job, store, point):
                pass
        pulse = _pulse(job, store, last_words.Stuck(job))
        while rendezvous.still_here(store, job.workers, 1.0):
            if lost := pulse.lost():
                store.wait([REPORTED], GRACE_S)
                raise last_words.silent(job, lost)
        pulse.close()
    if mpi is not None:
        mpi.close()
    return EXIT_OK


def _read_inputs(job: Job, store: rendezvous.Store, claim: standing.Claim, begun_type: bool) -> _Inputs:
    """What may fail for reasons of this rank alone comes first, so that all can agree to go on.

    Args:
        begun_type: whether an earlier start of this run, and not the configuration, asks for the numeric type.
    """
    order, config = job.order, job.config
    with CheckIn(job, store, "ready"):
        from fedspeed.data.clients import client_rows, encode_client, largest_id
        from fedspeed.engine.arithmetic import check_arithmetic
        from fedspeed.engine.device_types import check_dtype
        from fedspeed.models.tokenizer import check_ids, load_tokenizer

        preflight.check_files(order.loaded)
        check_clusters(config, job.topology)
        routing, _ = check_routing(order.config, job.topology)
        check_pipeline(config, order.deepspeed, routing, job.topology, job.launch.hostfile)
        shared, sharers = sharing.check_shared(job, store)
        check_dtype(config.model.dtype, str(order.folder) if begun_type else "", job.launch.local_rank)
        check_arithmetic(config.engine.matmul, config.engine.deterministic, job.launch.local_rank)
        tokenizer = load_tokenizer(config.model)
        everyone = client_rows(config.data, config.run.seed)
        data = {c: encode_client(everyone[c], tokenizer, config.data) for c in job.place.clients}
        check_ids(max(map(largest_id, data.values())), config.model)
        told = [*shared, *preflight.start_notes(order.loaded)]
        if job.reporter and order.folder.is_dir():
            claim.take(order.folder)
        if job.reporter and config.routing.transport == "tls" and not order.fresh:
            job.site.check_epoch(order.folder)
        entry = standing.journal_entry(standing.journal_of(order), order) if job.reporter and not order.fresh else None
        if entry is not None:
            told += check_inputs(standing.journal_of(order), entry, config, everyone)
            standing.check_best(standing.journal_of(order), entry)
        if several_hosts(job):
            leave_for_hosts(job, store, everyone)
    if several_hosts(job):
        with CheckIn(job, store, "inputs"):
            check_hosts(job, store)
    if job.reporter:
        for text in told:
            print(f"fedspeed: {text}", file=sys.stderr)
    if order.fresh:
        with CheckIn(job, store, "fresh"):
            if job.reporter:
                order.make_room()
    return _Inputs(tokenizer, everyone, data, entry, sharers)


def _renewal(job: Job):
    """Whether this rank has nothing against starting again with a newer roster: the one that speaks for the site has seen it. The others would read the file
    at another time, and take for the present roster what is the newer one."""
    if job.config.routing.transport != "tls":
        return lambda: False
    return job.site.renewed if job.speaks else lambda: True


def _pulse(job: Job, store: rendezvous.Store, stuck: last_words.Stuck) -> Pulse:
    silence_s = job.config.cluster.silence_s
    return Pulse(store, job.vital, job.me, silence_s / 12, silence_s, stuck, GRACE_S if job.reporter else GRACE_S + REPORT_S)


def _join_cluster(job: Job, store: rendezvous.Store) -> None:
    os.environ.update(rendezvous.torch_world(store, job.world, job.launch, job.config.cluster.start_timeout_s))
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)  # torchrun's agent holds a store for its own world, which is not this cluster's
    from fedspeed.engine.arithmetic import set_arithmetic
    from fedspeed.engine.world import join_world, quiet

    quiet()
    set_arithmetic(job.config.engine.matmul, job.config.engine.deterministic)
    parts.preload()  # a forked rank has it all
    join_world(job.config.routing.deadline_s)


def _leave_cluster() -> None:
    from fedspeed.engine.world import leave_world

    leave_world()


def _compare(job: Job, federation, first, progress, inputs: _Inputs, link):
    """The table of each client alone beside the federated model, where it is asked for."""
    if not (progress.done and job.config.federation.compare_alone):
        return None
    from fedspeed.data.clients import encode_client
    from fedspeed.federation.alone import compare
    from fedspeed.monitor.report import Comparison, ComparisonRow

    everyone = [encode_client(rows, inputs.tokenizer, job.config.data) for rows in inputs.everyone]
    scores = compare(federation, first, progress.tensors, everyone, link)
    return Comparison(tuple(ComparisonRow(s.name, s.held_out_loss, s.accuracy) for s in scores))


def _told_to_all(job: Job, store: rendezvous.Store, pulse: Pulse, monitor, error: Exception) -> BaseException:
    """Leave word of a failure in the rounds; the reporter finds out who was lost, and reports. Returns the error in a user's words."""
    error = last_words.told(error, job)
    rendezvous.publish(store, f"failed/{job.me}", str(error))
    lost = find_lost(job, store, pulse) if job.reporter and isinstance(error, LostPeerError) else []
    pulse.close(goodbye=False)
    if job.reporter:
        try:
            last_words.report_failure(job, monitor, error, lost)
        except OSError as second:  # what stopped the run may stop its report too; the run's own error tells more
            print(f"fedspeed: the report could not be written: {second}", file=sys.stderr)
        rendezvous.publish(store, REPORTED, "")
    return error
