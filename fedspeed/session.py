"""The one place where parts are built and connected: one rank's life, one short function a part."""

import errno
import fcntl
import os
import signal
import socket
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

from fedspeed import preflight
from fedspeed.checkpoint.journal import Entry, Journal, changes
from fedspeed.cluster import rendezvous
from fedspeed.cluster.discover import Launch, from_process
from fedspeed.cluster.layout import seat
from fedspeed.cluster.once import report
from fedspeed.cluster.pulse import Pulse
from fedspeed.cluster.topology import Topology, plan, warnings
from fedspeed.config.deepspeed import merge, zero_stage
from fedspeed.config.load import Loaded
from fedspeed.config.run import RunConfig
from fedspeed.config.show import as_dict, fingerprint, render
from fedspeed.errors import EXIT_FAILED, EXIT_OK, EXIT_RESUMABLE, FedSpeedError, JournalError, LostPeerError, Preempted
from fedspeed.federation.config import FederationConfig

CHECK_IN_S = 120.0  # ranks prepare alike; one that needs longer than this after the first is ready has a problem of its own
GOODBYE_S = 60.0
GRACE_S = 30.0  # from a loss until a rank that is still waiting for the lost ends itself
REPORT_S = 5.0  # for the reporting rank, before those end that take it along
NOTE_S = 3.0
REPORTED = "reported"  # the key that says so
HEAR_S = 0.5  # for the others to read why rank 0 goes, and the store with it
PLACE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EIO, errno.ESTALE)


@dataclass(frozen=True)
class Order:
    """What the command line asked for."""

    loaded: Loaded
    hostfile: Path | None = None
    json_out: TextIO | None = None
    fresh: bool = False

    @property
    def config(self) -> RunConfig:
        return self.loaded.config

    @property
    def deepspeed(self) -> dict:
        return merge(self.config.deepspeed, self.config, self.loaded.folder)

    @property
    def marks(self) -> str:
        """What a resumed run must have in common with the one in the journal."""
        return fingerprint(replace(self.config, deepspeed=self.deepspeed))


def run_folder(loaded: Loaded) -> Path:
    """`runs/<name>`; the name is the YAML's unless the run has its own."""
    name = loaded.config.run.name or (loaded.path.stem if loaded.path else "run")
    return Path(loaded.config.run.out) / name


def move_aside(folder: Path) -> None:
    """Make room for a fresh run of the same name."""
    number = 1
    while (target := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    if folder.exists():
        folder.rename(target)
        print(f"fedspeed: the earlier run is now {target}", file=sys.stderr)


class Claim:
    """The sole right to write a run: a lock on its folder, which the kernel drops with the process, however that ends."""

    def __init__(self):
        self._held = -1

    def take(self, folder: Path) -> None:
        """Claim a folder that is there; again and again, if need be.

        Raises:
            JournalError: another process has it.
        """
        if self._held >= 0 and os.path.samestat(os.fstat(self._held), folder.stat()):
            return
        self.drop()
        self._held = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise JournalError(f"{folder}: another process is at work on this run; wait for it or end it, or give this one its own name "
                               "with run.name=...") from error
        except OSError:
            pass  # some network file systems cannot lock a folder; there nobody is refused

    def drop(self) -> None:
        if self._held >= 0:
            os.close(self._held)
            self._held = -1


def journal_entry(journal: Journal, order: Order) -> Entry | None:
    """The journal's newest entry, if there is one.

    Raises:
        JournalError: it is damaged, or belongs to a run with another configuration.
    """
    entry = journal.latest()
    if entry is None or entry.fingerprint == order.marks:
        return entry
    differing = changes(entry.config, as_dict(order.config)) or ["the content of the DeepSpeed base file"]
    raise JournalError(f"{journal.folder}: belongs to a run with another configuration ({'; '.join(differing[:8])}); give the new one its "
                       "own name with run.name=..., or start anew with --fresh")


def ending(number: int, stale: int, config: FederationConfig) -> str:
    """Why a run that stands at round `number` is over, empty while it goes on. The journal's word does not count here: rounds and
    patience may have changed since."""
    if number >= config.rounds:
        return "finished"
    return "early stop" if config.patience and stale >= config.patience else ""


def preload() -> None:
    """The imports that all ranks of a machine share; nothing that starts a thread or touches a device."""
    import peft  # noqa: F401
    import transformers.models.auto.modeling_auto  # noqa: F401

    import fedspeed.engine.build
    import fedspeed.federation.rounds
    import fedspeed.routing.exchange  # noqa: F401


class StopFlag:
    """SIGTERM and SIGUSR1 (some schedulers' warning) ask to end: after the round in progress, or at once while there is none."""

    def __init__(self):
        self._asked, self.in_rounds = False, False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._on_signal)

    def _on_signal(self, *_) -> None:
        self._asked = True
        if not self.in_rounds:
            raise Preempted("asked to end before a round had begun; the same command goes on")

    def __call__(self) -> bool:
        return self._asked


def run_rank(order: Order) -> int:
    """Take part in the run as the rank that the environment says; returns the exit code."""
    stop = StopFlag()
    launch = from_process(order.hostfile)
    topology = plan(launch.hosts, order.config.data.clients, order.config.cluster.ranks_per_client)
    store = rendezvous.meet(launch, order.config.cluster.start_timeout_s)
    if launch.world_rank == 0:
        for text in warnings(topology):
            print(f"fedspeed: {text}", file=sys.stderr)
    transport = _mpi(order.config, launch, topology)
    if launch.world_rank in topology.idle:
        _rest(store, transport)
        return EXIT_OK
    try:
        code = _work(order, launch, topology, store, transport, stop)
    except BaseException as error:
        told = _told(error, run_folder(order.loaded))
        if transport is not None and launch.world_size > 1:
            if isinstance(told, LostPeerError) and launch.world_rank != topology.participants[0]:
                store.wait([REPORTED], GRACE_S + REPORT_S)  # the reporter may still be stuck; our end is the end of all ranks
            _abort(told)
        if told is error:
            raise
        raise told from error
    rendezvous.leave(store, GOODBYE_S)
    return code


def _work(order: Order, launch: Launch, topology: Topology, store, transport, stop: StopFlag) -> int:
    config, deepspeed, folder = order.config, order.deepspeed, run_folder(order.loaded)
    place = topology.place(launch.world_rank)
    reporter = launch.world_rank == topology.participants[0]
    journal, claim = Journal(folder, config.checkpoint.keep), Claim()

    # What may fail for reasons of this rank alone comes first, so that all can agree to go on.
    with _check_in(store, topology, launch, "ready"):
        from fedspeed.data.clients import client_rows, encode_client
        from fedspeed.models.tokenizer import load_tokenizer

        preflight.check_files(order.loaded)
        tokenizer = load_tokenizer(config.model)
        rows = client_rows(config.data, config.run.seed)
        data = {c: encode_client(rows[c], tokenizer, config.data) for c in place.clients}
        if reporter and folder.is_dir():
            claim.take(folder)
        entry = journal_entry(journal, order) if reporter and not order.fresh else None
    if order.fresh:
        with _check_in(store, topology, launch, "fresh"):
            if reporter:
                move_aside(folder)

    stuck = _Stuck(order, deepspeed, launch, topology)
    silence_s = config.cluster.silence_s
    pulse = Pulse(store, _working(topology), launch.world_rank, silence_s / 12, silence_s, stuck,
                  GRACE_S if reporter else GRACE_S + REPORT_S)
    os.environ.update(rendezvous.cluster_world(store, topology, launch.world_rank, launch, config.cluster.start_timeout_s))
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)  # torchrun's agent holds a store for its own world, which is not this cluster's
    from fedspeed.engine.world import join_world, leave_world, quiet

    quiet()
    join_world(config.routing.deadline_s)
    clock = _clock()
    engine = _engine(config, deepspeed, launch, topology, folder, clock)
    link, close = _link(config, launch, topology, store, transport, engine, pulse)
    monitor = None
    try:
        from fedspeed.federation import rounds

        seat_ = _seat(topology, launch, data, reporter)
        fresh = rounds.start(config, engine)
        first = fresh.tensors  # what a client alone would start from too
        progress = _progress(config, engine, link, journal, entry, seat_, fresh)
        monitor = _monitor(order, deepspeed, folder, progress.round if entry else 0, reporter, claim)
        stuck.monitor = monitor
        federation = rounds.Federation(config, order.marks, as_dict(config), seat_, engine, link, journal, monitor, clock, _peak_bytes,
                                       stop)
        stop.in_rounds = True
        try:
            progress = federation.run(progress)
            comparison = None
            if progress.done and config.federation.compare_alone:
                comparison = _compare(federation, first, progress, [encode_client(r, tokenizer, config.data) for r in rows], link)
        except Exception as error:
            error = _told(error, folder)
            rendezvous.publish(store, f"failed/{launch.world_rank}", str(error))
            lost = _lost(store, topology, pulse) if reporter and isinstance(error, LostPeerError) else []
            pulse.close(goodbye=False)
            if reporter:
                try:
                    _report_failure(order, deepspeed, monitor, launch, topology, error, lost)
                except OSError as second:  # what stopped the run may stop its report too; the run's own error tells more
                    print(f"fedspeed: the report could not be written: {second}", file=sys.stderr)
                rendezvous.publish(store, REPORTED, "")
            raise error
        if not reporter:
            pulse.close()
            close()
            leave_world()
            return EXIT_OK if progress.done else EXIT_RESUMABLE
        code = _finish(order, deepspeed, folder, launch, topology, journal, progress, monitor, engine, tokenizer, comparison)
        pulse.close()
        close()
        leave_world()
        return code
    finally:
        if monitor is not None:
            monitor.close()


# Parts, in the order in which they are built.


def _mpi(config: RunConfig, launch: Launch, topology: Topology):
    """The MPI transport where it is wanted, built by all ranks together; None elsewhere."""
    wanted = config.routing.transport
    if wanted != "mpi" and not (wanted == "auto" and launch.kind == "openmpi" and len(topology.participants) > 1):
        return None
    from fedspeed.routing.transports.mpi import MpiTransport, world_size

    if world_size() != launch.world_size:
        raise FedSpeedError(f"routing.transport={wanted}: MPI sees {world_size()} ranks, the launcher started {launch.world_size}; start with "
                            "mpirun, or set routing.transport=gloo")
    return MpiTransport(list(topology.participants))


def _rest(store, transport) -> None:
    """An idle rank says goodbye at once; under MPI it then waits for the others, since MPI ends for all ranks together."""
    rendezvous.leave(store, GOODBYE_S)
    if transport is not None:
        transport.close()


def _abort(error: BaseException) -> None:
    import traceback

    from fedspeed.routing.transports.mpi import abort

    if isinstance(error, FedSpeedError):
        print(f"fedspeed: error: {error}", file=sys.stderr, flush=True)
    else:
        traceback.print_exc()
    abort(getattr(error, "exit_code", EXIT_FAILED))


class _check_in:
    """A point that all working ranks pass together, or none: one rank's bad input ends the others at once instead of at a deadline."""

    def __init__(self, store, topology: Topology, launch: Launch, point: str):
        self._store, self._me, self._point = store, launch.world_rank, point
        self._ranks = _working(topology)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        keys = [f"{self._point}/{rank}" for rank in self._ranks]
        if kind is not None:
            # A note: should the store be gone too, the error must still be heard.
            self._store.note(f"{self._point}/{self._me}", f"{getattr(error, 'exit_code', EXIT_FAILED)} {error}")
            if self._me == 0 and len(keys) > 1:
                with suppress(Preempted):  # another rank may be gone already, and this one told to end for it
                    self._store.wait(keys, NOTE_S)
                    time.sleep(HEAR_S)
            return
        self._store.put(f"{self._point}/{self._me}", f"{EXIT_OK}")
        late = self._store.wait(keys, CHECK_IN_S)
        if late:
            ranks = ", ".join(key.rsplit("/", 1)[1] for key in sorted(late))
            raise LostPeerError(f"ranks {ranks} did not get ready within {CHECK_IN_S:.0f} s; look at their output")
        for rank, word in zip(self._ranks, self._store.get(*keys), strict=True):
            code, _, text = word.partition(" ")
            if int(code) != EXIT_OK:
                failure = FedSpeedError(f"rank {rank} cannot take part: {text}")
                failure.exit_code = int(code)
                raise failure


def _clock():
    from fedspeed.monitor.clock import StageClock

    return StageClock()


def _engine(config: RunConfig, deepspeed: dict, launch: Launch, topology: Topology, folder: Path, clock):
    import torch

    from fedspeed.engine.build import build_engine

    torch.set_num_threads(config.engine.threads or int(os.environ.get("OMP_NUM_THREADS") or
                                                       max(1, (os.cpu_count() or 1) // int(os.environ["LOCAL_SIZE"]))))
    cluster = topology.cluster_of(topology.place(launch.world_rank).cluster)
    sets = sorted({tuple(cluster.ranks.index(r) for r in topology.clients[c].ranks) for c in cluster.clients})
    host, _ = seat(launch.hosts, launch.world_rank)
    nvme = Path(host.nvme) / folder.name if host.nvme else folder / "nvme"
    return build_engine(config.model, config.adapter, config.train, config.engine, deepspeed, sets, clock,
                        nvme / f"rank-{launch.world_rank}", config.run.seed)


def _link(config: RunConfig, launch: Launch, topology: Topology, store, transport, engine, pulse: Pulse):
    """(the rank's link to the exchange, what closes it)."""
    from fedspeed.federation.link import ClientLink
    from fedspeed.routing.exchange import PlainExchange
    from fedspeed.routing.transports.local import LocalTransport

    deadline, participants = config.routing.deadline_s, topology.participants
    if launch.world_rank not in participants:
        return ClientLink(engine, None, deadline), (transport.close if transport else lambda: None)
    if transport is None:
        if len(participants) == 1:
            transport = LocalTransport.set_of(1)[0]
        else:
            from fedspeed.routing.transports.gloo import GlooTransport

            transport = GlooTransport(store.connect("exchange", config.cluster.start_timeout_s), participants.index(launch.world_rank),
                                      len(participants), config.cluster.start_timeout_s)
    exchange = PlainExchange(transport, deadline, _RollCall(store, topology, launch, pulse))
    return ClientLink(engine, exchange, deadline), exchange.close


class _RollCall:
    """Who has reached an exchange, by notes in the store; who is lost, by the pulse."""

    def __init__(self, store, topology: Topology, launch: Launch, pulse: Pulse):
        self._store, self._topology, self._launch, self._pulse = store, topology, launch, pulse

    def arrive(self, tag: int) -> None:
        if len(self._topology.participants) > 1:
            rendezvous.publish(self._store, f"exchange/{tag}/{self._launch.world_rank}", "here")

    def missing(self, tag: int) -> list[str]:
        here = rendezvous.seen(self._store, f"exchange/{tag}", self._topology.participants)
        if self._launch.world_rank not in here:
            return [_named(self._topology, 0)]  # our own note is gone: so is the store, and rank 0 that held it
        return [_named(self._topology, rank) for rank in self._topology.participants if rank not in here]

    def lost(self) -> list[str]:
        return [_named(self._topology, rank) for rank in self._pulse.lost()]


class _Stuck:
    """Ends this rank where its main thread waits for a lost one in a call that no exception reaches; the reporter reports first."""

    def __init__(self, order: Order, deepspeed: dict, launch: Launch, topology: Topology):
        self._order, self._deepspeed, self._launch, self._topology = order, deepspeed, launch, topology
        self.monitor = None  # until there is one

    def __call__(self, lost: tuple[int, ...]) -> None:
        names, have = ", ".join(_named(self._topology, rank) for rank in lost), "has" if len(lost) == 1 else "have"
        error = LostPeerError(f"{names} {have} been silent for {self._order.config.cluster.silence_s:g} s; the same command resumes from "
                              "the journal")
        try:
            report(error)
            if self.monitor is not None:
                _report_failure(self._order, self._deepspeed, self.monitor, self._launch, self._topology, error, list(lost))
        finally:
            os._exit(EXIT_RESUMABLE)


def _working(topology: Topology) -> list[int]:
    return [p.world_rank for p in topology.ranks if p.clients]


def _named(topology: Topology, rank: int) -> str:
    place = topology.place(rank)
    return f"client{'s' if len(place.clients) > 1 else ''} {', '.join(map(str, place.clients))} (rank {rank} on {place.host})"


def _seat(topology: Topology, launch: Launch, data: dict, reporter: bool):
    from fedspeed.federation.rounds import Seat

    working = _working(topology)
    return Seat(data, working.index(launch.world_rank), len(working), launch.world_rank in topology.participants, reporter,
                topology.place(launch.world_rank).cluster)


def _progress(config: RunConfig, engine, link, journal: Journal, entry: Entry | None, seat_, fresh):
    """Where the run stands: the `fresh` start, or the reporter's journal entry, told to everyone through the exchange."""
    import numpy as np

    from fedspeed.federation import rounds
    from fedspeed.federation.layout import Layout

    packed = rounds.pack(fresh.tensors, fresh.server)
    layout, head, vector = Layout.of(packed), np.zeros(5), np.zeros(Layout.of(packed).size, dtype=np.float32)
    if entry is not None:
        saved = journal.tensors(entry)
        if Layout.of(saved) != layout:
            raise JournalError(f"{journal.folder}: its tensors do not fit this model; start anew with --fresh")
        vector = layout.flatten(saved)
        head = np.array([1.0, entry.round, entry.best_round, entry.best_loss if entry.best_round else 0.0, entry.stale])
    head = link.sum(head, 0.0).vector
    if not head[0]:
        return fresh
    vector = link.sum(vector, 0.0).vector
    tensors, moments = rounds.unpack(layout.unflatten(vector))
    number, best, stale = int(head[1]), int(head[2]), int(head[4])
    progress = rounds.Progress(number, tensors, moments, {}, best, float(head[3]) if best else float("inf"), stale,
                               ending(number, stale, config.federation))
    if config.federation.local_optimizer == "keep" and number:
        for client in seat_.clients:
            progress.optimizers |= _kept_optimizer(journal, engine, number, client, seat_.gateway)
        link.sum(np.zeros(1), 0.0)  # a rank that cannot read its own has gone by now, and nothing of the run is changed yet
    return progress


def _kept_optimizer(journal: Journal, engine, number: int, client: int, gateway: bool) -> dict:
    """A client's optimizer from its gateway's disk, on all its ranks; empty for a client that was never asked."""
    import numpy as np

    from fedspeed.federation.layout import Layout
    from fedspeed.federation.rounds import as_arrays

    shapes = as_arrays(engine.optimizer_state())
    layout = Layout.of(shapes)
    saved = journal.load_client(number, client) if gateway else None
    known = np.array([float(bool(saved))])
    if not engine.share_from_gateway(known)[0]:
        return {}
    vector = layout.flatten(saved) if gateway else np.zeros(layout.size, dtype=np.float32)
    return {client: layout.unflatten(engine.share_from_gateway(vector))}


def _monitor(order: Order, deepspeed: dict, folder: Path, resume_round: int, reporter: bool, claim: Claim):
    from fedspeed.monitor.monitor import Monitor, NoMonitor

    if not reporter:
        return NoMonitor()
    folder.mkdir(parents=True, exist_ok=True)
    claim.take(folder)
    (folder / "report.md").unlink(missing_ok=True)  # it speaks of how an earlier start ended, and this one may end without a word
    return Monitor(folder, order.config.monitor, order.config.routing.mode, order.config.federation.rounds, json_out=order.json_out,
                   resume_round=resume_round, config_text=render(order.loaded, deepspeed))


def _peak_bytes() -> int:
    from fedspeed.monitor.clock import peak_bytes

    return peak_bytes()


# The end.


def _compare(federation, first, progress, everyone, link):
    from fedspeed.federation.alone import compare
    from fedspeed.monitor.report import Comparison, ComparisonRow

    scores = compare(federation, first, progress.tensors, everyone, link)
    return Comparison(tuple(ComparisonRow(s.name, s.held_out_loss, s.accuracy) for s in scores))


def _summary(config: RunConfig, monitor, status: str, reason: str, code: int, also_missing=()):
    from fedspeed.monitor.records import summarise

    return summarise(monitor.records, status=status, total_rounds=config.federation.rounds, reason=reason, exit_code=code,
                     restarts=int(os.environ.get("FEDSPEED_RESTARTS", "0")), also_missing=also_missing)


def _finish(order: Order, deepspeed: dict, folder: Path, launch: Launch, topology: Topology, journal: Journal, progress, monitor, engine,
            tokenizer, comparison) -> int:
    """Export, report, and the exit code: 0 only if every update of every round counted."""
    from fedspeed.checkpoint.export import export
    from fedspeed.monitor.report import Export

    config = order.config
    if not progress.done:
        reason = f"asked to end; round {progress.round} is in the journal"
        monitor.finish(_summary(config, monitor, "preempted", reason, EXIT_RESUMABLE), _facts(order, deepspeed, launch, topology, None))
        raise Preempted(f"stopped after round {progress.round} of {config.federation.rounds} as asked; the same command goes on from there")
    best = bool(progress.best_round) and progress.best_round != progress.round
    tensors = journal.load_best() if best else progress.tensors
    kind = "model" if config.adapter.method == "full" else "adapter"
    export(folder / kind, engine.model, tokenizer, tensors, config.model.base)
    if best:
        export(folder / f"{kind}-last", engine.model, tokenizer, progress.tensors, config.model.base)
    lost = sum(r.missing_count for r in monitor.records)
    code = EXIT_FAILED if lost else EXIT_OK
    reason = f"{lost} update{'s' if lost > 1 else ''} did not count, see below" if lost else ""
    exported = Export(kind, str(folder / kind), config.model.base, progress.best_round if best else progress.round)
    monitor.finish(_summary(config, monitor, progress.done, reason, code), _facts(order, deepspeed, launch, topology, exported), comparison)
    return code


def _trained(adapter) -> str:
    if adapter.method == "full":
        return "everything"
    return f"the LoRA adapter {adapter.start_from}" if adapter.start_from else f"LoRA r={adapter.lora_rank} on {adapter.targets}"


def _facts(order: Order, deepspeed: dict, launch: Launch, topology: Topology, exported):
    from fedspeed.monitor.report import Facts

    config = order.config
    run = {
        "model": f"{config.model.base} ({config.model.dtype}, {config.model.init} weights)",
        "trained": _trained(config.adapter),
        "data": f"{config.data.task}, {config.data.clients} clients, split {config.data.split}",
        "rounds": f"{config.federation.rounds} x {config.train.local_steps} local steps of {config.train.micro_batch * config.train.accumulation} "
                  "sequences per rank",
        "aggregation": f"{config.federation.aggregation}, server optimizer {config.federation.server_optimizer}",
        "engine": f"DeepSpeed ZeRO-{zero_stage(deepspeed)}, launched by {launch.kind}",
        "layout": f"{sum(bool(p.clients) for p in topology.ranks)} ranks in {len(topology.clusters)} "
                  f"cluster{'s' if len(topology.clusters) > 1 else ''}",
    }
    hosts = []
    for host in launch.hosts:
        clients = sorted({c for p in topology.ranks if p.host == host.name for c in p.clients})
        hosts.append({"host": host.name if host.name != "localhost" else socket.gethostname(), "ranks": str(host.slots),
                      "clients": ", ".join(map(str, clients)) or "idle", "gpu": host.gpu or "-"})
    return Facts(run, tuple(hosts), exported)


def _told(error: BaseException, folder: Path) -> BaseException:
    """The error, with two that a user can do something about told as what they are: a broken connection inside the cluster, a full disk."""
    if isinstance(error, FedSpeedError):
        return error
    if isinstance(error, OSError) and error.errno in PLACE_ERRORS:
        return FedSpeedError(f"{error.filename or folder}: cannot be written ({error.strerror}); make room there or choose another place "
                             "(run.out=FOLDER), and the same command goes on from the last round in the journal")
    from fedspeed.engine.world import lost_connection

    if not lost_connection(error):
        return error
    return LostPeerError(f"a rank of this cluster was lost: {str(error).splitlines()[0]}; the same command resumes from the journal")


def _lost(store, topology: Topology, pulse: Pulse) -> list[int]:
    """The ranks that a run has lost: those that the pulse names. Until it does, survivors leave a note that they failed too, and who leaves
    none within a few seconds is the one."""
    ranks, end = _working(topology), time.monotonic() + NOTE_S
    while True:
        if lost := pulse.lost():
            return list(lost)
        silent = sorted(set(ranks) - rendezvous.seen(store, "failed", ranks))
        if not silent or time.monotonic() >= end:
            return silent
        time.sleep(0.2)


def _report_failure(order: Order, deepspeed: dict, monitor, launch: Launch, topology: Topology, error: Exception, lost: list[int]) -> None:
    """The reporter's last words about a run that broke: which updates of which round are missing."""
    from fedspeed.monitor.records import MissingUpdates

    clients = tuple(sorted({c for rank in lost for c in topology.place(rank).clients}))
    number = monitor.records[-1].round + 1 if monitor.records else 0
    gaps = (MissingUpdates(number, len(clients), clients),) if clients and number <= order.config.federation.rounds else ()
    untold = [name for rank in lost if (name := _named(topology, rank)) not in str(error)]
    reason = str(error) + (f" (lost: {'; '.join(untold)})" if untold else "")
    monitor.finish(_summary(order.config, monitor, "failed", reason, getattr(error, "exit_code", EXIT_FAILED), gaps),
                   _facts(order, deepspeed, launch, topology, None))
